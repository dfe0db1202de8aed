"""The streaming contract, held by every stage: folded steps equal `forward`, for every chunking and batch.

A stage joins by one entry in `CASES`.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from duologue import rates
from duologue.audio import LogMel, LogMelConfig
from duologue.decoder.decoder import SpeechDecoder
from duologue.decoder.encoder import TokenEncoderConfig
from duologue.decoder.flow import Flow, FlowConfig
from duologue.decoder.transformer import EstimatorConfig
from duologue.decoder.vocoder import Vocoder, VocoderConfig
from duologue.layers import Padded, join_states, state_row
from duologue.released.decoder.blocks import Streaming
from duologue.released.decoder.decoder import ReleasedDecoder
from duologue.tokenizer.encoder import EncoderConfig
from duologue.tokenizer.quantizer import QuantizerConfig
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from tests.released_sizes import HIFT, small_decoder

FEW_CHANNELS = dataclasses.replace(HIFT, base_channels=4, nb_harmonics=1)
TOLERANCE = 1e-4  # of mels and waveforms, absolute, float32
MARGIN = 1e-3  # ids must be equal where the second choice is further away than this


@dataclass(frozen=True)
class Case:
    """One stage under test.

    Attributes:
        build: a small stage in evaluation mode, always with the same weights.
        make: (length, generator) -> one input row (length, ...).
        lengths: of the rows of a batch; one is 0.
        chunks: lengths of steps that are tried, besides the whole at once and ragged ones.
        num_final: at least so many outputs have come out after steps over this length of input, without a flush.
        margin: for stages that give ids: input batch -> (B, T), how far the second choice is.
    """

    build: Callable[[], Any]
    make: Callable[[int, torch.Generator], Tensor]
    lengths: tuple[int, ...]
    chunks: tuple[int, ...]
    num_final: Callable[[int], int]
    margin: Callable[[Any, Padded], Tensor] | None = None


def _speech(length: int, generator: torch.Generator) -> Tensor:
    """Noise whose level comes and goes, (S,)."""
    time = torch.arange(length) / rates.LISTEN_SAMPLE_RATE
    swell = torch.sin(40 * torch.rand(1, generator=generator) * time).abs()
    return 0.2 * swell * torch.randn(length, generator=generator)


def _mel(length: int, generator: torch.Generator) -> Tensor:
    """Log-mel between silence and loud, (T, 80)."""
    return -4 + 2 * torch.randn(length, 80, generator=generator).cumsum(0).sin()


def _randomize(module: nn.Module) -> nn.Module:
    """Large random weights, so that nothing is hidden by a small initialisation."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.3 * noise / max(parameter[0].numel(), 1) ** 0.5
    return module.eval()


def _vocoder(lookahead_frames: int) -> nn.Module:
    return _randomize(Vocoder(VocoderConfig(width=16, ffn_dim=32, num_layers=3, lookahead_frames=lookahead_frames)))


def _codes(length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 40, (length,), generator=generator)


def _flow(past_blocks: int | None) -> nn.Module:
    sizes = {"width": 16, "num_heads": 2, "ffn_dim": 24, "num_layers": 2, "past_blocks": past_blocks}
    encoder = TokenEncoderConfig(codebook_size=40, **sizes)  # type: ignore[arg-type]
    estimator = EstimatorConfig(kernel_size=3, time_dim=8, **sizes)  # type: ignore[arg-type]
    config = FlowConfig(encoder, estimator, condition_dim=80, speaker_dim=4, num_steps=2)
    return _randomize(Flow(config))


