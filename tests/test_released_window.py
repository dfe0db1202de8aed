"""The released flow with a bounded window: what a block sees, what it costs, what the state keeps."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from duologue import rates
from duologue.decoder.flow import noise_at, state_bytes
from duologue.layers import Padded, join_states, state_row
from duologue.released.decoder.blocks import Streaming
from duologue.released.decoder.conformer import BlockConformer
from duologue.released.decoder.flow import ReleasedFlow, ReleasedFlowState
from tests.released_sizes import formula, small_decoder, small_tokens

WINDOW = Streaming(block_tokens=(7, 25), overlap_frames=12, window_frames=60)


def small_flow() -> ReleasedFlow:
    return small_decoder(WINDOW).flow.double()


def stream(flow: ReleasedFlow, tokens: Tensor, chunk: int, state: ReleasedFlowState | None = None) -> Tensor:
    """(N,) tokens in chunks -> mel (T, M)."""
    state = flow.init_state(1, num_steps=2) if state is None else state
    parts = [flow.step(Padded.full(piece[None]), state) for piece in tokens.split(chunk)]
    return Padded.concat([*parts, flow.flush(state)]).rows()[0]


@torch.inference_mode()
@pytest.mark.parametrize("sizes", [[10, 20, 10], [7, 25, 3, 5], [1] * 12, [40]])
def test_an_encoder_that_goes_on_gives_what_the_whole_gives(sizes: list[int]) -> None:
    """Also where a call ends inside of a block of 10: there it must not see what comes after."""
    encoder: BlockConformer = small_decoder().flow.encoder.double()
    x = formula(torch.Size([2, sum(sizes), 16]), 1).double()
    lengths = torch.tensor([sum(sizes), sum(sizes) - 1])
    state, done = encoder.init_state(2), 0
    for size in sizes:
        done += size
        before = state.start
        now = lengths.clamp(max=done)
        piece = Padded.stack([x[i, int(before[i]) : int(now[i])] for i in range(2)])
        made = encoder.step(piece, state).rows()
        whole = encoder(Padded(x[:, :done], now)).rows()
        for i in range(2):
            torch.testing.assert_close(made[i], whole[i][int(before[i]) :], atol=1e-9, rtol=0)
    assert state.start.tolist() == [int(length) // 10 * 10 for length in lengths]
    assert state.layers[0].keys.shape[1] == int(state.start.max())


@torch.inference_mode()
def test_the_encoders_past_can_be_bounded() -> None:
    encoder: BlockConformer = small_decoder().flow.encoder.double()
    x = formula(torch.Size([1, 90, 16]), 1).double()
    moved = x.clone()
    moved[:, :10] += 1
    results = []
    for each in (x, moved):
        state = encoder.init_state(1)
        made = [encoder.step(Padded.full(piece), state, 20).values for piece in each.split(10, 1)]
        assert state.layers[0].keys.shape[1] == 20
        results.append(torch.cat(made, 1))
    changed = (results[0] - results[1]).abs().amax((0, 2)) > 1e-9
    assert changed[:50].all()  # two layers of two blocks each
    assert not changed[50:].any()


class Spy:
    """Keeps what the solver was asked for."""

    def __init__(self, flow: ReleasedFlow, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Padded, Padded, Tensor]] = []
        solve = flow.solve

        def spied(mu: Padded, speaker: Tensor, prompt: Padded, noise: Tensor, *settings: Any) -> Tensor:
            self.calls.append((mu, prompt, noise))
            return solve(mu, speaker, prompt, noise, *settings)

        monkeypatch.setattr(flow, "solve", spied)


@torch.inference_mode()
def test_a_block_sees_the_condition_of_all_tokens_and_the_last_frames_given_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flow, tokens = small_flow(), small_tokens(110)
    spy = Spy(flow, monkeypatch)
    mel = stream(flow, tokens, 4)
    ends = [7, 32, 57, 82, 107, 110]
    assert len(spy.calls) == len(ends)
    seen = []
    for i, (end, (mu, prompt, noise)) in enumerate(zip(ends, spy.calls, strict=True)):
        given = 0 if i == 0 else rates.frames_for_tokens(ends[i - 1]) - 12
        first = max(given - 60, 0) // 2 * 2
        whole = flow.condition(Padded.full(tokens[None, :end])).values
        torch.testing.assert_close(mu.values, whole[:, first:], atol=1e-9, rtol=0)
        assert torch.equal(prompt.values[0], mel[first:given])
        frame = torch.arange(first, rates.frames_for_tokens(end))[None]
        assert torch.equal(noise.float(), noise_at(torch.tensor([0]), frame, 80))
        seen.append(mu.values.shape[1])
    full = range(60 + 12 + 172, 61 + 12 + 173 + 1)  # window, what was held back, and 25 tokens
    assert all(size in full for size in seen[2:5])


@torch.inference_mode()
def test_a_window_that_holds_the_reply_changes_nothing_and_a_smaller_one_little_but_something() -> None:
    flow, tokens = small_flow(), small_tokens(90)
    mels = []
    for window in (None, 900, 60, 0):
        streaming = Streaming((7, 25), 12, window)
        mels.append(stream(flow, tokens, 90, flow.init_state(1, num_steps=2, streaming=streaming)))
    torch.testing.assert_close(mels[1], mels[0], atol=1e-9, rtol=0)
    assert 1e-4 < float((mels[2] - mels[0]).abs().mean()) < float(mels[0].std())
    assert float((mels[3] - mels[2]).abs().mean()) > 1e-4


@torch.inference_mode()
def test_rows_at_different_places_equal_their_solo_runs() -> None:
    """Rows join with prompts, empty calls and ends of their own."""
    flow = small_flow()
    tokens = [small_tokens(length, salt) for salt, length in enumerate((75, 33, 0, 58))]
    prompt = Padded.stack([small_tokens(9, 8), *([small_tokens(0)] * 3)])
    prompt_mel = Padded(formula(torch.Size([4, 50, 80]), 2).double(), torch.tensor([50, 0, 0, 0]))
    state = flow.init_state(4, num_steps=2)
    state.seed = torch.tensor([5, 6, 7, 8])
    flow.give_prompt(prompt, prompt_mel, state)
    parts: list[tuple[list[int], Padded]] = []
    for sizes in ([30, 0, 0, 58], [0, 33, 0, 0], [45, 0, 0, 0]):
        at = [sum(done) for done in zip([0] * 4, *(before for before, _ in parts), strict=True)]
        pieces = [row[a : a + n] for row, a, n in zip(tokens, at, sizes, strict=True)]
        parts.append((sizes, flow.step(Padded.stack(pieces), state)))
    mels = Padded.concat([*(mel for _, mel in parts), flow.flush(state)]).rows()
    for i, row in enumerate(tokens):
        alone = flow.init_state(1, num_steps=2, seed=5 + i)
        if i == 0:
            flow.give_prompt(Padded.full(prompt.values[:1]), Padded.full(prompt_mel.values[:1]), alone)
        expected = stream(flow, row, 11, alone)
        assert len(expected) == rates.frames_for_tokens(len(row) + (9 if i == 0 else 0)) - (50 if i == 0 else 0)
        torch.testing.assert_close(mels[i], expected, atol=1e-9, rtol=0)


@torch.inference_mode()
def test_what_a_call_brings_is_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = small_flow()
    spy = Spy(flow, monkeypatch)
    state = flow.init_state(2, num_steps=1, streaming=Streaming(None, 6, 30))
    given = [0, 0]
    for sizes in ([10, 0], [7, 20], [8, 15], [0, 4], [210, 0]):
        pieces = [small_tokens(given[i] + sizes[i])[given[i] :] for i in range(2)]
        flow.step(Padded.stack(pieces), state)
        given = [a + b for a, b in zip(given, sizes, strict=True)]
    decoded = [mu.lengths.tolist() for mu, _, _ in spy.calls]
    frames = rates.frames_for_tokens
    assert decoded == [
        [frames(10)],
        [frames(20)],
        [frames(20) - (frames(10) - 6 - 30) // 2 * 2, frames(30) - (frames(20) - 6 - 30) // 2 * 2],
        [frames(220) - (frames(20) - 6 - 30) // 2 * 2],  # 15 waited for the ten after them; 200 in a block
        [frames(230) - (frames(220) - 6 - 30) // 2 * 2],
    ]
    assert state.pending.lengths.tolist() == [5, 9]


@torch.inference_mode()
def test_states_join_and_part() -> None:
    """Sessions at different places in one batch, as a worker runs them."""
    flow = small_flow()
    tokens = [small_tokens(60, salt) for salt in range(3)]
    states = [flow.init_state(1, num_steps=2, seed=i, streaming=Streaming(None, 6, 30)) for i in range(3)]
    parts: list[list[Tensor]] = [[], [], []]
    for sizes in ([20, 0, 5], [10, 30, 25], [0, 30, 30], [30, 0, 0]):
        joined = join_states(states)
        made = flow.step(Padded.stack([row[:n] for row, n in zip(tokens, sizes, strict=True)]), joined)
        tokens = [row[n:] for row, n in zip(tokens, sizes, strict=True)]
        states = [state_row(joined, row) for row in range(3)]
        for mel, part in zip(made.rows(), parts, strict=True):
            part.append(mel)
    for i, state in enumerate(states):
        alone = flow.init_state(1, num_steps=2, seed=i, streaming=Streaming(None, 6, 30))
        for size in ([20, 10, 30], [30, 30], [5, 25, 30])[i]:
            at = int(alone.encoder.start + alone.open.lengths + alone.pending.lengths)
            mel = flow.step(Padded.full(small_tokens(60, i)[None, at : at + size]), alone).rows()[0]
            if len(mel):
                expected, parts[i] = mel, [torch.cat(parts[i])]
                torch.testing.assert_close(parts[i][0][: len(mel)], expected, atol=1e-9, rtol=0)
                parts[i] = [parts[i][0][len(mel) :]]
        assert sum(len(part) for part in parts[i]) == 0
        torch.testing.assert_close(flow.flush(state).values, flow.flush(alone).values, atol=1e-9, rtol=0)


@torch.inference_mode()
def test_the_state_stops_growing_and_a_copy_goes_on_alike() -> None:
    streaming = Streaming((80,), 6, 40, 640)
    flow = small_flow()
    state = flow.init_state(1, num_steps=1, streaming=streaming)
    sizes = []
    for block in range(17):
        flow.step(Padded.full(small_tokens(80, block)[None]), state)
        sizes.append(state_bytes(state))
    assert sizes[13:] == sizes[9:13]  # 320 tokens, four blocks, are forgotten at once
    assert int(state.start) > 0
    fork = copy.deepcopy(state)
    one, two = (stream(flow, small_tokens(60), 13, each) for each in (state, fork))
    assert torch.equal(one, two)


@torch.inference_mode()
def test_guidance_is_one_call_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = small_flow()
    estimator, batches = flow.decoder["estimator"], []
    handle = estimator.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    flow.step(Padded.full(small_tokens(32)[None]), flow.init_state(1))
    handle.remove()
    assert batches == [2] * 20  # two blocks of 10 steps


@torch.inference_mode()
def test_half_precision_is_for_the_u_net_alone() -> None:
    decoder, tokens = small_decoder(WINDOW), torch.stack([small_tokens(40), small_tokens(40, 1)])
    x = Padded(tokens, torch.tensor([40, 33]))  # ragged: statistics by our own norm
    plain = decoder.flow(x, decoder.flow.init_state(2, num_steps=2))
    decoder.flow.estimate_in(torch.bfloat16)
    half = decoder.flow(x, decoder.flow.init_state(2, num_steps=2))
    assert half.values.dtype == torch.float32
    error = torch.cat([(a - b).flatten() for a, b in zip(half.rows(), plain.rows(), strict=True)])
    assert 0 < float(error.abs().mean()) < 0.03 * float(plain.rows()[0].std())
    assert decoder.flow.encoder_proj.weight.dtype == torch.float32
    assert torch.isfinite(decoder.vocoder(half).values).all()
