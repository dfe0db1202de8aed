"""The released decoder: sizes, rows of unequal lengths, streaming without seams, endings."""

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from duologue import rates
from duologue.config import read_json
from duologue.layers import Padded
from duologue.released.decoder import flow as released_flow
from duologue.released.decoder.blocks import OFFLINE, Streaming
from duologue.released.decoder.decoder import ReleasedDecoder
from duologue.released.decoder.flow import ReleasedFlow, ReleasedFlowConfig
from duologue.released.decoder.hift import HiFT, HiFTConfig
from duologue.released.decoder.regulator import LengthRegulator, RaggedGroupNorm, nearest_token
from tests.released_sizes import VOCAB, formula, small_decoder, small_tokens
from tests.released_stream import init_released, released_noise, step_released

# The blocks of the released code, each with all that was given out before it.
GROWING = Streaming(block_tokens=(25, 50, 100, 150, 200), overlap_frames=34, window_frames=None)
SHARED = Path(os.environ.get("DUOLOGUE_PARITY") or Path(__file__).parents[2] / "shared" / "parity").parent
KEYS = SHARED / "spec" / "decoder_keys.json"
SHORT = Streaming(block_tokens=(6, 10, 20), overlap_frames=12, window_frames=None)


def test_published_sizes_have_the_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        flow, network = ReleasedFlow(ReleasedFlowConfig()), HiFT(HiFTConfig())
    assert sum(parameter.numel() for parameter in flow.parameters()) == 111_166_208
    assert sum(parameter.numel() for parameter in network.parameters()) == 20_460_591
    assert len(flow.state_dict()) == 1185
    assert len(network.state_dict()) == 227


@pytest.mark.skipif(not KEYS.is_file(), reason="no decoder_keys.json")
def test_published_keys_and_shapes() -> None:
    keys = read_json(KEYS)
    with torch.device("meta"):
        flow, network = ReleasedFlow(ReleasedFlowConfig()), HiFT(HiFTConfig())
    for module, name in ((flow, "flow"), (network, "hift")):
        assert {key: list(tensor.shape) for key, tensor in module.state_dict().items()} == keys[name]


def test_nearest_token_is_torchs_interpolation() -> None:
    for num_tokens in [*range(1, 300), 2240, 3392]:
        num_frames = rates.frames_for_tokens(num_tokens)
        index = nearest_token(torch.tensor([num_tokens]), torch.tensor([num_frames]))
        line = torch.arange(num_tokens, dtype=torch.float32)[None, None]
        assert torch.equal(index[0].float(), functional.interpolate(line, size=num_frames, mode="nearest")[0, 0])


