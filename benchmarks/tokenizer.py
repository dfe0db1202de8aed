"""Benchmark `tokenizer`: listening in small chunks against one offline pass over the same speech, in one run.

    offline     the whole utterance at once
    streaming   chunks of 20, 40 and 100 ms; all their computation together is compared with offline
    baseline    everything said so far is tokenized again for each closed block

Computation is counted in seconds of the processor, in one thread: a chunk keeps fewer threads busy than a whole
utterance does, and what threads cost each other is no property of streaming. What a chunk makes the user wait is
counted by the clock.

Also measured: the cost of each block over 30 s, what remains to be done at the end of speech, and how many ids differ
from offline ones when the feature floor is relative to the loudest moment of the utterance, of which a stream knows
only the past.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.harness import AIMS, Spread, computed, now, one_thread
from benchmarks.plots import draw_lines
from benchmarks.speech import chunks, questions, speech_of
from duologue import rates
from duologue.audio import LogMel
from duologue.decoder.flow import state_bytes
from duologue.evaluation.report import Row
from duologue.layers import Padded
from duologue.progress import steps
from duologue.released.random_weights import PRESETS
from duologue.tokenizer.tokenizer import SpeechTokenizer

CHUNKS_MS = (20, 40, 100)
CURVE_CHUNK_MS = 40
MAX_OVER_OFFLINE = 1.3
MAX_LAST_OVER_FIRST = 2.0  # every block attends to all blocks of its 30 s: that much growth is the model's own
BASELINE_POINTS = 8
RANDOM = {"glm-4-voice-9b": "9b"}  # sizes of `duologue init-random`


@dataclass(frozen=True)
class Streamed:
    """Listening in chunks of one size.

    Attributes:
        compute_s: all computation for the whole speech, the flush included.
        over_offline: its median over that of offline.
        clock_s: the same by the clock, median.
        chunk_ms_p95: by the clock, of one chunk.
        longest_ms: the dearest chunk, which closes a block; median over the repetitions.
        num_differing: ids unlike the offline ones.
    """

    chunk_ms: float
    compute_s: Spread
    over_offline: float
    clock_s: float
    chunk_ms_p95: float
    longest_ms: float
    num_differing: int


@dataclass(frozen=True)
class FloorDifference:
    """Ids of a stream against offline ids over the recorded questions, for one kind of feature floor."""

    floor: str
    num_tokens: int
    num_differing: int
    rate: float


@dataclass(frozen=True)
class TokenizerBench:
    """Attributes:
    offline_s: computation of one pass over the whole speech, and `offline_clock_s`, its median by the clock.
    block_ms: computation for each block of speech, in order, in chunks of 40 ms; what is left of a last block out.
    last_over_first: mean of the last third of them over that of the first third.
    baseline_block_ms: (number of the block, ms) where everything so far is tokenized again.
    baseline_over_offline: all of that over one offline pass, interpolated between the measured blocks.
    commit_ms: what remains at the end of speech, by how full the open block is (share of its length).
    provisional_ms: ids of a full open block on request.
    state_mb: of the state at the end of the speech, in 10^6 bytes.
    """

    speech_s: float
    block_s: float
    offline_s: Spread
    offline_clock_s: float
    streamed: tuple[Streamed, ...]
    block_ms: tuple[float, ...]
    last_over_first: float
    baseline_block_ms: tuple[tuple[int, float], ...]
    baseline_over_offline: float
    commit_ms: dict[str, Spread]
    provisional_ms: Spread
    floors: tuple[FloorDifference, ...]
    state_mb: float

    def rows(self) -> list[Row]:
        """The figures for a terminal."""
        rows = [
            Row("speech", "length", self.speech_s, "s", note=f"blocks of {self.block_s:.2f} s"),
            self.offline_s.scaled(1000).row("offline", "computation", "ms"),
            Row("offline", "clock", 1000 * self.offline_clock_s, "ms"),
        ]
        for one in self.streamed:
            group = f"chunks of {one.chunk_ms:g} ms"
            rows += [
                one.compute_s.scaled(1000).row(group, "computation", "ms"),
                Row(group, "over offline", one.over_offline, "x"),
                Row(group, "clock", 1000 * one.clock_s, "ms"),
                Row(group, "95th percentile of a chunk", one.chunk_ms_p95, "ms"),
                Row(group, "longest chunk", one.longest_ms, "ms"),
                Row(group, "ids other than offline", float(one.num_differing)),
            ]
        again = f"interpolated between {len(self.baseline_block_ms)} blocks"
        rows.append(Row("all again for each block", "over offline", self.baseline_over_offline, "x", note=again))
        rows += [spread.row("end of speech", name, "ms") for name, spread in self.commit_ms.items()]
        rows.append(self.provisional_ms.row("end of speech", "provisional ids of a full open block", "ms"))
        rows += [
            Row(f"floor {one.floor}", "ids other than offline", one.rate, "%", num=one.num_tokens)
            for one in self.floors
        ]
        worst = max(one.over_offline for one in self.streamed)
        return [
            *rows,
            Row("state", "at the end of the speech", self.state_mb, "MB"),
            Row(AIMS, "tokenizer.stream_over_offline", worst, aim=MAX_OVER_OFFLINE),
            Row(AIMS, "tokenizer.flat", self.last_over_first, aim=MAX_LAST_OVER_FIRST),
        ]

    def draw(self, figure: Any) -> None:
        """Cost of block k, streaming and baseline, and total computation by the size of the chunks."""
        curve, bars = figure.subplots(1, 2, width_ratios=[2, 1])
        again = [float(index) for index, _ in self.baseline_block_ms], [ms for _, ms in self.baseline_block_ms]
        own = [float(index) for index in range(1, len(self.block_ms) + 1)], list(self.block_ms)
        title = f"tokenizer: cost of block k of {self.block_s:g} s"
        draw_lines(curve, {"all again for each block": again, "streaming": own}, title, "block", "ms")
        names = ["offline", *(f"{one.chunk_ms:g} ms" for one in self.streamed)]
        bars.bar(names, [1.0, *(one.over_offline for one in self.streamed)], color="#6699bb")
        bars.axhline(MAX_OVER_OFFLINE, color="black", linewidth=1)
        bars.set_title("computation over offline", fontsize=10)


def random_tokenizer(preset: str) -> SpeechTokenizer:
    """A tokenizer of the published size with random weights: for its speed, its codes mean nothing.

    Raises:
        ValueError: an unknown preset.
    """
    if preset not in RANDOM:
        raise ValueError(f"there is no preset {preset!r}; the choices are {', '.join(RANDOM)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SpeechTokenizer(PRESETS[RANDOM[preset]]().tokenizer).eval()


def measure_tokenizer(
    tokenizer: SpeechTokenizer,
    seconds: float = 30.0,
    repetitions: int = 5,
    warm_up: int = 1,
    chunks_ms: Sequence[float] = CHUNKS_MS,
) -> TokenizerBench:
    """Tokenizes recorded speech offline and as streams, in turns, so that a busy moment hits all of them.

    Raises:
        ValueError: fewer than one repetition, a negative warm-up, or speech shorter than four blocks.
    """
    if repetitions < 1 or warm_up < 0:
        raise ValueError(f"repetitions must be at least 1 and warm_up not negative, got {repetitions} and {warm_up}")
    block_s = tokenizer.block_tokens / rates.TOKEN_RATE
    if seconds < 4 * block_s:
        raise ValueError(f"{seconds} s of speech are too short: at least four blocks of {block_s:g} s are needed")
    wav = speech_of(seconds)
    with torch.inference_mode(), one_thread():
        offline: list[_Once] = []
        runs: dict[float, list[_Run]] = {chunk_ms: [] for chunk_ms in (*chunks_ms, CURVE_CHUNK_MS)}
        for index in steps(range(warm_up + repetitions), "part 1 of 3, offline and streams"):
            once = _offline(tokenizer, wav)
            offline += [once] if index >= warm_up else []
            for chunk_ms, done in runs.items():
                run = _stream(tokenizer, wav, chunk_ms)
                done += [run] if index >= warm_up else []
        offline_s = Spread.of([one.compute_s for one in offline])
        streamed = tuple(_summary(chunk_ms, runs[chunk_ms], offline_s, once.codes) for chunk_ms in chunks_ms)
        block_ms = _block_costs(runs[CURVE_CHUNK_MS], block_s)
        baseline = _baseline(tokenizer, wav, block_s, len(block_ms))
        third = max(len(block_ms) // 3, 1)
        last_over_first = statistics.mean(block_ms[-third:]) / statistics.mean(block_ms[:third])
        commit_ms, provisional_ms = _ends(tokenizer, wav, 3 * repetitions)
        floors = tuple(_floor_difference(tokenizer, floor) for floor in ("fixed", "utterance"))
    return TokenizerBench(
        speech_s=seconds,
        block_s=block_s,
        offline_s=offline_s,
        offline_clock_s=statistics.median(one.clock_s for one in offline),
        streamed=streamed,
        block_ms=tuple(block_ms),
        last_over_first=last_over_first,
        baseline_block_ms=tuple((index, 1000 * taken) for index, taken in baseline),
        baseline_over_offline=_interpolated_sum(baseline) / offline_s.median,
        commit_ms=commit_ms,
        provisional_ms=provisional_ms,
        floors=floors,
        state_mb=runs[CURVE_CHUNK_MS][-1].state_bytes / 1e6,
    )


@dataclass(frozen=True)
class _Once:
    """One offline pass."""

    compute_s: float
    clock_s: float
    codes: Tensor


@dataclass(frozen=True)
class _Run:
    """One pass in chunks: seconds of each by the clock and of computation, the flush last; codes."""

    clock_s: list[float]
    compute_s: list[float]
    codes: Tensor
    state_bytes: int


def _offline(tokenizer: SpeechTokenizer, wav: NDArray[np.float32]) -> _Once:
    x, device = _as_batch(tokenizer, wav), _device(tokenizer)
    start, spent = now(device), computed(device)
    codes = tokenizer(x)
    return _Once(computed(device) - spent, now(device) - start, codes.rows()[0])


def _stream(tokenizer: SpeechTokenizer, wav: NDArray[np.float32], chunk_ms: float) -> _Run:
    device = _device(tokenizer)
    state = tokenizer.init_state(1)
    pieces = [_as_batch(tokenizer, chunk) for chunk in chunks(wav, chunk_ms)]
    clock, compute, codes, size = [], [], [], 0
    for index in range(len(pieces) + 1):
        if index == len(pieces):
            size = state_bytes(state)
        start, spent = now(device), computed(device)
        codes.append(tokenizer.step(pieces[index], state) if index < len(pieces) else tokenizer.flush(state))
        compute.append(computed(device) - spent)
        clock.append(now(device) - start)
    return _Run(clock, compute, Padded.concat(codes).rows()[0], size)


def _summary(chunk_ms: float, runs: Sequence[_Run], offline: Spread, codes: Tensor) -> Streamed:
    total = Spread.of([sum(run.compute_s) for run in runs])
    return Streamed(
        chunk_ms=chunk_ms,
        compute_s=total,
        over_offline=total.median / offline.median,
        clock_s=statistics.median(sum(run.clock_s) for run in runs),
        chunk_ms_p95=1000 * statistics.median(float(np.percentile(run.clock_s, 95)) for run in runs),
        longest_ms=1000 * statistics.median(max(run.clock_s) for run in runs),
        num_differing=int((runs[-1].codes != codes).sum()),
    )


def _block_costs(runs: Sequence[_Run], block_s: float) -> list[float]:
    """Milliseconds of computation for each block of speech, the median over the repetitions.

    A block is closed by the first chunk behind its end, so its cost falls into the next one: the first block, in which
    nothing closes, is left out, and what is not a whole block at the end.
    """
    chunk_s, costs = CURVE_CHUNK_MS / 1000, []
    for run in runs:
        block_of = [int(index * chunk_s / block_s + 1e-9) for index in range(len(run.compute_s) - 1)]
        sums = np.bincount(block_of, weights=run.compute_s[:-1])
        num_whole = int(len(block_of) * chunk_s / block_s + 1e-9)
        costs.append(1000 * sums[1:num_whole])
    return [float(cost) for cost in np.median(costs, 0)]


def _baseline(
    tokenizer: SpeechTokenizer, wav: NDArray[np.float32], block_s: float, num_blocks: int
) -> list[tuple[int, float]]:
    """Number of the block and seconds for everything up to its end, at some blocks from the first to the last."""
    indices = sorted({round(index) for index in np.linspace(1, num_blocks, min(BASELINE_POINTS, num_blocks))})
    return [
        (index, _offline(tokenizer, wav[: round(index * block_s * rates.LISTEN_SAMPLE_RATE)]).compute_s)
        for index in steps(indices, "part 2 of 3, every block tokenized anew")
    ]


def _interpolated_sum(points: Sequence[tuple[int, float]]) -> float:
    """Sum over all blocks from the first to the last point, straight lines between the points."""
    indices = np.arange(points[0][0], points[-1][0] + 1)
    return float(np.interp(indices, [index for index, _ in points], [value for _, value in points]).sum())


def _ends(tokenizer: SpeechTokenizer, wav: NDArray[np.float32], repetitions: int) -> tuple[dict[str, Spread], Spread]:
    """Milliseconds of the flush late in the speech with an open block of several lengths; and of provisional ids."""
    device, block = _device(tokenizer), tokenizer.block_tokens * rates.SAMPLES_PER_TOKEN
    closed = (len(wav) // block - 1) * block
    commit = {}
    for share in steps((0.1, 0.5, 1.0), "part 3 of 3, ends of speech"):
        state = tokenizer.init_state(1)
        tokenizer.step(_as_batch(tokenizer, wav[: closed + round(share * block)]), state)
        seconds, asked = [], []
        for _ in range(repetitions):
            start = now(device)
            tokenizer.provisional(state)
            asked.append(now(device) - start)
            fork = copy.deepcopy(state)
            start = now(device)
            tokenizer.flush(fork)
            seconds.append(now(device) - start)
        commit[f"open block {100 * share:.0f} % full"] = Spread.of(seconds).scaled(1000)
    return commit, Spread.of(asked).scaled(1000)


def _floor_difference(tokenizer: SpeechTokenizer, floor: Any) -> FloorDifference:
    """The tokenizer with another feature floor, over all recorded questions."""
    listener = _with_floor(tokenizer, floor)
    num_tokens, num_differing = 0, 0
    for wav in questions():
        codes = _offline(listener, wav).codes
        streamed = _stream(listener, wav, CURVE_CHUNK_MS).codes
        num_tokens += len(codes)
        num_differing += int((codes != streamed).sum())
    return FloorDifference(floor, num_tokens, num_differing, num_differing / num_tokens)


def _with_floor(tokenizer: SpeechTokenizer, floor: Any) -> SpeechTokenizer:
    """The same weights behind other features."""
    features = dataclasses.replace(tokenizer.config.features, floor=floor)
    with torch.device("meta"):
        other = SpeechTokenizer(dataclasses.replace(tokenizer.config, features=features))
    other.features = LogMel(features).to(_device(tokenizer))
    other.encoder, other.quantizer = tokenizer.encoder, tokenizer.quantizer
    return other.eval()


def _as_batch(tokenizer: SpeechTokenizer, wav: NDArray[np.float32]) -> Padded:
    return Padded.full(torch.from_numpy(wav)[None].to(_device(tokenizer)))


def _device(tokenizer: SpeechTokenizer) -> torch.device:
    return tokenizer.quantizer.codebook.weight.device
