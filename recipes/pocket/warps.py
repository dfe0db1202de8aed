"""Warps: how one voice becomes many. F0 and formants are scaled by two factors that vary independently.

Formants are scaled by resampling, which scales F0 and tempo too; the synthesizer compensates both where it can, and
WORLD (`pyworld`) scales the F0 of those that cannot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np
import soxr
from numpy.typing import NDArray

F0_RANGE = (0.6, 1.8)
FORMANT_RANGE = (0.82, 1.25)
# Formant factors that no training clip has: the test set "warped" is made of them.
RESERVED_FORMANTS = ((0.88, 0.91), (1.12, 1.15))
WORLD_FRAME_MS = 5.0


@dataclass(frozen=True)
class Warp:
    """Factors of F0 and of the formants; (1, 1) is the voice as it is."""

    f0: float = 1.0
    formants: float = 1.0


def is_reserved(formants: float) -> bool:
    """Whether a formant factor belongs to the tests alone."""
    return any(low <= formants <= high for low, high in RESERVED_FORMANTS)


def draw_warp(rng: Random, *, reserved: bool = False, residual: tuple[float, float] = F0_RANGE) -> Warp:
    """A random warp; `reserved`: one of the tests.

    F0 follows the formants as it does from children to men, with a wide spread. `residual` bounds the part of the F0
    factor that resampling does not bring.
    """
    while True:
        if reserved:
            formants = rng.uniform(*rng.choice(RESERVED_FORMANTS))
        else:
            formants = _log_uniform(rng, *FORMANT_RANGE)
            if is_reserved(round(formants, 4)):
                continue
        f0 = formants**1.7 * math.exp(rng.gauss(0.0, 0.22))
        if F0_RANGE[0] <= f0 <= F0_RANGE[1] and residual[0] <= f0 / formants <= residual[1]:
            return Warp(round(f0, 4), round(formants, 4))


def _log_uniform(rng: Random, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def scale_formants(samples: NDArray[np.float32], rate: int, formants: float, target_rate: int) -> NDArray[np.float32]:
    """Samples (S,) at `rate` -> (S',) at `target_rate`, played `formants` times as fast: F0, formants and tempo."""
    if formants == 1.0 and rate == target_rate:
        return samples
    scaled: NDArray[np.float32] = soxr.resample(samples, rate * formants, target_rate)
    return scaled


def scale_f0(samples: NDArray[np.float32], rate: int, factor: float) -> NDArray[np.float32]:
    """Samples (S,) -> (S',) of the same length within 5 ms, F0 scaled and formants kept, by WORLD.

    Raises `RuntimeError` when `pyworld` is not installed.
    """
    try:
        import pyworld
    except ImportError:
        raise RuntimeError("pyworld is not installed; install it to scale the F0 of this voice") from None
    wave = samples.astype(np.float64)
    f0, times = pyworld.dio(wave, rate, frame_period=WORLD_FRAME_MS)
    f0 = pyworld.stonemask(wave, f0, times, rate)
    envelope = pyworld.cheaptrick(wave, f0, times, rate)
    aperiodicity = pyworld.d4c(wave, f0, times, rate)
    scaled = pyworld.synthesize(f0 * factor, envelope, aperiodicity, rate, WORLD_FRAME_MS)
    return np.asarray(scaled, np.float32)
