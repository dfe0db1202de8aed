"""Vocoder training on a corpus of a few synthetic vowels: the loop turns, the GAN starts when told, batches repeat."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from duologue import rates
from duologue.checkpoint import load_component
from duologue.config import load_config
from duologue.decoder.vocoder import Vocoder, VocoderConfig
from duologue.layers import Padded
from duologue.training.discriminators import DiscriminatorConfig, Discriminators, SpectralLoss, discriminator_loss
from duologue.training.loop import LoopConfig, run
from duologue.training.vocoder import VocoderRecipe, VocoderStage


def vowel(f0: float, seconds: float, rate: int) -> NDArray[np.float64]:
    """Harmonics of f0 under two formants, with an onset and a decay."""
    time = np.arange(int(seconds * rate)) / rate
    harmonics = np.arange(1, int(4000 / f0)) * f0
    level = np.exp(-((harmonics - 600) ** 2) / 2e5) + 0.4 * np.exp(-((harmonics - 1800) ** 2) / 3e5)
    wav = (level[:, None] * np.sin(2 * np.pi * harmonics[:, None] * time)).sum(0)
    wav *= np.minimum(time / 0.05, 1) * np.exp(-time)
    return np.asarray(0.5 * wav / np.abs(wav).max())


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Eight clips of 16 kHz: reply voice and users, six for training and two held out."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines, samples, offset = [], [], 0
    for i in range(8):
        wav = (vowel(110.0 + 15 * i, 0.4 + 0.1 * i, 16000) * 32767).astype("<i2")
        role, voice = ("reply", "slt") if i % 2 else ("user", "rms")
        lines.append(
            {
                "id": f"clip-{i}", "text": "ah", "role": role, "voice": voice, "language": "en", "style": "plain",
                "split": "train" if i < 6 else "valid", "intent": "free", "sample_rate": 16000, "offset": offset,
                "num_samples": len(wav),
            }
        )  # fmt: skip
        samples.append(wav)
        offset += len(wav)
    (folder / "clips-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    np.concatenate(samples).tofile(folder / "clips-00000.pcm")
    return folder


def tiny_recipe(corpus: Path, num_steps: int = 4) -> VocoderRecipe:
    return VocoderRecipe(
        corpora=(str(corpus),),
        loop=LoopConfig(
            num_steps=num_steps, learning_rate=2e-3, warmup_steps=2, clip_norm=10.0, precision="fp32", log_every=1
        ),
        vocoder=VocoderConfig(width=16, ffn_dim=32, num_layers=2),
        discriminators=DiscriminatorConfig(
            periods=(2, 3), period_channels=(4, 8), resolutions=(256,), resolution_channels=4
        ),
        batch_size=2,
        crop_frames=8,
        context_frames=8,
        resolutions=(1024, 256),
        mels=(40, 20),
        adversarial_from=0.5,
        adversarial_warmup=0.25,
        adversarial_frames=6,
    )


def test_batches_are_a_function_of_their_index(corpus: Path) -> None:
    stage, again = VocoderStage(tiny_recipe(corpus)), VocoderStage(tiny_recipe(corpus))
    stage.batch(0)
    wav = stage.batch(7)["wav"]
    assert wav.shape == (2, (8 + 8 + stage.tail_frames) * rates.SPEAK_HOP)
    assert wav.dtype == torch.float32
    assert wav.abs().max() <= 0.98
    assert torch.equal(wav, again.batch(7)["wav"])
    assert not torch.equal(wav, stage.batch(8)["wav"])


def test_crops_cover_clips_from_before_their_start_to_after_their_end(corpus: Path) -> None:
    stage = VocoderStage(replace(tiny_recipe(corpus), batch_size=16, context_frames=24))
    wav = torch.cat([stage.batch(i)["wav"] for i in range(8)])
    assert (wav.abs().amax(1) > 0.01).all()
    assert bool((wav[:, :2000] == 0).all(1).any()), "no crop begins in the silence before a clip"
    assert bool((wav[:, -2000:] == 0).all(1).any()), "no crop ends in the silence after a clip"


def test_the_reply_voice_has_its_share(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(tiny_recipe(corpus), reply_share=1.0)
    stage = VocoderStage(recipe)
    everything = {(0, i) for i in range(len(stage.clips[0]))}
    assert {stage.clips[0].records[i].role for _, i in stage.reply} == {"reply"}
    assert {*stage.reply, *stage.others} == everything
    heard: list[int] = []

    def hear(index: int) -> NDArray[np.float32]:
        heard.append(index)
        return np.ones(8000, np.float32)

    monkeypatch.setattr(stage.clips[0], "wav", hear)
    stage.batch(0)
    assert {(0, i) for i in heard} <= {*stage.reply}
    with pytest.raises(ValueError, match="reply_share is 1.5"):
        replace(recipe, reply_share=1.5)


def test_discriminators_start_when_told_and_the_vocoder_is_trained_from_the_first_step(corpus: Path) -> None:
    stage = VocoderStage(tiny_recipe(corpus))
    batch = stage.batch(0)
    assert stage.losses("discriminator", batch, 0.49) == {}
    assert set(stage.losses("generator", batch, 0.49)) == {"mel", "stft"}
    assert set(stage.losses("discriminator", batch, 0.5)) == {"discriminator"}
    assert set(stage.losses("generator", batch, 0.5)) == {"mel", "stft"}
    losses = stage.losses("generator", batch, 0.75)
    assert set(losses) == {"mel", "stft", "adversarial", "feature_matching"} < set(stage.weights)
    torch.stack([*losses.values()]).sum().backward()
    assert all(parameter.grad is None for parameter in stage.discriminators.parameters())
    assert all(parameter.grad is not None for parameter in stage.vocoder.parameters())
    stage.losses("discriminator", batch, 0.75)["discriminator"].backward()
    assert all(parameter.grad is not None for parameter in stage.discriminators.parameters())


def test_every_mel_frame_that_is_compared_is_the_clips_own(corpus: Path) -> None:
    """What the crop's end does to the mel must not reach the samples compared."""
    stage = VocoderStage(tiny_recipe(corpus))
    wav = torch.randn(1, (8 + 8 + stage.tail_frames + 8) * rates.SPEAK_HOP) * 0.1
    end = (8 + 8) * rates.SPEAK_HOP
    with torch.no_grad():
        whole, cut = stage._resynthesize(wav), stage._resynthesize(wav[:, : -8 * rates.SPEAK_HOP])
    assert torch.allclose(whole[:, :end], cut[:, :end], atol=1e-5)
    assert not torch.allclose(whole[:, : cut.shape[1]], cut, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_trains_evaluates_samples_and_saves(corpus: Path, tmp_path: Path, precision: str) -> None:
    recipe = tiny_recipe(corpus)
    recipe = replace(recipe, loop=replace(recipe.loop, precision=precision))  # type: ignore[arg-type]
    stage = VocoderStage(recipe)
    before = copy.deepcopy(stage.discriminators.state_dict())
    metrics = run(stage, recipe.loop, tmp_path / "run")
    assert set(metrics) == {"mel_l1", "mel_l1_reply"}
    assert any(not torch.equal(value, before[name]) for name, value in stage.discriminators.state_dict().items())
    loaded = load_component(tmp_path / "run" / "final" / "vocoder", Vocoder, VocoderConfig)
    mel = Padded.full(torch.full((1, 5, 80), -4.0))
    with torch.no_grad():
        assert torch.equal(loaded(mel).values, stage.vocoder.eval()(mel).values)
    made = {path.name for path in (tmp_path / "run").glob("samples/step-0000004/*")}
    assert made == {
        f"{clip}{end}"
        for clip in ("reply-clip-7", "user-clip-6")
        for end in ("-reference.wav", "-resynthesis.wav", ".png")
    }


def test_resuming_before_the_discriminators_start_equals_an_uninterrupted_run(corpus: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(corpus)
    first, second = VocoderStage(recipe), VocoderStage(recipe)
    run(first, recipe.loop, tmp_path / "whole")

    # Stopped by a broken batch after the first step, with a checkpoint after every step.
    loop = replace(recipe.loop, checkpoint_every_s=0.0)
    batch = second.batch
    second.batch = lambda index: {"wav": batch(index)["wav"] * (torch.nan if index == 1 else 1)}  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="step 2"):
        run(second, loop, tmp_path / "parts")
    third = VocoderStage(recipe)
    run(third, loop, tmp_path / "parts")
    for name, value in first.vocoder.state_dict().items():
        assert torch.equal(value, third.vocoder.state_dict()[name]), name
    for name, value in first.discriminators.state_dict().items():
        assert torch.equal(value, third.discriminators.state_dict()[name]), name


@pytest.mark.slow
def test_the_spectral_losses_teach_the_vocoder_one_vowel(corpus: Path, tmp_path: Path) -> None:
    recipe = replace(tiny_recipe(corpus, 120), adversarial_from=1.0)
    stage = VocoderStage(recipe)
    batch = {"wav": torch.cat([stage.batch(1000 + i)["wav"] for i in range(8)])}
    before = stage.losses("generator", batch, 0.0)
    run(stage, recipe.loop, tmp_path / "run")
    after = stage.losses("generator", batch, 0.0)
    assert float(after["mel"]) < 0.7 * float(before["mel"])
    assert float(after["stft"]) < 0.95 * float(before["stft"])


def test_the_spectral_distance_is_zero_for_the_same_wave_and_sees_what_speech_mels_do_not() -> None:
    loss = SpectralLoss((1024, 256), (80, 20))
    wav = torch.randn(2, 4096) * 0.05
    same = loss(wav, wav)
    assert float(same.mel) == 0
    assert float(same.stft) == 0
    hiss = 0.05 * torch.sin(2 * torch.pi * 10000 / rates.SPEAK_SAMPLE_RATE * torch.arange(4096))
    assert float(loss(hiss.expand(2, -1), torch.zeros(2, 4096)).mel) > 0.1


def test_discriminators_learn_to_tell_noise_from_a_tone() -> None:
    torch.manual_seed(0)
    discriminators = Discriminators(
        DiscriminatorConfig(periods=(2,), period_channels=(4, 8), resolutions=(256,), resolution_channels=4)
    )
    optimizer = torch.optim.AdamW(discriminators.parameters(), lr=5e-3)
    tone = 0.3 * torch.sin(0.05 * torch.arange(4096) + 6 * torch.rand(4, 1))
    values = []
    for _ in range(40):
        loss = discriminator_loss(discriminators(tone), discriminators(0.2 * torch.randn(4, 4096)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss))
    assert values[-1] < 0.25 < values[0]


def test_the_pocket_recipe_is_one() -> None:
    recipe = load_config(Path(__file__).parents[1] / "recipes" / "pocket" / "vocoder.yaml", VocoderRecipe)
    assert 0 < recipe.adversarial_from + recipe.adversarial_warmup < 1
    parameters = sum(parameter.numel() for parameter in Vocoder(recipe.vocoder).parameters())
    assert 1.5e6 < parameters < 2.1e6