def _spoken_frames(num_tokens: int) -> int:
    return rates.frames_for_tokens(num_tokens // rates.BLOCK_TOKENS * rates.BLOCK_TOKENS)


@cache
def _tokenizer() -> nn.Module:
    """Pieces of 2.4 s, so that a test crosses their border, and blocks of 0.4 s."""
    torch.manual_seed(0)
    encoder = EncoderConfig(width=32, num_heads=2, ffn_dim=64, num_layers=2, block_frames=20, max_positions=120)
    config = SpeechTokenizerConfig(encoder=encoder, quantizer=QuantizerConfig(codebook_size=64))
    return SpeechTokenizer(config).eval()


def _tokenizer_margin(stage: SpeechTokenizer, x: Padded) -> Tensor:
    margins = [stage.quantize_piece(piece) for piece in stage._pieces(x)]
    return Padded.concat([Padded(each.margin, each.codes.lengths) for each in margins]).values


def _num_tokens(num_samples: int) -> int:
    block, piece = 5, 30
    tokens = max(num_samples - 200, 0) // rates.SAMPLES_PER_TOKEN
    return tokens // piece * piece + tokens % piece // block * block


@cache
def _released_decoder() -> ReleasedDecoder:
    """With two solver steps in place of ten, which go through the same states."""
    decoder = small_decoder(Streaming((5, 8), 12, 40), FEW_CHANNELS).double()
    decoder.init_state = functools.partial(decoder.init_state, num_steps=2)  # type: ignore[method-assign]
    return decoder


CASES: dict[str, Case] = {
    "log-mel": Case(
        build=lambda: LogMel(LogMelConfig()),
        make=_speech,
        lengths=(9000, 0, 150, 1280, 5003),
        chunks=(1, 160, 777, 1280),
        num_final=lambda n: max((n - 200) // 160, 0),
    ),
    "tokenizer": Case(
        build=_tokenizer,
        make=_speech,
        lengths=(52000, 0, 1, 38400, 20481),
        chunks=(640, 6400, 9999),
        num_final=_num_tokens,
        margin=_tokenizer_margin,
    ),
    "vocoder": Case(
        build=lambda: _vocoder(2),
        make=_mel,
        lengths=(40, 0, 1, 2, 17),
        chunks=(1, 3, 7),
        num_final=lambda n: max(256 * n - 896, 0),
    ),
    "vocoder without lookahead": Case(
        build=lambda: _vocoder(0),
        make=_mel,
        lengths=(21, 0, 1, 6),
        chunks=(1, 4),
        num_final=lambda n: max(256 * n - 384, 0),
    ),
    "flow": Case(
        build=lambda: _flow(1),
        make=_codes,
        lengths=(57, 0, 3, 30, 12),
        chunks=(1, 7, 20),
        num_final=_spoken_frames,
    ),
    "flow without bound": Case(
        build=lambda: _flow(None),
        make=_codes,
        lengths=(41, 0, 9, 10),
        chunks=(10, 13),
        num_final=_spoken_frames,
    ),
    "speech decoder": Case(
        build=lambda: SpeechDecoder(_flow(1), _vocoder(2)),
        make=_codes,
        lengths=(34, 0, 5, 20),
        chunks=(10, 11),
        num_final=lambda n: max(256 * _spoken_frames(n) - 896, 0),
    ),
    # In float64: rounding of a pitch turns into a phase, which grows with every second.
    "HiFT": Case(
        build=cache(lambda: small_decoder(hift=FEW_CHANNELS).vocoder.double()),
        make=lambda length, generator: _mel(length, generator).double(),
        lengths=(44, 0, 1, 2, 17),
        chunks=(1, 3, 16),
        num_final=lambda n: 256 * max(n - 19, 0),
    ),
    "released decoder": Case(
        build=_released_decoder,
        make=lambda length, generator: torch.randint(32, (length,), generator=generator),
        lengths=(22, 0, 1, 5, 14),
        chunks=(3, 8),
        num_final=lambda n: 256 * max(rates.frames_for_tokens(5 + (n - 5) // 8 * 8) - 12 - 19, 0),
    ),
}
every_stage = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def _batch(case: Case, seed: int = 0) -> Padded:
    generator = torch.Generator().manual_seed(seed)
    return Padded.stack([case.make(length, generator) for length in case.lengths])


def _steps(stage: Any, x: Padded, cuts: Sequence[Tensor], state: Any) -> list[Padded]:
    """Feeds rows up to each of the cuts (B,) in turn."""
    out, start = [], torch.zeros_like(x.lengths)
    for cut in cuts:
        rows = [row[a:b] for row, a, b in zip(x.rows(), start.tolist(), cut.tolist(), strict=True)]
        out.append(stage.step(Padded.stack(rows), state))
        start = cut
    return out


def _even_cuts(x: Padded, chunk: int) -> list[Tensor]:
    longest = int(x.lengths.max())
    return [torch.minimum(x.lengths, torch.tensor(end)) for end in range(chunk, longest + chunk, chunk)]


def _ragged_cuts(x: Padded, seed: int) -> list[Tensor]:
    """Every row cut at other places; some steps bring nothing for a row."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(6, len(x.lengths), generator=generator).sort(0).values
    places = (places * x.lengths).long()
    places[2] = places[1]
    return [*places, x.lengths]


def _assert_same(case: Case, stage: Any, x: Padded, got: Padded, expected: Padded) -> None:
    assert got.lengths.tolist() == expected.lengths.tolist()
    margin = None if case.margin is None else case.margin(stage, x)
    for row, (a, b) in enumerate(zip(got.rows(), expected.rows(), strict=True)):
        if margin is None:
            assert torch.isfinite(a).all()
            torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)
        else:
            sure = margin[row, : len(a)] > MARGIN
            assert sure.float().mean() > 0.9 or not len(a), "hardly any id is sure: the test would say nothing"
            assert torch.equal(a[sure], b[sure])


@every_stage
@torch.inference_mode()
def test_folded_steps_equal_forward_for_even_chunks(case: Case) -> None:
    stage, x = case.build(), _batch(case)
    whole_x, whole = x, stage(x)
    for chunk in (*case.chunks, max(case.lengths)):
        if max(case.lengths) > 500 * chunk:  # a thousand steps prove no more than a hundred
            x = Padded(x.values[:, : 100 * chunk], x.lengths.clamp(max=100 * chunk))
        state = stage.init_state(len(x.lengths))
        out = Padded.concat([*_steps(stage, x, _even_cuts(x, chunk), state), stage.flush(state)])
        _assert_same(case, stage, x, out, whole if len(x.values[0]) == len(whole_x.values[0]) else stage(x))
        x = whole_x
    assert int(whole.lengths.max()) > 10


@every_stage
@pytest.mark.parametrize("seed", range(2))
@torch.inference_mode()
def test_folded_steps_equal_forward_for_ragged_chunks(case: Case, seed: int) -> None:
    stage, x = case.build(), _batch(case, seed)
    state = stage.init_state(len(x.lengths))
    out = Padded.concat([*_steps(stage, x, _ragged_cuts(x, seed), state), stage.flush(state)])
    _assert_same(case, stage, x, out, stage(x))


@every_stage
@torch.inference_mode()
def test_rows_of_a_batch_equal_solo_runs(case: Case) -> None:
    stage, x = case.build(), _batch(case)
    together = stage(x)
    for row, length in enumerate(case.lengths):
        solo = Padded.full(x.values[row : row + 1, :length])
        mine = Padded(together.values[row : row + 1], together.lengths[row : row + 1])
        _assert_same(case, stage, solo, mine, stage(solo))
    assert together.lengths[case.lengths.index(0)] == 0


@every_stage
@torch.inference_mode()
def test_what_lies_behind_a_row_does_not_matter(case: Case) -> None:
    stage, x = case.build(), _batch(case)
    mask = x.mask.reshape(*x.mask.shape, *[1] * (x.values.dim() - 2))
    dirty = Padded(torch.where(mask, x.values, torch.full_like(x.values, 7)), x.lengths)
    _assert_same(case, stage, x, stage(dirty), stage(x))


@every_stage
@torch.inference_mode()
def test_the_future_never_changes_the_past(case: Case) -> None:
    """What a step gave stays true whatever comes next, and comes as soon as the stage promises."""
    stage = case.build()
    length = max(case.lengths)
    past = case.make(length // 2, torch.Generator().manual_seed(1))
    state = stage.init_state(1)
    known = stage.step(Padded.full(past[None]), state)
    promised = case.num_final(len(past))
    assert int(known.lengths) >= promised > 0
    for seed in (2, 3):
        future = case.make(length - length // 2, torch.Generator().manual_seed(seed))
        x = Padded.full(torch.cat([past, future])[None])
        whole = stage(x)
        first = Padded(whole.values[:, : int(known.lengths)], known.lengths)
        _assert_same(case, stage, x, first, known)


@every_stage
@torch.inference_mode()
def test_interleaved_sessions_do_not_touch_each_other(case: Case) -> None:
    stage = case.build()
    batches = [_batch(case, seed) for seed in (4, 5)]
    states = [stage.init_state(len(case.lengths)) for _ in batches]
    outs: list[list[Padded]] = [[], []]
    cuts = [_ragged_cuts(x, seed) for seed, x in enumerate(batches)]
    starts = [torch.zeros_like(x.lengths) for x in batches]
    for i in range(len(cuts[0])):
        for session, x in enumerate(batches):
            cut = cuts[session][i]
            rows = [row[a:b] for row, a, b in zip(x.rows(), starts[session].tolist(), cut.tolist(), strict=True)]
            outs[session].append(stage.step(Padded.stack(rows), states[session]))
            starts[session] = cut
    for session, x in enumerate(batches):
        out = Padded.concat([*outs[session], stage.flush(states[session])])
        _assert_same(case, stage, x, out, stage(x))


@every_stage
@pytest.mark.parametrize("seed", range(2))
@torch.inference_mode()
def test_sessions_that_join_and_leave_a_batch_equal_solo_runs(case: Case, seed: int) -> None:
    """States of unequal age step together in changing company, and some end while others go on."""
    stage, x = case.build(), _batch(case, seed)
    rows, generator = x.rows(), torch.Generator().manual_seed(seed)
    states = [stage.init_state(1) for _ in rows]
    outs: list[list[Tensor]] = [[] for _ in rows]
    fed = [0] * len(rows)

    def together(company: list[int], ends: list[int]) -> None:
        state = join_states([states[i] for i in company])
        got = [stage.step(Padded.stack([rows[i][fed[i] : end] for i, end in zip(company, ends, strict=True)]), state)]
        last = torch.tensor([end == len(rows[i]) for i, end in zip(company, ends, strict=True)])
        got.append(stage.flush(state, last))
        for place, i in enumerate(company):
            outs[i] += [part.rows()[place] for part in got]
            states[i], fed[i] = state_row(state, place), ends[place]

    for _ in range(7):
        company = [i for i, row in enumerate(rows) if torch.rand(1, generator=generator) < 0.6 and fed[i] < len(row)]
        ends = [fed[i] + int((len(rows[i]) - fed[i]) * torch.rand(1, generator=generator)) for i in company]
        if company:
            together(
                company,
                [len(rows[i]) if end > 0.9 * len(rows[i]) else end for i, end in zip(company, ends, strict=True)],
            )
    if company := [i for i, row in enumerate(rows) if fed[i] < len(row)]:
        together(company, [len(rows[i]) for i in company])
    for row, out in zip(rows, outs, strict=True):
        solo = Padded.full(row[None])
        got = Padded.full(torch.cat(out)[None]) if out else stage(solo)
        _assert_same(case, stage, solo, got, stage(solo))


@every_stage
@torch.inference_mode()
def test_a_copied_state_resumes_identically_and_is_not_written_by_the_original(case: Case) -> None:
    stage, x = case.build(), _batch(case)
    cuts = _ragged_cuts(x, 6)
    state = stage.init_state(len(x.lengths))
    _steps(stage, x, cuts[:3], state)
    copied = copy.deepcopy(state)
    rest = Padded.stack([row[start:] for row, start in zip(x.rows(), cuts[2].tolist(), strict=True)])
    ends = []
    for each in (state, copied):
        out = Padded.concat([stage.step(rest, each), stage.flush(each)])
        ends.append(out)
    assert ends[0].lengths.tolist() == ends[1].lengths.tolist()
    for a, b in zip(ends[0].rows(), ends[1].rows(), strict=True):
        assert torch.equal(a, b)


@every_stage
@torch.inference_mode()
def test_a_flushed_row_is_fresh_and_the_others_go_on(case: Case) -> None:
    stage = case.build()
    generator = torch.Generator().manual_seed(7)
    length = max(case.lengths)
    first, second, long = (case.make(n, generator) for n in (length // 3, length // 2, length))
    state = stage.init_state(2)
    half = length // 2
    out = [stage.step(Padded.stack([first, long[:half]]), state)]
    ended = stage.flush(state, torch.tensor([True, False]))
    assert ended.lengths[1] == 0
    x = Padded.full(first[None])
    row = Padded(torch.cat([out[0].rows()[0], ended.rows()[0]])[None], (out[0].lengths + ended.lengths)[:1])
    _assert_same(case, stage, x, row, stage(x))
    out.append(stage.step(Padded.stack([second, long[half:]]), state))
    out.append(stage.flush(state))
    x = Padded.stack([second, long])
    again = Padded.concat(out[1:]).rows()[0], Padded.concat(out).rows()[1]
    _assert_same(case, stage, x, Padded.stack(list(again)), stage(x))


@every_stage
@torch.inference_mode()
def test_nothing_in_is_nothing_out(case: Case) -> None:
    stage = case.build()
    empty = Padded.full(case.make(0, torch.Generator())[None])
    assert int(stage(empty).lengths) == 0
    state = stage.init_state(1)
    assert int(stage.step(empty, state).lengths) == 0
    assert int(stage.flush(state).lengths) == 0
