"""Benchmark `decoder`: what block k of a long reply costs, in equal blocks, against decoding everything again.

    streaming   the decoder's own step: bounded caches, the past is never computed again
    baseline    what the released code does: the whole reply so far is decoded for each block, the new sound is kept
    one shot    the whole reply at once, when all its tokens are known

The ratio of the last block to the second one is taken from two copies of the state, one of each place, that run in
turns many times, in seconds of the processor: a busy moment of the machine then hits both.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.harness import AIMS, Spread, computed, now, repeat
from benchmarks.plots import draw_lines
from duologue import rates
from duologue.decoder.flow import state_bytes
from duologue.evaluation.report import Row
from duologue.layers import Padded
from duologue.models import Decoder
from duologue.progress import steps

BLOCKS = (10, 25)
BASELINE_BLOCK = 25  # tokens, as the released code has it
BASELINE_POINTS = 6
MAX_LAST_OVER_SECOND = 1.15


@dataclass(frozen=True)
class Blocks:
    """One reply in equal blocks.

    Attributes:
        num_tokens: of a block.
        block_ms: of each block, the median over the replies, in order.
        second_ms, last_ms: computation of the same step again and again from copies of the state. Where a block is not
            a multiple of 10, "last" is the last one that closes as many tens of tokens as the second.
        reply_s: the whole reply, the end included.
        state_mb: of the state at the end, in 10^6 bytes.
    """

    num_tokens: int
    block_ms: tuple[float, ...]
    second_ms: Spread
    last_ms: Spread
    last_over_second: float
    reply_s: Spread
    over_one_shot: float
    state_mb: float


@dataclass(frozen=True)
class Baseline:
    """Everything again for each block.

    Attributes:
        block_ms: (number of the block, ms) of the measured ones.
        last_over_first: of them.
        reply_s: all blocks, interpolated between the measured ones.
        over_streaming: that over streaming in blocks of the same size.
    """

    num_tokens: int
    block_ms: tuple[tuple[int, float], ...]
    last_over_first: float
    reply_s: float
    over_streaming: float


@dataclass(frozen=True)
class DecoderBench:
    """Attributes:
    one_shot_s: the whole reply at once.
    real_time_factor: of streaming in the smallest blocks.
    """

    audio_s: float
    num_steps: int
    guidance_scale: float
    one_shot_s: Spread
    streamed: tuple[Blocks, ...]
    baseline: Baseline
    real_time_factor: float

    def rows(self) -> list[Row]:
        """The figures for a terminal."""
        rows = [
            Row("reply", "length", self.audio_s, "s"),
            Row("reply", "solver steps", float(self.num_steps), note=f"guidance {self.guidance_scale:g}"),
            self.one_shot_s.row("reply", "one shot", "s"),
        ]
        for one in self.streamed:
            group = f"blocks of {one.num_tokens} tokens"
            rows += [
                one.reply_s.row(group, "whole reply", "s"),
                Row(group, "first block", one.block_ms[0], "ms"),
                one.second_ms.row(group, "second block", "ms"),
                one.last_ms.row(group, "last block", "ms"),
                Row(group, "last/second", one.last_over_second, "x"),
                Row(group, "over one shot", one.over_one_shot, "x"),
                Row(group, "state at the end", one.state_mb, "MB"),
            ]
        base, group = self.baseline, f"all again for each {self.baseline.num_tokens} tokens"
        rows += [
            Row(group, "whole reply", base.reply_s, "s", note="interpolated"),
            Row(group, "first block", base.block_ms[0][1], "ms"),
            Row(group, "last block", base.block_ms[-1][1], "ms"),
            Row(group, "last/first", base.last_over_first, "x"),
            Row(group, "over streaming", base.over_streaming, "x"),
        ]
        size, worst = self.streamed[0].num_tokens, max(one.last_over_second for one in self.streamed)
        return [
            *rows,
            Row("streaming", "real-time factor", self.real_time_factor, note=f"blocks of {size} tokens"),
            Row(AIMS, "decoder.pocket.last_over_second", worst, aim=MAX_LAST_OVER_SECOND),
        ]

    def draw(self, figure: Any) -> None:
        """Cost of block k by the sound before it."""
        axes = figure.subplots()
        series = {}
        for one in self.streamed:
            block_s = one.num_tokens / rates.TOKEN_RATE
            at = [block_s * index for index in range(len(one.block_ms))]
            series[f"streaming, blocks of {one.num_tokens} tokens"] = (at, list(one.block_ms))
        block_s = self.baseline.num_tokens / rates.TOKEN_RATE
        again = [block_s * (index - 1) for index, _ in self.baseline.block_ms]
        name = f"all again for each block of {self.baseline.num_tokens}"
        series[name] = (again, [ms for _, ms in self.baseline.block_ms])
        draw_lines(axes, series, "decoder: cost of a block", "seconds of the reply before it", "ms", log=True)


def measure_decoder(
    decoder: Decoder,
    codebook_size: int,
    seconds: float = 60.0,
    repetitions: int = 15,
    num_replies: int = 2,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    blocks: Sequence[int] = BLOCKS,
) -> DecoderBench:
    """Decodes replies of random tokens, whose cost is that of any tokens.

    Args:
        codebook_size: tokens are below it.
        repetitions: of the second and the last block.
        num_replies: whole replies in each size of block; one more is not counted.
        num_steps, guidance_scale: of the solver; the decoder's own where None.
    Raises:
        ValueError: fewer than one repetition or reply, or a reply that is shorter than four blocks.
    """
    if repetitions < 1 or num_replies < 1:
        raise ValueError(f"repetitions and num_replies must be at least 1, got {repetitions} and {num_replies}")
    num_tokens = round(seconds * rates.TOKEN_RATE)
    if num_tokens < 4 * max(*blocks, BASELINE_BLOCK):
        raise ValueError(f"a reply of {num_tokens} tokens has fewer than four blocks of {max(*blocks, BASELINE_BLOCK)}")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(codebook_size, (1, num_tokens), generator=generator)
    run = _Run(decoder, codes.to(next(decoder.parameters()).device), num_steps, guidance_scale)
    with torch.inference_mode():
        one_shot = Spread.of(repeat(lambda _: run.at_once(num_tokens), num_replies, 1, run.device))
        streamed = tuple(run.in_blocks(size, num_replies, repetitions, one_shot) for size in blocks)
        same = next((one for one in streamed if one.num_tokens == BASELINE_BLOCK), None)
        same = same or run.in_blocks(BASELINE_BLOCK, num_replies, repetitions, one_shot)
        baseline = run.baseline(BASELINE_BLOCK, same.reply_s.median)
    audio_s = rates.speak_samples_for_tokens(num_tokens) / rates.SPEAK_SAMPLE_RATE
    return DecoderBench(
        audio_s=audio_s,
        num_steps=len(run.fresh().flow.solver),
        guidance_scale=run.fresh().flow.guidance_scale,
        one_shot_s=one_shot,
        streamed=streamed,
        baseline=baseline,
        real_time_factor=streamed[0].reply_s.median / audio_s,
    )


class _Run:
    """The decoder with its settings and the tokens of one reply (1, T)."""

    def __init__(
        self, decoder: Decoder, codes: torch.Tensor, num_steps: int | None, guidance_scale: float | None
    ) -> None:
        self._decoder, self._codes = decoder, codes
        self._settings = num_steps, guidance_scale
        self.device = codes.device

    def fresh(self) -> Any:
        return self._decoder.init_state(1, *self._settings)

    def at_once(self, num_tokens: int) -> None:
        self._decoder(Padded.full(self._codes[:, :num_tokens]), self.fresh())

    def in_blocks(self, size: int, num_replies: int, repetitions: int, one_shot: Spread) -> Blocks:
        """Whole replies in blocks, one uncounted before them; then the second and the last block in turns."""
        num_blocks = self._codes.shape[1] // size
        # Same number of tokens left over by the blocks before, so that as many tens are closed.
        last = max(k for k in range(2, num_blocks) if (k - 1) * size % rates.BLOCK_TOKENS == 0)
        places: dict[int, Any] = {}
        replies, curves = [], []
        for _ in steps(range(1 + num_replies), f"replies in blocks of {size} tokens"):
            state, curve = self.fresh(), []
            for index in range(num_blocks):
                if index in (1, last):
                    places[index] = copy.deepcopy(state)
                curve.append(self._step(index, size, state))
            start = now(self.device)
            self._decoder.step(Padded.full(self._codes[:, num_blocks * size :]), state)
            state_mb = state_bytes(state) / 1e6
            self._decoder.flush(state)
            replies.append(sum(curve) + now(self.device) - start)
            curves.append(curve)
        second, final = [], []
        for _ in steps(range(1 + repetitions), f"second and last block of {size} tokens"):
            second.append(self._step(1, size, copy.deepcopy(places[1]), computed))
            final.append(self._step(last, size, copy.deepcopy(places[last]), computed))
        second_ms, last_ms = Spread.of(second[1:]).scaled(1000), Spread.of(final[1:]).scaled(1000)
        reply_s = Spread.of(replies[1:])
        return Blocks(
            num_tokens=size,
            block_ms=tuple(1000 * statistics.median(costs) for costs in zip(*curves[1:], strict=True)),
            second_ms=second_ms,
            last_ms=last_ms,
            last_over_second=last_ms.median / second_ms.median,
            reply_s=reply_s,
            over_one_shot=reply_s.median / one_shot.median,
            state_mb=state_mb,
        )

    def baseline(self, size: int, streaming_s: float) -> Baseline:
        """The whole reply so far for each block, measured at some blocks from the first to the last."""
        num_blocks = self._codes.shape[1] // size
        places = sorted({round(index) for index in np.linspace(1, num_blocks, min(BASELINE_POINTS, num_blocks))})
        costs = {}
        for index in steps(places, "every block decoded anew"):
            start = now(self.device)
            self.at_once(index * size)
            costs[index] = now(self.device) - start
        every = np.interp(np.arange(1, num_blocks + 1), list(costs), list(costs.values()))
        return Baseline(
            num_tokens=size,
            block_ms=tuple((index, 1000 * cost) for index, cost in costs.items()),
            last_over_first=costs[places[-1]] / costs[places[0]],
            reply_s=float(every.sum()),
            over_streaming=float(every.sum()) / streaming_s,
        )

    def _step(self, index: int, size: int, state: Any, clock: Callable[[torch.device], float] = now) -> float:
        tokens = Padded.full(self._codes[:, index * size : (index + 1) * size])
        start = clock(self.device)
        self._decoder.step(tokens, state)
        return clock(self.device) - start
