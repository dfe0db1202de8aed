"""The noise of the vocoder in the parity fixtures: the integer hash that decoder.json describes."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.released_stream import SourceNoise


def uniform(shape: tuple[int, ...], salt: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Numbers in [0, 1), a function of place and salt."""
    low = np.uint64(2**32 - 1)
    x = (np.arange(math.prod(shape), dtype=np.uint64) * np.uint64(2654435761) + np.uint64(salt * 40503 + 12345)) & low
    for shift, factor in ((15, 2246822519), (13, 3266489917)):
        x ^= x >> np.uint64(shift)
        x = (x * np.uint64(factor)) & low
    x ^= x >> np.uint64(16)
    return (x.astype(np.float64) / 2**32).reshape(shape)


def hashed_noise(salt: int) -> SourceNoise:
    def draw(_: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        samples, harmonics = size
        phase = (2 * uniform((1, harmonics), salt + 1000) - 1) * np.pi
        noise = (uniform((1, harmonics, samples), salt) - 0.5) * math.sqrt(12)
        return torch.from_numpy(phase.astype(np.float32)), torch.from_numpy(noise.astype(np.float32)).transpose(1, 2)

    return draw
