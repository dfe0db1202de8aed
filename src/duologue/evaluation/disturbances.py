"""Sounds that are no speech and must not interrupt a reply, made by rule: one seed gives one sound."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from duologue.client.connection import WIRE_RATE
from duologue.pcm import to_int16

LEVEL_DB = -18.0  # of the loudest 0.1 s, relative to full scale: that of the bundled questions


def cough(rng: np.random.Generator) -> NDArray[np.int16]:
    """Two coughs: a burst of noise with the resonances of an open mouth, then breath that fades."""
    gap = np.zeros(int(rng.uniform(0.15, 0.3) * WIRE_RATE))
    return _leveled(np.concatenate([_cough(rng), gap, 0.7 * _cough(rng)]))


def noise(rng: np.random.Generator) -> NDArray[np.int16]:
    """2 s of pink noise."""
    num = 2 * WIRE_RATE
    return _leveled(_shaped(rng.standard_normal(num), lambda hertz: np.maximum(hertz, 20.0) ** -0.5))


def knocks(rng: np.random.Generator) -> NDArray[np.int16]:
    """Four knocks on a table."""
    knock = rng.standard_normal(int(0.12 * WIRE_RATE)) * np.exp(-np.arange(int(0.12 * WIRE_RATE)) / (0.015 * WIRE_RATE))
    low = _shaped(knock, lambda hertz: 1 / (1 + (hertz / 300) ** 2))
    gaps = [np.zeros(int(one * WIRE_RATE)) for one in rng.uniform(0.1, 0.25, 4)]
    return _leveled(np.concatenate([part for gap in gaps for part in (low, gap)]))


DISTURBANCES: dict[str, Callable[[np.random.Generator], NDArray[np.int16]]] = {
    "cough": cough,
    "noise": noise,
    "knocks": knocks,
}


def _cough(rng: np.random.Generator) -> NDArray[np.float64]:
    time = np.arange(int(0.35 * WIRE_RATE)) / WIRE_RATE
    shape = np.minimum(time / 0.008, 1.0) * (np.exp(-time / 0.04) + 0.25 * np.exp(-time / 0.15))
    peaks = rng.uniform(0.9, 1.1, 3) * (700, 1400, 2600)
    return _shaped(
        rng.standard_normal(len(time)) * shape,
        lambda hertz: sum(1 / (1 + ((hertz - peak) / 250) ** 2) for peak in peaks) + 0.02,
    )


def _shaped(
    wav: NDArray[np.float64], gain: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> NDArray[np.float64]:
    hertz = np.asarray(np.fft.rfftfreq(len(wav), 1 / WIRE_RATE), np.float64)
    return np.asarray(np.fft.irfft(np.fft.rfft(wav) * gain(hertz), len(wav)), np.float64)


def _leveled(wav: NDArray[np.float64]) -> NDArray[np.int16]:
    hop = WIRE_RATE // 10
    frames = np.pad(wav, (0, -len(wav) % hop)).reshape(-1, hop)
    loudest = float(np.sqrt((frames**2).mean(-1)).max())
    return to_int16(np.clip(wav * (10 ** (LEVEL_DB / 20) / loudest), -1.0, 1.0).astype(np.float32))
