"""The flow decoder: absolute-index arithmetic, noise, solver, and streaming that equals the offline pass."""

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from duologue import rates
from duologue.config import parse_config, to_mapping
from duologue.decoder.decoder import SpeechDecoder
from duologue.decoder.encoder import (
    TokenEncoderConfig,
    block_of_frame,
    frames_for_tokens,
    phase_of_frame,
    token_of_frame,
)
from duologue.decoder.flow import (
    Flow,
    FlowConfig,
    FlowState,
    cosine_times,
    guide,
    max_state_bytes,
    noise_at,
    solve_euler,
    state_bytes,
)
from duologue.decoder.transformer import BLOCK_FRAMES, EstimatorConfig
from duologue.decoder.vocoder import Vocoder, VocoderConfig
from duologue.layers import Padded

TOLERANCE = 1e-4
CODES = 50
TINY = FlowConfig(
    encoder=TokenEncoderConfig(codebook_size=CODES, width=16, num_heads=2, ffn_dim=24, num_layers=2, past_blocks=1),
    estimator=EstimatorConfig(
        width=16, num_heads=2, ffn_dim=24, num_layers=2, kernel_size=3, past_blocks=1, time_dim=8
    ),
    condition_dim=80,
    speaker_dim=4,
    num_steps=2,
)


