"""Conversion between float32 and int16 samples.

The integer i is the value i / 32768. A round trip from int16 to float32 and back is the identity.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Pcm: TypeAlias = NDArray[np.float32] | NDArray[np.int16] | bytes
"""One channel of samples (S,): float32 in [-1, 1], int16, or the bytes of little-endian int16."""

_SCALE = 32768.0


def from_int16(samples: NDArray[np.int16]) -> NDArray[np.float32]:
    """Converts int16 samples of any shape to float32 in [-1, 1)."""
    return samples.astype(np.float32) / np.float32(_SCALE)


def to_int16(wav: NDArray[np.float32]) -> NDArray[np.int16]:
    """Rounds floating-point samples of any shape to little-endian int16 and clips values outside [-1, 1)."""
    samples: NDArray[np.int16] = np.clip(np.rint(wav * np.float32(_SCALE)), -_SCALE, _SCALE - 1.0).astype("<i2")
    return samples


def as_float(pcm: Pcm | bytearray | memoryview, name: str = "the audio") -> NDArray[np.float32]:
    """Converts samples of any supported type to float32.

    Args:
        name: what the samples are, for error messages.

    Raises:
        ValueError: an incomplete sample at the end, or an unsupported type.
    """
    if isinstance(pcm, bytes | bytearray | memoryview):
        if len(pcm) % 2:
            raise ValueError(f"{name} must hold whole 16-bit samples, got {len(pcm)} bytes")
        pcm = np.frombuffer(pcm, "<i2")
    if not isinstance(pcm, np.ndarray):
        raise ValueError(f"{name} must be an array of samples or bytes, not {type(pcm).__name__}")
    if pcm.dtype.kind == "i" and pcm.dtype.itemsize == 2:
        return from_int16(pcm.astype(np.int16, copy=False))
    if pcm.dtype.kind != "f":
        raise ValueError(f"{name} must be float32, int16 or bytes of little-endian int16, not {pcm.dtype}")
    return pcm.astype(np.float32, copy=False)