def test_group_norm_counts_real_frames_only() -> None:
    norm = RaggedGroupNorm(2, 8)
    norm.weight.data, norm.bias.data = formula(torch.Size([8]), 1), formula(torch.Size([8]), 2)
    rows = [3 + formula(torch.Size([8, length]), length) for length in (9, 4, 1)]
    batch = torch.full((3, 8, 9), 50.0)
    for i, row in enumerate(rows):
        batch[i, :, : row.shape[1]] = row
    mask = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    out = norm(batch, mask[:, None])
    for i, row in enumerate(rows):
        torch.testing.assert_close(out[i, :, : row.shape[1]], norm(row[None])[0], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_mels_of_a_ragged_batch_equal_single_runs() -> None:
    flow = small_decoder().flow
    rows = [small_tokens(length, salt) for salt, length in enumerate((31, 7, 1, 22))]
    speaker = formula(torch.Size([4, flow.config.spk_embed_dim]), 5)
    prompts = [formula(torch.Size([length, 80]), 9 + length) for length in (13, 0, 0, 6)]
    state = flow.init_state(4, speaker=speaker, streaming=OFFLINE)
    first = [row[: len(row) // 3] if len(mel) else row[:0] for row, mel in zip(rows, prompts, strict=True)]
    rest = [row[len(head) :] for row, head in zip(rows, first, strict=True)]
    flow.give_prompt(Padded.stack(first), Padded.stack(prompts), state)
    together = flow(Padded.stack(rest), state)
    for i in range(4):
        alone = flow.init_state(1, speaker=speaker[i : i + 1], streaming=OFFLINE)
        flow.give_prompt(Padded.full(first[i][None]), Padded.full(prompts[i][None]), alone)
        mel = flow(Padded.full(rest[i][None]), alone).rows()[0]
        assert len(mel) == rates.frames_for_tokens(len(rows[i])) - len(prompts[i])
        torch.testing.assert_close(together.rows()[i], mel, atol=1e-4, rtol=0)
    assert together.lengths.unique().numel() > 2


@torch.inference_mode()
def test_waves_of_a_ragged_batch_equal_single_runs() -> None:
    """In float64: a phase that runs for seconds shows the last digit of the pitch."""
    vocoder = small_decoder().vocoder.double()
    rows = [2 * formula(torch.Size([length, 80]), length).double() - 3 for length in (40, 1, 23)]
    together = vocoder(Padded.stack(rows))
    for row, wav in zip(rows, together.rows(), strict=True):
        assert len(wav) == 256 * len(row)
        torch.testing.assert_close(wav, vocoder(Padded.full(row[None])).values[0], atol=1e-9, rtol=0)
    assert together.values.std() > 0.01


@torch.inference_mode()
def test_the_wave_depends_on_no_frame_beyond_the_reach() -> None:
    network = small_decoder().vocoder.network.double()
    reach, hop, middle = network.config.reach, network.config.hop_length, 30
    assert (network.config.reach, network.config.pitch_reach) == (14, 5)
    mel = formula(torch.Size([1, 60, 80]), 3).double()
    source = formula(torch.Size([1, 60 * hop]), 4).double()
    moved_mel, moved_source = mel.clone(), source.clone()
    moved_mel[:, middle] += 5
    moved_source[:, middle * hop : (middle + 1) * hop] *= -1
    before, after = (network.wave(Padded.full(m), s)[0] for m, s in ((mel, source), (moved_mel, moved_source)))
    changed = ((before - after).abs() > 1e-12).nonzero()[:, 0] // hop
    assert middle - reach <= int(changed.min()) <= middle - reach + 3  # not beyond, and no frame held back for nothing
    assert middle + reach - 3 <= int(changed.max()) <= middle + reach
    pitch, moved = (network.pitch(Padded.full(m))[0] for m in (mel, moved_mel))
    changed = (pitch != moved).nonzero()[:, 0]
    assert (int(changed.min()), int(changed.max())) == (middle - 5, middle + 5)


def stream(decoder: ReleasedDecoder, tokens: Tensor, chunk: int, streaming: Streaming) -> Tensor:
    """(N,) tokens in chunks -> wav (S,)."""
    state = decoder.init_state(1, num_steps=2, streaming=streaming)
    parts = [decoder.step(Padded.full(piece[None]), state) for piece in tokens.split(chunk)]
    return Padded.concat([*parts, decoder.flush(state)]).rows()[0]


def counting_flow(monkeypatch: pytest.MonkeyPatch, streaming: Streaming) -> ReleasedFlow:
    """A flow whose mel says which frame it is: the noise is the frame's absolute index, and the solver leaves it."""

    def index_of(seed: Tensor, frame: Tensor, num_mels: int) -> Tensor:
        return frame[:, :, None].expand(-1, -1, num_mels).double()

    def regulate(_: LengthRegulator, encoded: Padded, lengths: Tensor) -> Padded:
        return Padded(torch.zeros(len(lengths), int(lengths.max()), 80, dtype=torch.float64), lengths)

    flow = small_decoder(streaming).flow.double()
    monkeypatch.setattr(released_flow, "noise_at", index_of)
    monkeypatch.setattr(LengthRegulator, "forward", regulate)
    monkeypatch.setattr(flow, "solve", lambda mu, speaker, prompt, noise, num_steps, guidance_scale: noise)
    return flow


@pytest.mark.parametrize("chunk", [1, 64, 5000])
@pytest.mark.parametrize(
    "streaming",
    [
        SHORT,
        GROWING,
        OFFLINE,
        Streaming((1,), 34, None),
        Streaming((90,), 5, None, 640),
        Streaming((90,), 5, 51, 640),
        Streaming((10, 20, 30), 6, 100),
        Streaming((10,), 0, 0),
        Streaming(),
    ],
    ids=["short", "growing", "offline", "one", "forgetful", "forgetful-window", "window", "no-window", "as-fed"],
)
def test_every_frame_comes_once_and_fades_sum_to_one(
    monkeypatch: pytest.MonkeyPatch, streaming: Streaming, chunk: int
) -> None:
    flow = counting_flow(monkeypatch, streaming)
    num_tokens = 1700 if streaming.context_tokens == 640 and chunk > 1 else 130
    state = flow.init_state(2)
    lengths = torch.tensor([num_tokens, num_tokens // 3])
    parts = []
    for start in range(0, num_tokens, chunk):
        now = (lengths - start).clamp(0, chunk)
        parts.append(flow.step(Padded(torch.zeros(2, int(now.max()), dtype=torch.int64), now), state))
    if streaming.context_tokens is not None:
        # A block just decoded may have brought what is forgotten next, never more.
        largest = max((*(streaming.block_tokens or (200,)), 0))
        assert int((state.encoded.lengths + state.open.lengths).max()) <= max(streaming.context_tokens, largest)
        assert state.encoder.layers[0].keys.shape[1] <= streaming.context_tokens
    if streaming.window_frames is not None:
        assert int(state.mel.lengths.max()) <= streaming.window_frames + 1
    parts.append(flow.flush(state))
    for row, length in zip(Padded.concat(parts).rows(), lengths.tolist(), strict=True):
        expected = torch.arange(rates.frames_for_tokens(length), dtype=torch.float64)
        torch.testing.assert_close(row, expected[:, None].expand(-1, 80), atol=1e-9, rtol=0)


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 6, 7, 16, 17])
def test_any_ending_gives_all_frames(num_tokens: int) -> None:
    """Also an end right after a block, where the released code has nothing left to finalise."""
    decoder = small_decoder(SHORT).double()  # in float32 the width of a cache shows in the voice's phase
    state = decoder.init_state(1, num_steps=2)
    tokens = small_tokens(num_tokens)
    parts = [decoder.step(Padded.full(token[None]), state) for token in tokens.split(1)]
    parts.append(decoder.flush(state))
    assert sum(int(part.lengths) for part in parts) == rates.speak_samples_for_tokens(num_tokens)
    assert int(decoder.flush(state).lengths) == 0  # and nothing is left behind
    fresh = decoder.init_state(1, num_steps=2)
    again, first = (decoder(Padded.full(small_tokens(8)[None]), each).values for each in (state, fresh))
    torch.testing.assert_close(again, first, atol=1e-9, rtol=0)


@torch.inference_mode()
def test_streams_do_not_depend_on_how_tokens_arrive() -> None:
    decoder, tokens = small_decoder().double(), small_tokens(40)
    whole = stream(decoder, tokens, 40, SHORT)
    for chunk in (1, 13):
        torch.testing.assert_close(stream(decoder, tokens, chunk, SHORT), whole, atol=1e-9, rtol=0)


def steps(x: Tensor) -> Tensor:
    """Largest change from one frame to the next: (T, M) -> (T - 1,), entry i - 1 is the step into frame i."""
    return x.diff(dim=0).abs().amax(1)


@pytest.mark.parametrize("overlap_frames", [0, 12, 34])
def test_no_seam_in_the_mel_beyond_what_the_offline_mel_has_there(
    monkeypatch: pytest.MonkeyPatch, overlap_frames: int
) -> None:
    """Blocks that disagree by 1 about a smooth mel: the step at an edge is the offline step there and the disagreement
    spread over the overlap. Without overlap the measure sees the whole of it."""
    flow = counting_flow(monkeypatch, Streaming((8, 10, 20), overlap_frames, None))
    calls: list[int] = []

    def solve(mu: Padded, speaker: Tensor, prompt: Padded, noise: Tensor, *settings: float) -> Tensor:
        calls.append(len(calls))
        return (noise / 30).sin() + calls[-1] % 2

    monkeypatch.setattr(flow, "solve", solve)
    state = flow.init_state(1)
    tokens = torch.zeros(80, dtype=torch.int64)
    parts = [flow.step(Padded.full(token[None]), state) for token in tokens.split(1)]
    mel = Padded.concat([*parts, flow.flush(state)]).rows()[0]
    offline = (torch.arange(len(mel), dtype=torch.float64) / 30).sin()[:, None].expand(-1, 80)
    assert len(mel) == rates.frames_for_tokens(80)
    assert len(calls) == 6  # 8, 10, 20, 20, 20, and 2 at the end
    beyond = steps(mel) - steps(offline)
    if overlap_frames:
        assert float(beyond.max()) <= 1 / (overlap_frames + 1) + 1e-6
        assert float(beyond.max()) > 0.5 / (overlap_frames + 1)
    else:
        assert float(beyond.max()) > 0.9


@torch.inference_mode()
def test_the_wave_of_a_stream_is_that_of_its_mel_in_one_piece() -> None:
    """The vocoder has no seams at all: its phase is carried, and what it looks ahead at is waited for."""
    decoder, tokens = small_decoder().double(), small_tokens(40)
    state = decoder.flow.init_state(1, num_steps=2, streaming=SHORT)
    parts = [decoder.flow.step(Padded.full(token[None]), state) for token in tokens.split(3)]
    mel = Padded.concat([*parts, decoder.flow.flush(state)])
    whole = decoder.vocoder(mel).values[0]
    torch.testing.assert_close(stream(decoder, tokens, 3, SHORT), whole, atol=1e-9, rtol=0)
    # Blocks spoken each for itself, as the released code does, do have seams: the measure sees them.
    apart = torch.cat([decoder.vocoder(Padded.full(part.values)).values[0] for part in parts if int(part.lengths)])
    assert float((apart - whole[: len(apart)]).abs().max()) > 0.01
    voiced = decoder.vocoder.network.pitch(mel) > decoder.vocoder.network.config.nsf_voiced_threshold
    assert voiced.double().mean() > 0.5  # or the phase would not have been tried


@torch.inference_mode()
def test_the_vocoder_looks_ahead_as_far_as_it_says_and_computes_no_past_beyond_its_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """19 frames ahead, 14 for the wave and 5 for the pitch; as many of the past again, however long the stream."""
    vocoder = small_decoder().vocoder
    network, waves, pitches = vocoder.network, [], []
    wave, pitch = network.wave, network.pitch

    def spied_wave(mel: Padded, source: Tensor) -> Tensor:
        waves.append(mel.values.shape[1])
        return wave(mel, source)

    def spied_pitch(mel: Padded) -> Tensor:
        pitches.append(mel.values.shape[1])
        return pitch(mel)

    monkeypatch.setattr(network, "wave", spied_wave)
    monkeypatch.setattr(network, "pitch", spied_pitch)
    state = vocoder.init_state(1)
    given = spoken = 0
    assert vocoder.lookahead_frames == 19
    for size in (7, 60, 1, 69, 172, 13):
        waves.clear()
        pitches.clear()
        spoken += int(vocoder.step(Padded.full(formula(torch.Size([1, size, 80]), size)), state).lengths)
        given += size
        assert spoken == 256 * max(given - 19, 0)
        assert all(frames <= size + 2 * 14 for frames in waves)
        assert all(frames <= size + 2 * 5 for frames in pitches)
        assert len(waves) <= 1 >= len(pitches)
        assert state.voiced.values.shape[1] <= 2 * 14
        assert state.mel.values.shape[1] <= 2 * 5
    assert waves == [13 + 2 * 14]
    spoken += int(vocoder.flush(state).lengths)
    assert spoken == 256 * given


@torch.inference_mode()
def test_the_released_mode_loses_a_frame_a_cut() -> None:
    """What the default mode mends, kept as it was."""
    decoder = small_decoder()
    flow, network, tokens = decoder.flow, decoder.vocoder.network, small_tokens(60)
    state = init_released(flow)
    pieces = tokens.split(15)
    blocks = [
        step_released(flow, network, piece[None], state, last=i == len(pieces) - 1) for i, piece in enumerate(pieces)
    ]
    num_frames = rates.frames_for_tokens(60)
    assert sum(block.wav.shape[1] for block in blocks) == 256 * (num_frames - (len(pieces) - 2))
    assert torch.equal(blocks[1].mel[:, 0], blocks[0].mel[:, -1])  # the doubled frame
    assert stream(decoder, tokens, 15, Streaming((15,), 34, None)).shape[0] == 256 * num_frames


@pytest.mark.parametrize("run", ["default", "released"])
def test_no_generator_of_the_process_is_touched(run: str) -> None:
    decoder, tokens = small_decoder(), small_tokens(8)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    if run == "default":
        stream(decoder, tokens, 8, SHORT)
    else:
        state = init_released(decoder.flow)
        step_released(decoder.flow, decoder.vocoder.network, tokens[None], state, last=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_released_noise_is_that_of_the_seeded_process() -> None:
    noise = released_noise(11)
    with torch.random.fork_rng():
        torch.manual_seed(42)
        assert torch.equal(noise, torch.randn(1, 80, 11).transpose(1, 2))


@torch.inference_mode()
def test_seeds_and_speakers_belong_to_rows() -> None:
    decoder, tokens = small_decoder().double(), small_tokens(5)
    x = Padded.full(torch.stack([tokens, tokens, tokens]))
    state = decoder.init_state(3, num_steps=2)
    state.flow.seed = torch.tensor([0, 1, 0])
    state.flow.speaker = torch.stack([0 * torch.ones(12), 0 * torch.ones(12), formula(torch.Size([12]), 1)]).double()
    copied = copy.deepcopy(state)
    wav = decoder(x, state).values
    assert not torch.equal(wav[0], wav[1])
    assert not torch.equal(wav[0], wav[2])
    alone = decoder.init_state(1, num_steps=2)
    torch.testing.assert_close(decoder(Padded.full(tokens[None]), alone).values[0], wav[0], atol=1e-9, rtol=0)
    torch.testing.assert_close(decoder(x, copied).values, wav, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda decoder: decoder(Padded.full(torch.tensor([[1, VOCAB]]))), f"speech token {VOCAB} is outside of 0..31"),
        (lambda decoder: decoder(Padded.full(torch.tensor([[-1]]))), "speech token -1"),
        (lambda decoder: decoder.init_state(1, num_steps=0), "num_steps must be at least 1"),
        (lambda decoder: decoder.init_state(1, guidance_scale=-0.1), "guidance_scale not negative"),
        (lambda decoder: Streaming(block_tokens=(25, 0)), "block_tokens must be positive"),
        (lambda decoder: Streaming(context_tokens=100), "context_tokens must be at least 640"),
        (lambda decoder: Streaming(window_frames=-1), "window_frames must not be negative, got -1"),
        (lambda decoder: Streaming(None, 34, 7000), "window_frames is 7000; context_tokens 1280 .* leave 6581"),
    ],
)
def test_wrong_calls_say_what_is_wrong(call: Callable[[ReleasedDecoder], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(small_decoder())


@torch.inference_mode()
def test_fused_weights_give_the_same_wave() -> None:
    network = small_decoder().vocoder.network
    mel = Padded.full(formula(torch.Size([1, 12, 80]), 2))
    source = formula(torch.Size([1, 12 * 256]), 3)
    before = network.wave(mel, source)
    assert torch.equal(network.fuse().wave(mel, source), before)
    assert math.isfinite(float(before.abs().max()))
