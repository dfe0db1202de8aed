"""Time stretching at constant pitch: waveform-similarity overlap-add (WSOLA, Verhelst and Roelands 1993).

Input frames are overlap-added at another hop. Each frame is taken where it best continues the previous one. The output
does not depend on the chunking.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FRAME_S = 0.04
SEARCH_S = 0.01  # maximum shift of a frame: above one period of a low voice


class Tempo:
    """A time-stretching stream. Speed 1 passes audio through.

    Args:
        speed: duration of the input divided by that of the output.
        sample_rate: in Hz.
    """

    def __init__(self, speed: float, sample_rate: int) -> None:
        self._speed = speed
        self._hop = int(FRAME_S * sample_rate) // 2
        self._search = int(SEARCH_S * sample_rate)
        self._window = np.hanning(2 * self._hop + 1)[:-1].astype(np.float32)
        self._input = np.zeros(0, np.float32)  # starts at sample `_origin` of the stream
        self._origin = 0
        self._frame = 0
        self._tail = np.zeros(self._hop, np.float32)  # second half of the last frame, windowed
        self._next = 0  # continuation of the last frame at speed 1
        self._num_returned = 0

    def step(self, wav: NDArray[np.float32], last: bool = False) -> NDArray[np.float32]:
        """Takes wav (S,) float32; returns the output that is ready. `last` flushes to input / speed samples."""
        if self._speed == 1.0:
            return wav
        self._input = np.concatenate([self._input, wav])
        received = self._origin + len(self._input)
        num_total = round(received / self._speed)
        parts = []
        if last:
            # Zero padding lets the last frames reach past the end.
            self._input = np.concatenate([self._input, np.zeros(3 * self._hop + 2 * self._search, np.float32)])
        while (frame := self._take()) is not None:
            parts.append(frame)
            if last and self._num_returned + sum(map(len, parts)) >= num_total:
                break
        output = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        if last:
            output = output[: num_total - self._num_returned]
        self._num_returned += len(output)
        return output

    def _take(self) -> NDArray[np.float32] | None:
        """Returns the next hop of output, or None if it needs more input."""
        hop, search = self._hop, self._search
        ideal = int(self._frame * hop * self._speed)
        if max(ideal + search, self._next) + 2 * hop > self._origin + len(self._input):
            return None
        start = ideal if self._frame == 0 else self._best(ideal)
        frame = self._at(start, 2 * hop) * self._window
        if self._frame == 0:
            frame[:hop] = self._at(start, hop)  # the first half has no predecessor
        output = self._tail + frame[:hop]
        self._tail = frame[hop:]
        self._next = start + hop
        self._frame += 1
        self._forget(min(self._next, int(self._frame * hop * self._speed) - search))
        return output.astype(np.float32)

    def _best(self, ideal: int) -> int:
        """Returns the start near `ideal` whose frame best matches the continuation of the last frame."""
        first = max(ideal - self._search, self._origin)
        num_total = self._at(self._next, self._hop)
        around = self._at(first, ideal + self._search - first + self._hop)
        similarity = np.correlate(around, num_total, "valid")
        energy = np.convolve(around * around, np.ones(self._hop, np.float32), "valid")
        return first + int(np.argmax(similarity / np.sqrt(np.maximum(energy, 1e-6))))

    def _at(self, start: int, length: int) -> NDArray[np.float32]:
        return self._input[start - self._origin : start - self._origin + length]

    def _forget(self, before: int) -> None:
        drop = max(0, before - self._origin)
        self._input = self._input[drop:]
        self._origin += drop
