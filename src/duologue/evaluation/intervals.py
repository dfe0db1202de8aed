"""95 % confidence intervals: Wilson for shares, bootstrap over dialogues for rates and means."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_Z = 1.959964
_NUM_SAMPLES = 1000

Interval = tuple[float, float]


def wilson(num_right: int, num: int) -> Interval:
    """Interval of a share (Wilson 1927). Raises ValueError unless 0 <= num_right <= num and num > 0."""
    if num < 1 or not 0 <= num_right <= num:
        raise ValueError(f"{num_right} of {num} is no share")
    share, squared = num_right / num, _Z**2
    center = (share + squared / (2 * num)) / (1 + squared / num)
    half = _Z * math.sqrt(share * (1 - share) / num + squared / (4 * num**2)) / (1 + squared / num)
    return max(0.0, center - half), min(1.0, center + half)


def bootstrap(values: Sequence[float], weights: Sequence[float], units: Sequence[str], seed: int = 0) -> Interval:
    """Interval of sum(values) / sum(weights) when whole units are drawn again, with replacement.

    Args:
        values, weights: of each observation, such as edits and reference words of a text.
        units: what each observation belongs to, such as the dialogue of a text.

    Raises:
        ValueError: no observation, unequal lengths, or weights that sum to 0.
    """
    if not len(values) == len(weights) == len(units) or not sum(weights) > 0:
        raise ValueError(f"{len(values)} values, {len(weights)} weights and {len(units)} units give no rate")
    _, index = np.unique(np.asarray(units), return_inverse=True)
    sums = np.stack([np.bincount(index, values), np.bincount(index, weights)])
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(_NUM_SAMPLES):
        drawn = sums[:, rng.integers(sums.shape[1], size=sums.shape[1])].sum(1)
        if drawn[1] > 0:
            ratios.append(drawn[0] / drawn[1])
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(low), float(high)
