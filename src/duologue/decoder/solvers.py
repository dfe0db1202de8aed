"""Solvers of the flow's differential equation, dx/dt = velocity from noise at time 0 to the mel at time 1.

A velocity is told the number of the evaluation, so that a streaming estimator can keep its caches for each of them
apart: whatever the solver, block by block gives what the whole gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor

Method = Literal["euler", "midpoint", "adams-bashforth"]
Velocity = Callable[[int, float, Tensor], Tensor]
_MAX_SWAY = 1.75  # 1 / (pi / 2 - 1), rounded down: beyond it the last times run backwards


@dataclass(frozen=True)
class Solver:
    """How the flow is integrated.

    Attributes:
        method: "euler" and "adams-bashforth" (second order, from this slope and the last one) evaluate the velocity
            once a step, "midpoint" (second order) twice.
        num_steps: intervals between time 0 and 1.
        sway: bends the times u = k / num_steps to u + sway (cos(pi u / 2) - 1 + u), sway sampling of F5-TTS
            (arXiv 2410.06885, section 3.3): -1 is the released cosine schedule with small steps near the noise, 0 has
            steps of one size, above 0 the small steps lie near the mel.
    """

    method: Method = "euler"
    num_steps: int = 10
    sway: float = -1.0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"solver is {self.method!r}; the choices are {', '.join(map(repr, get_args(Method)))}")
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
        if not -1 <= self.sway <= _MAX_SWAY:
            raise ValueError(f"sway is {self.sway}; it must lie in -1..{_MAX_SWAY}")

    @property
    def num_evaluations(self) -> int:
        """How often the velocity is asked for."""
        return self.num_steps * (2 if self.method == "midpoint" else 1)

    @property
    def times(self) -> list[float]:
        """The num_steps + 1 times from 0 to 1."""
        inner = [k / self.num_steps for k in range(self.num_steps)]
        return [u + self.sway * (math.cos(math.pi / 2 * u) - 1 + u) for u in inner] + [1.0]

    def solve(self, velocity: Velocity, x0: Tensor) -> Tensor:
        """Integrates from x0 at time 0 to time 1; `velocity` gets the number of the evaluation, the time and x."""
        if self.method == "euler":
            return solve_euler(velocity, x0, self.times)
        if self.method == "midpoint":
            return _solve_midpoint(velocity, x0, self.times)
        return _solve_adams_bashforth(velocity, x0, self.times)


def solve_euler(velocity: Velocity, x0: Tensor, times: Sequence[float]) -> Tensor:
    """First order, one evaluation a step."""
    x = x0
    for k, (t, t_next) in enumerate(pairwise(times)):
        x = x + (t_next - t) * velocity(k, t, x)
    return x


def _solve_midpoint(velocity: Velocity, x0: Tensor, times: Sequence[float]) -> Tensor:
    x = x0
    for k, (t, t_next) in enumerate(pairwise(times)):
        half = (t_next - t) / 2
        middle = x + half * velocity(2 * k, t, x)
        x = x + 2 * half * velocity(2 * k + 1, t + half, middle)
    return x


def _solve_adams_bashforth(velocity: Velocity, x0: Tensor, times: Sequence[float]) -> Tensor:
    """The slope is drawn on through this one and the last, whatever the sizes of the steps; first an Euler step."""
    x, last, last_size = x0, None, 0.0
    for k, (t, t_next) in enumerate(pairwise(times)):
        size = t_next - t
        slope = velocity(k, t, x)
        ahead = slope if last is None else slope + size / (2 * last_size) * (slope - last)
        x, last, last_size = x + size * ahead, slope, size
    return x
