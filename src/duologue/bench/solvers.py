"""Benchmark `solvers`: how near few evaluations of pocket's flow come to its exact solution, and what they cost.

Every solver starts from the same noise and gets the same tokens, so that the distance is the solver's own: the mean
difference of natural-log mels to a solution of many small steps. Cost is that of one 10-token block late in a stream.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from duologue import rates
from duologue.bench.harness import Check, Spread, repeat
from duologue.bench.plots import draw_lines
from duologue.bench.speech import questions
from duologue.decoder.flow import Flow
from duologue.decoder.solvers import Method, Solver
from duologue.layers import Padded
from duologue.tokenizer.tokenizer import SpeechTokenizer

STEPS = (1, 2, 3, 4, 6, 10)
SWAYS = (-1.0, -0.5, 0.0)
EXACT = Solver("midpoint", 64, -0.5)
_WARM_BLOCKS = 4


@dataclass(frozen=True)
class Solved:
    """One solver.

    Attributes:
        distance: mean absolute difference to the exact natural-log mel, in nepers.
        worst_frame: the 99th percentile of the mean difference of a frame.
        block_ms: of a 10-token block, whose sound lasts 0.8 s.
    """

    method: Method
    num_steps: int
    sway: float
    num_evaluations: int
    distance: float
    worst_frame: float
    block_ms: Spread


@dataclass(frozen=True)
class SolverBench:
    """Attributes:
    guidance_scale: of all runs.
    spread: mean absolute difference of two exact mels of unlike noise: a distance far below it is not heard.
    """

    num_tokens: int
    guidance_scale: float
    spread: float
    solved: tuple[Solved, ...]
    checks: tuple[Check, ...] = ()

    def table(self) -> str:
        """The figures for a terminal, the cheapest first."""
        lines = [
            f"{self.num_tokens} tokens, guidance {self.guidance_scale:g}; distances are mean differences of log-mels; "
            f"mels of other noise differ by {self.spread:.3f}",
            f"{'solver':18}{'steps':>6}{'sway':>7}{'evaluations':>13}{'distance':>10}{'p99 frame':>11}{'block':>12}",
        ]
        for one in sorted(self.solved, key=lambda one: (one.num_evaluations, one.distance)):
            lines.append(
                f"{one.method:18}{one.num_steps:6}{one.sway:7.2f}{one.num_evaluations:13}{one.distance:10.4f}"
                f"{one.worst_frame:11.4f}{one.block_ms.median:9.1f} ms"
            )
        return "\n".join(lines)

    def draw(self, figure: Any) -> None:
        """Distance by evaluations, one curve for each solver and schedule."""
        axes = figure.subplots()
        series: dict[str, tuple[list[float], list[float]]] = {}
        for one in sorted(self.solved, key=lambda one: one.num_evaluations):
            places, values = series.setdefault(f"{one.method}, sway {one.sway:g}", ([], []))
            places.append(one.num_evaluations)
            values.append(one.distance)
        draw_lines(axes, series, "flow: distance to the exact solution", "evaluations a block", "log-mel distance")


def measure_solvers(
    flow: Flow,
    tokens: Padded,
    steps: Sequence[int] = STEPS,
    sways: Sequence[float] = SWAYS,
    methods: Sequence[Method] = get_args(Method),
    exact: Solver = EXACT,
    guidance_scale: float | None = None,
    repetitions: int = 5,
) -> SolverBench:
    """Solves the same flow in many ways.

    Args:
        tokens: (B, T) int64 of what is said.
        exact: what the others are compared with.
        guidance_scale: the config's where None.
        repetitions: of the timed block.
    """
    scale = flow.config.guidance_scale if guidance_scale is None else guidance_scale
    with torch.inference_mode():
        wanted = _solve(flow, tokens, exact, scale, 0)
        spread = float((wanted - _solve(flow, tokens, exact, scale, 1)).abs().mean())
        solved = []
        for method in methods:
            for sway in sways:
                for num_steps in steps:
                    solver = Solver(method, num_steps, sway)
                    error = (_solve(flow, tokens, solver, scale, 0) - wanted).abs().mean(1)
                    block_ms = _time_block(flow, solver, scale, repetitions)
                    worst = float(error.quantile(0.99))
                    evaluations = solver.num_evaluations
                    solved.append(Solved(method, num_steps, sway, evaluations, float(error.mean()), worst, block_ms))
    return SolverBench(int(tokens.lengths.sum()), scale, spread, tuple(solved))


@torch.inference_mode()
def question_tokens(tokenizer: SpeechTokenizer) -> Padded:
    """Tokens (B, T) of the recorded questions of the package: what speech sounds like to a flow."""
    device = tokenizer.quantizer.codebook.weight.device
    wavs = [torch.from_numpy(wav).to(device) for wav in questions()]
    return Padded.stack([tokenizer(Padded.full(wav[None])).rows()[0] for wav in wavs])


def _solve(flow: Flow, tokens: Padded, solver: Solver, guidance_scale: float, seed: int) -> Tensor:
    """Natural-log mels of all rows, one after the other: (F, M)."""
    state = flow.init_state(
        len(tokens.lengths), solver.num_steps, guidance_scale, seed, solver=solver.method, sway=solver.sway
    )
    return torch.cat(flow(tokens, state).rows())


def _time_block(flow: Flow, solver: Solver, guidance_scale: float, repetitions: int) -> Spread:
    state = flow.init_state(1, solver.num_steps, guidance_scale, solver=solver.method, sway=solver.sway)
    device = flow.encoder.norm.weight.device
    block = Padded.full(torch.arange(rates.BLOCK_TOKENS, device=device)[None] % flow.config.encoder.codebook_size)
    for _ in range(_WARM_BLOCKS):
        flow.step(block, state)
    forks = [copy.deepcopy(state) for _ in range(1 + repetitions)]
    return Spread.of(repeat(lambda index: flow.step(block, forks[index]), repetitions, 1, device)).scaled(1000)