def randomised(module: nn.Module, seed: int = 0) -> None:
    """Every weight counts, those that start as zeros too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.3 if parameter.dim() < 2 else 0.8 / parameter[0].numel() ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def tiny_flow(config: FlowConfig = TINY) -> Flow:
    flow = Flow(config).eval()
    randomised(flow)
    return flow


def unbounded() -> FlowConfig:
    return dataclasses.replace(
        TINY,
        encoder=dataclasses.replace(TINY.encoder, past_blocks=None),
        estimator=dataclasses.replace(TINY.estimator, past_blocks=None),
    )


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


def some_tokens(lengths: Sequence[int], seed: int = 1) -> Padded:
    generator = torch.Generator().manual_seed(seed)
    return Padded.stack([torch.randint(0, CODES, (length,), generator=generator) for length in lengths])


def chunk(tokens: Padded, start: Sequence[int], size: Sequence[int]) -> Padded:
    rows = [row[a : a + n] for row, a, n in zip(tokens.rows(), start, size, strict=True)]
    return Padded.stack(rows)


def fold(flow: Flow, tokens: Padded, chunks: Sequence[Sequence[int]], state: FlowState | None = None) -> list[Tensor]:
    """Feeds rows in chunks[step][row] tokens, then flushes."""
    state = flow.init_state(len(tokens.lengths)) if state is None else state
    start = [0] * len(tokens.lengths)
    parts = []
    for sizes in chunks:
        parts.append(flow.step(chunk(tokens, start, sizes), state))
        start = [a + n for a, n in zip(start, sizes, strict=True)]
    assert all(a >= n for a, n in zip(start, tokens.lengths.tolist(), strict=True))
    parts.append(flow.flush(state))
    return Padded.concat(parts).rows()


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (not a.numel() or float((a - b).abs().max()) < TOLERANCE)


def test_index_arithmetic_is_that_of_rates() -> None:
    frame = torch.arange(30_000)
    tokens = torch.arange(4_500)
    assert frames_for_tokens(tokens).tolist() == [rates.frames_for_tokens(n) for n in range(4_500)]
    assert token_of_frame(frame).tolist() == [rates.token_of_frame(i) for i in range(30_000)]
    assert torch.equal(token_of_frame(frame) * 441 + phase_of_frame(frame), frame * 64)
    for block in range(400):
        first, end = rates.frames_for_tokens(10 * block), rates.frames_for_tokens(10 * block + 10)
        assert end - first in (68, 69)
        assert (block_of_frame(frame[first:end]) == block).all()
        assert 10 * block - 1 <= int(token_of_frame(frame[first])) <= 10 * block
        assert int(token_of_frame(frame[end - 1])) == 10 * block + 9


def test_noise_is_normal_and_depends_on_seed_and_place_only() -> None:
    seed, frame = torch.tensor([0, 0, 7, 2**40]), torch.arange(1000).expand(4, -1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    noise = noise_at(seed, frame, 80)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(noise[0], noise[1])
    assert torch.equal(noise_at(seed[2:3], frame[:1, 500:503], 80)[0], noise[2, 500:503])
    flat = noise[0].flatten()
    assert abs(float(flat.mean())) < 0.01
    assert abs(float(flat.std()) - 1) < 0.01
    assert abs(float((flat**4).mean()) - 3) < 0.15
    for one, other in (
        (noise[0], noise[2]),
        (noise[0, 1:], noise[0, :-1]),
        (noise[0, :, 1:], noise[0, :, :-1]),
        (noise[0].abs(), noise[2].abs()),
    ):
        assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.02


def test_straight_lines_are_followed_exactly() -> None:
    x0, x1 = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    calls: list[int] = []

    def velocity(k: int, t: float, x: Tensor) -> Tensor:
        assert torch.allclose(x, torch.lerp(x0, x1, t), atol=1e-5)
        calls.append(k)
        return x1 - x0

    assert torch.allclose(solve_euler(velocity, x0, cosine_times(6)), x1, atol=1e-5)
    assert calls == list(range(6))


def test_euler_converges_with_the_first_order() -> None:
    """dx/dt = 3 x cos 3 t from 1: x = exp(sin 3 t). Half the step, half of the error."""
    x0 = torch.ones(1, dtype=torch.float64)
    errors = []
    for num_steps in (64, 128):
        x1 = solve_euler(lambda k, t, x: 3 * x * math.cos(3 * t), x0, cosine_times(num_steps))
        errors.append(abs(float(x1) - math.exp(math.sin(3.0))))
    assert 1.6 < errors[0] / errors[1] < 2.6


def test_the_times_are_those_of_the_released_cosine() -> None:
    times = cosine_times(7)
    assert times == pytest.approx([1 - math.cos(math.pi / 2 * k / 7) for k in range(8)], abs=1e-12)
    assert (times[0], times[-1]) == (0.0, 1.0)
    assert all(a < b for a, b in pairwise(times))


def test_folders_with_the_keys_of_removed_solvers_are_read() -> None:
    old = {**to_mapping(TINY), "solver": "euler", "sway": -1.0}
    assert parse_config(FlowConfig, old) == TINY
    with pytest.raises(ValueError, match="solver in x is 'midpoint'; only 'euler' is still supported"):
        parse_config(FlowConfig, {**old, "solver": "midpoint"}, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
    ],
)
def test_impossible_solvers_are_refused(change: dict[str, Any], message: str) -> None:
    flow = tiny_flow()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
    with pytest.raises(ValueError, match=message):
        flow.init_state(1, **change)
    with pytest.raises(ValueError, match="guidance_scale must not be negative, got -1"):
        flow.init_state(1, guidance_scale=-1)


def test_guidance_extrapolates() -> None:
    x0, x1 = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    assert torch.allclose(guide(torch.stack([x1, x0], 2), 0.7), 1.7 * x1 - 0.7 * x0)
    assert torch.equal(guide(x1[:, :, None], 0.0), x1)


def test_other_settings_stream_exactly_and_rows_equal_solo_runs() -> None:
    flow = tiny_flow()
    tokens = some_tokens([43, 12, 30])
    state = flow.init_state(3, num_steps=5, guidance_scale=0.4)
    streamed = fold(flow, tokens, [[7, 0, 30], [0, 5, 0], [21, 7, 0], [15, 0, 0]], state)
    for row, ours in zip(tokens.rows(), streamed, strict=True):
        alone = flow.init_state(1, num_steps=5, guidance_scale=0.4)
        assert close(ours, flow(Padded.full(row[None]), alone).rows()[0])
    again = fold(flow, tokens, [[43, 12, 30]], state)  # rows that were flushed keep their settings
    assert all(close(a, b) for a, b in zip(again, streamed, strict=True))
    other = flow(tokens, flow.init_state(3, num_steps=3)).rows()
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in zip(other, streamed, strict=True))
    configured = Flow(dataclasses.replace(TINY, num_steps=5, guidance_scale=0.4)).eval()
    configured.load_state_dict(flow.state_dict())
    assert all(close(a, b) for a, b in zip(configured(tokens).rows(), streamed, strict=True))


@pytest.mark.parametrize("past", ["bounded", "unbounded"])
@settings(max_examples=8)
@given(data=st.data())
def test_every_chunking_equals_forward_and_rows_equal_solo_runs(past: str, data: st.DataObject) -> None:
    flow = tiny_flow(TINY if past == "bounded" else unbounded())
    lengths = data.draw(st.lists(st.integers(0, 47), min_size=1, max_size=3))
    tokens = some_tokens(lengths)
    left, chunks = list(lengths), []
    while any(left):
        sizes = [data.draw(st.integers(0, min(n, 25))) for n in left]
        chunks.append(sizes)
        left = [n - size for n, size in zip(left, sizes, strict=True)]
    streamed = fold(flow, tokens, chunks)
    together = flow(tokens).rows()
    for row, length, ours, offline in zip(tokens.rows(), lengths, streamed, together, strict=True):
        alone = flow(Padded.full(row[None])).rows()[0]
        assert len(ours) == rates.frames_for_tokens(length)
        assert close(ours, alone)
        assert close(offline, alone)


def test_utterances_longer_than_one_call_stream_exactly() -> None:
    flow = tiny_flow()
    tokens = some_tokens([203, 95])
    chunks = [[10, 0], [30, 10], [0, 5], [100, 80], [63, 0]]
    for ours, offline in zip(fold(flow, tokens, chunks), flow(tokens).rows(), strict=True):
        assert close(ours, offline)


def test_future_never_changes_the_past() -> None:
    flow = tiny_flow()
    tokens = some_tokens([40])
    changed = tokens.values.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % CODES
    before, after = flow(tokens).values, flow(Padded.full(changed)).values
    edge = rates.frames_for_tokens(20)
    assert close(before[:, :edge], after[:, :edge])
    assert float((before[:, edge:] - after[:, edge:]).abs().max()) > 0.01


def test_window_of_past_blocks_is_used_and_bounded() -> None:
    flow = tiny_flow()
    tokens = some_tokens([60])
    changed = tokens.values.clone()
    changed[:, :10] = (changed[:, :10] + 1) % CODES
    difference = (flow(tokens).values - flow(Padded.full(changed)).values).abs().amax((0, 2))
    first = [rates.frames_for_tokens(10 * block) for block in range(7)]
    assert float(difference[first[1] : first[2]].max()) > 1e-3  # the block after sees it
    # Two encoder and two estimator layers with one past block each reach four blocks on, the convolutions a frame each.
    assert float(difference[first[5] + 1 :].max()) < TOLERANCE


def test_copied_state_resumes_identically_and_sessions_do_not_touch() -> None:
    flow = tiny_flow()
    tokens = some_tokens([34, 34])
    state = flow.init_state(2)
    flow.step(chunk(tokens, [0, 0], [17, 23]), state)
    fork = copy.deepcopy(state)
    other = flow.init_state(2, seed=5)
    one = flow.step(chunk(tokens, [17, 23], [17, 11]), state)
    flow.step(some_tokens([30, 30], seed=9), other)
    two = flow.step(chunk(tokens, [17, 23], [17, 11]), fork)
    for a, b in zip(one.rows(), two.rows(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(flow.flush(state).rows(), flow.flush(fork).rows(), strict=True):
        assert torch.equal(a, b)


def test_flushed_row_starts_anew_beside_a_running_one() -> None:
    flow = tiny_flow()
    first, second, running = some_tokens([13], 1), some_tokens([27], 2), some_tokens([44], 3)
    state = flow.init_state(2)
    rows = torch.tensor([True, False])
    parts = [flow.step(Padded.stack([first.values[0], running.values[0, :19]]), state), flow.flush(state, rows)]
    ended = Padded.concat(parts).rows()
    parts = [flow.step(Padded.stack([second.values[0], running.values[0, 19:]]), state), flow.flush(state)]
    after = Padded.concat(parts).rows()
    assert close(ended[0], flow(first).values[0])
    assert close(after[0], flow(second).values[0])
    assert close(torch.cat([ended[1], after[1]]), flow(running).values[0])


def test_settings_of_a_state_count() -> None:
    flow = tiny_flow()
    tokens = some_tokens([15])
    plain = flow(tokens).values
    assert close(flow(tokens, flow.init_state(1, num_steps=2, guidance_scale=0.7)).values, plain)
    other = [
        flow.init_state(1, num_steps=5),
        flow.init_state(1, guidance_scale=0.0),
        flow.init_state(1, seed=1),
        flow.init_state(1, speaker=torch.ones(1, 4)),
    ]
    for state in other:
        assert float((flow(tokens, state).values - plain).abs().max()) > 0.01
    assert other[1].solver[0].convolution[0].shape[2] == 1  # no unconditional branch
    state = flow.init_state(2)
    state.seed = torch.tensor([1, 0])
    rows = flow(Padded.full(tokens.values.expand(2, -1)), state).rows()
    assert close(rows[0], flow(tokens, flow.init_state(1, seed=1)).values[0])
    assert close(rows[1], plain[0])


@pytest.mark.parametrize("num_prompt", [7, 10, 26])
def test_prompt_is_seen_and_left_out(num_prompt: int) -> None:
    flow = tiny_flow()
    tokens = some_tokens([38, 38])
    num_frames = rates.frames_for_tokens(num_prompt)
    mel = torch.randn(2, num_frames, 80, generator=torch.Generator().manual_seed(4))
    # Row 0 has a prompt, row 1 has none; both go on with what is left of the same tokens.
    prompt = Padded(tokens.values[:, :num_prompt], torch.tensor([num_prompt, 0]))
    rest = Padded.stack([tokens.values[0, num_prompt:], tokens.values[1]])
    results = []
    for chunks in ([[38 - num_prompt, 38]], [[4, 0], [38 - num_prompt - 4, 13], [0, 25]]):
        state = flow.init_state(2)
        flow.give_prompt(prompt, Padded(mel, torch.tensor([num_frames, 0])), state)
        results.append(fold(flow, rest, chunks, state))
    for a, b in zip(*results, strict=True):
        assert close(a, b)
    plain = flow(tokens).rows()
    assert len(results[0][0]) == rates.frames_for_tokens(38) - num_frames
    assert float((results[0][0][:20] - plain[0][num_frames : num_frames + 20]).abs().max()) > 1e-3
    assert close(results[0][1], plain[1])


def test_prompt_comes_first() -> None:
    flow = tiny_flow()
    state = flow.init_state(1)
    flow.step(some_tokens([3]), state)
    with pytest.raises(ValueError, match="before the first token"):
        flow.give_prompt(some_tokens([10]), Padded.full(torch.zeros(1, 68, 80)), state)


def test_state_is_bounded_and_reported() -> None:
    flow = tiny_flow()
    state = flow.init_state(1)
    sizes = []
    for block in range(12):
        flow.step(some_tokens([10], seed=block), state)
        sizes.append(state_bytes(state))
    assert sizes[4:] == sizes[3:-1]
    bound = max_state_bytes(TINY)
    assert bound is not None
    assert 0.8 * bound < sizes[-1] <= bound
    assert max_state_bytes(unbounded()) is None


@dataclass(frozen=True)
class FlowBudget:
    """Parameters, and multiply-adds per second of speech, part by part."""

    encoder_parameters: int
    estimator_parameters: int
    encoder_macs_per_s: float
    estimator_macs_per_s: float


def budget(flow: Flow) -> FlowBudget:
    """What the flow costs with the config's solver; attention is counted over full windows.

    Pocket: 1.16 M + 1.59 M parameters; 15 M + 0.85 G multiply-adds a second with 3 guided steps, 0.43 G unguided.
    """
    config = flow.config
    frame_rate = rates.SPEAK_FRAME_RATE

    def weights(module: nn.Module) -> int:
        return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv1d))

    spread = [flow.encoder.regulate1, flow.encoder.regulate2]
    at_frames = sum(layer.weight.numel() for layer in spread)
    past = 0 if config.encoder.past_blocks is None else config.encoder.past_blocks
    seen = (past + 1) * rates.BLOCK_TOKENS
    at_tokens = weights(flow.encoder) - at_frames + 2 * seen * config.encoder.width * config.encoder.num_layers
    estimator = config.estimator
    past = 0 if estimator.past_blocks is None else estimator.past_blocks
    seen = (past + 1) * BLOCK_FRAMES
    once = flow.estimator.context.weight.numel()
    timed = flow.estimator.time1.weight.numel() + flow.estimator.time2.weight.numel()
    each = weights(flow.estimator) - once - timed + 2 * seen * estimator.width * estimator.num_layers
    evaluations = config.num_steps
    calls = evaluations * (1 if config.guidance_scale == 0 else 2)
    return FlowBudget(
        encoder_parameters=sum(parameter.numel() for parameter in flow.encoder.parameters()),
        estimator_parameters=sum(parameter.numel() for parameter in flow.estimator.parameters()),
        encoder_macs_per_s=at_tokens * rates.TOKEN_RATE + at_frames * frame_rate,
        estimator_macs_per_s=(each * calls + once) * frame_rate + timed * evaluations / rates.BLOCK_S,
    )


def test_pocket_is_small_enough() -> None:
    flow = Flow(FlowConfig())
    cost = budget(flow)
    assert cost.encoder_parameters + cost.estimator_parameters == sum(p.numel() for p in flow.parameters())
    assert cost.encoder_parameters + cost.estimator_parameters < 3e6
    assert cost.encoder_macs_per_s < 2e7
    assert cost.estimator_macs_per_s < 2.5e9


@pytest.mark.parametrize("token", [-1, CODES])
def test_tokens_outside_of_the_codebook_are_refused(token: int) -> None:
    flow = tiny_flow()
    tokens = torch.zeros(1, 12, dtype=torch.int64)
    tokens[0, 5] = token
    with pytest.raises(ValueError, match=rf"speech token {token} is outside of 0\.\.{CODES - 1}"):
        flow(Padded.full(tokens))
    flow(Padded(tokens, torch.tensor([5])))  # behind the end it does not count


@pytest.mark.parametrize(
    ("change", "message"),
    [({"condition_dim": 40}, "condition_dim is 40"), ({"mel_std": 0.0}, "mel_std is 0.0")],
)
def test_impossible_configs_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)  # type: ignore[arg-type]


def test_speech_decoder_streams_as_it_decodes() -> None:
    vocoder = Vocoder(VocoderConfig(width=16, ffn_dim=24, num_layers=2)).eval()
    decoder = SpeechDecoder(tiny_flow(), vocoder)
    tokens = some_tokens([33, 12, 0])
    state = decoder.init_state(3)
    parts = [
        decoder.step(chunk(tokens, [0, 0, 0], [11, 12, 0]), state),
        decoder.flush(state, torch.tensor([False, True, True])),
        decoder.step(chunk(tokens, [11, 0, 0], [22, 0, 0]), state),
        decoder.flush(state),
    ]
    wav = Padded.concat(parts).rows()
    for ours, offline, length in zip(wav, decoder(tokens).rows(), (33, 12, 0), strict=True):
        assert len(ours) == 256 * rates.frames_for_tokens(length)
        assert close(ours, offline)
