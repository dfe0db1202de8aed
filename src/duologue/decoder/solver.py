"""Euler's method for the flow's differential equation, dx/dt = velocity from noise at time 0 to the mel at time 1.

A velocity gets the number of the evaluation, so that a streaming estimator can keep separate caches for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

Velocity = Callable[[int, float, Tensor], Tensor]


def cosine_times(num_steps: int) -> list[float]:
    """The num_steps + 1 times from 0 to 1 of the released cosine schedule, whose small steps lie near the noise.

    Raises:
        ValueError: fewer than one step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    return [1 - math.cos(math.pi / 2 * k / num_steps) for k in range(num_steps)] + [1.0]


def solve_euler(velocity: Velocity, x0: Tensor, times: Sequence[float]) -> Tensor:
    """Integrates from x0 over the times; `velocity` gets the number of the evaluation, the time and x."""
    x = x0
    for k, (t, t_next) in enumerate(pairwise(times)):
        x = x + (t_next - t) * velocity(k, t, x)
    return x
