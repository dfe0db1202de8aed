"""The vocoder's own facts: sizes, the inverse STFT, its place in time and its refusals."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from duologue import rates
from duologue.audio import SpeakMel
from duologue.decoder.vocoder import MEL_FLOOR, Vocoder, VocoderConfig
from duologue.layers import Padded

TINY = VocoderConfig(width=16, ffn_dim=32, num_layers=2)


def tiny(config: VocoderConfig = TINY) -> Vocoder:
    torch.manual_seed(0)
    return Vocoder(config).eval()


def test_pocket_has_its_size_and_states_what_it_holds_back() -> None:
    vocoder = Vocoder(VocoderConfig())
    assert 1.5e6 < sum(parameter.numel() for parameter in vocoder.parameters()) < 2.1e6
    assert vocoder.edge == 384
    assert vocoder.lookahead == 384 + 2 * 256
    assert Vocoder(replace(TINY, lookahead_frames=0)).lookahead == 384


@pytest.mark.parametrize("lookahead_frames", [0, 1, 2, 5])
@torch.inference_mode()
def test_a_step_gives_all_but_the_lookahead_and_flush_the_rest(lookahead_frames: int) -> None:
    vocoder = tiny(replace(TINY, lookahead_frames=lookahead_frames))
    state = vocoder.init_state(3)
    lengths = torch.tensor([30, 3, 0])
    given = vocoder.step(Padded(torch.randn(3, 30, 80), lengths), state).lengths
    assert given.tolist() == (lengths * 256 - vocoder.lookahead).clamp(min=0).tolist()
    assert (given + vocoder.flush(state).lengths).tolist() == (lengths * 256).tolist()


@torch.inference_mode()
def test_overlap_add_gives_back_the_wave_of_its_own_spectra_up_to_both_ends() -> None:
    vocoder = tiny()
    wav = 0.1 * torch.randn(2, 256 * 20)
    padded = functional.pad(wav[:, None], (384, 384), mode="reflect")[:, 0]
    spectrum = torch.stft(padded, 1024, 256, window=vocoder.window, center=False, return_complex=True)
    frames = torch.fft.irfft(spectrum.transpose(1, 2), 1024) * vocoder.window
    state = vocoder.init_state(2)
    parts = [
        vocoder._emit(vocoder._overlap_add(Padded.full(part), state), state) for part in frames.split([1, 2, 9, 8], 1)
    ]
    parts.append(vocoder._last(state, torch.ones(2, dtype=torch.bool)))
    torch.testing.assert_close(Padded.concat(parts).values, wav, atol=1e-6, rtol=0)


@torch.inference_mode()
def test_frames_of_the_wave_are_those_of_the_mel_in_time() -> None:
    """A loud stretch of the mel is heard at its own place, even from untrained weights."""
    vocoder = tiny()
    mel = torch.full((1, 60, 80), MEL_FLOOR)
    mel[:, 20:30] = 0.0
    wav = vocoder(Padded.full(mel)).values[0]
    loud = wav.square().unflatten(0, (60, 256)).mean(1)
    assert loud[18:32].sum() > 0.999 * loud.sum()
    assert abs(int(loud.argmax()) - 25) <= 5


@torch.inference_mode()
def test_untrained_weights_already_make_a_sound_of_the_right_level() -> None:
    """The head begins with the mel's own envelope."""
    vocoder = tiny()
    torch.manual_seed(1)
    level = torch.tensor([[0.01], [0.1]])
    mel = SpeakMel()(level * torch.randn(2, 256 * 40))
    made = vocoder(Padded.full(mel)).values.square().mean(1).sqrt()
    assert 5 < float(made[1] / made[0]) < 20
    assert 0.02 < float(made[1]) < 0.5


@torch.inference_mode()
def test_extreme_mels_stay_finite() -> None:
    vocoder = tiny()
    for value in (-1e4, MEL_FLOOR, 50.0, 1e4):
        wav = vocoder(Padded.full(torch.full((1, 8, 80), value))).values
        assert torch.isfinite(wav).all()


@torch.inference_mode()
def test_bf16_weights_of_the_network_still_give_a_float32_wave() -> None:
    vocoder = tiny()
    mel = Padded.full(torch.randn(1, 12, 80) - 4)
    with torch.autocast("cpu", torch.bfloat16):
        wav = vocoder(mel).values
    assert wav.dtype == torch.float32
    error = (wav - vocoder(mel).values).norm() / vocoder(mel).values.norm()
    assert 0 < float(error) < 0.2


def test_gradients_reach_every_weight() -> None:
    vocoder = tiny().train()
    wav = vocoder(Padded.full(torch.randn(2, 12, 80) - 4)).values
    wav.square().mean().backward()
    for name, parameter in vocoder.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_the_window_power_is_that_of_a_hann_window() -> None:
    vocoder = tiny()
    state = vocoder.init_state(1)
    vocoder._overlap_add(Padded.full(torch.zeros(1, 8, 1024)), state)
    assert math.isclose(float(state.edge_norm[0, 0]), 1.5 - float(vocoder.window[0] ** 2), rel_tol=1e-5)
    assert float(state.edge_norm[0, :384].min()) > 0.7


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("num_mels", 128, "80"), ("width", 0, "width must be positive"), ("lookahead_frames", -1, "-1")],
)
def test_impossible_sizes_are_refused(key: str, value: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(TINY, **{key: value})


def test_rates_are_those_of_the_mel() -> None:
    assert Vocoder.hop == rates.SPEAK_HOP
    assert Vocoder.n_fft == SpeakMel.n_fft
