"""Microphone sound without speech, from a seed: silence, noise, hum, tones and clicks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SOUNDS = ("silence", "noise", "hum", "tones", "clicks", "babble")
_TOP_DBFS = {"silence": -65.0, "noise": -32.0, "hum": -30.0, "tones": -26.0, "clicks": -30.0}


def sound(kind: str, seed: int, sample_rate: int) -> NDArray[np.float32]:
    """Samples (S,) float32 of 0.6 to 3 s, with a random level within 12 dB below the usual one of its kind.

    Babble is made of voices and is not made here. Raises `ValueError` when the kind is unknown.
    """
    if kind not in _TOP_DBFS:
        raise ValueError(f"unknown sound {kind!r}; the sounds made here are {', '.join(_TOP_DBFS)}")
    rng = np.random.default_rng([seed, SOUNDS.index(kind)])
    count = int(rng.uniform(0.6, 3.0) * sample_rate)
    if kind == "silence":
        samples = rng.standard_normal(count)
    elif kind == "noise":
        samples = _coloured_noise(count, float(rng.uniform(0.0, 2.0)), rng)
    elif kind == "hum":
        samples = _harmonics(count, float(rng.uniform(48, 180)), 6, rng, sample_rate)
        samples += 0.1 * rng.standard_normal(count)
    elif kind == "tones":
        samples = _melody(count, rng, sample_rate)
    else:
        samples = _clicks(count, rng, sample_rate)
    rms = float(np.sqrt(np.mean(np.square(samples)))) or 1.0
    level = _TOP_DBFS[kind] - float(rng.uniform(0, 12))
    return np.clip(samples * (10 ** (level / 20) / rms), -0.98, 0.98).astype(np.float32)


def _coloured_noise(count: int, slope: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Noise whose power falls with frequency to the power `slope`: 0 white, 1 pink, 2 brown."""
    spectrum = np.fft.rfft(rng.standard_normal(count))
    spectrum /= np.maximum(np.arange(spectrum.size), 8.0) ** (slope / 2)
    return np.asarray(np.fft.irfft(spectrum, count), dtype=np.float64)


def _harmonics(count: int, f0: float, number: int, rng: np.random.Generator, rate: int) -> NDArray[np.float64]:
    time = np.arange(count) / rate
    samples = np.zeros(count)
    for harmonic in range(1, number + 1):
        samples += np.sin(2 * np.pi * (f0 * harmonic * time + rng.uniform())) * rng.uniform(0.2, 1.0) / harmonic
    return samples


def _melody(count: int, rng: np.random.Generator, rate: int) -> NDArray[np.float64]:
    """Notes of a scale, one after another, with a soft beginning and a decay."""
    samples = np.zeros(count)
    start = 0
    while start < count:
        length = min(count - start, int(rng.uniform(0.15, 0.6) * rate))
        f0 = 220.0 * 2 ** (int(rng.choice([0, 2, 4, 5, 7, 9, 11, 12, 14, 16])) / 12)
        decay = np.exp(-np.arange(length) / (0.3 * rate)) * np.minimum(1.0, np.arange(length) / (0.01 * rate))
        samples[start : start + length] = _harmonics(length, f0, 4, rng, rate) * decay
        start += length
    return samples


def _clicks(count: int, rng: np.random.Generator, rate: int) -> NDArray[np.float64]:
    """Knocks at irregular times over a little noise."""
    samples = 0.01 * rng.standard_normal(count)
    for _ in range(int(rng.integers(2, 9))):
        start = int(rng.integers(0, count))
        length = min(count - start, int(0.05 * rate))
        samples[start : start + length] += rng.standard_normal(length) * np.exp(-np.arange(length) / (0.006 * rate))
    return samples
