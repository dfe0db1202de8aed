"""Speech faster or slower at the same pitch: waveform-similarity overlap-add (WSOLA, Verhelst and Roelands 1993).

Frames of the input are laid over each other at another distance; each is taken from where it continues the one before
best. Streaming: the output of any chunking is that of the whole.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FRAME_S = 0.04
SEARCH_S = 0.01  # how far a frame may be moved: more than one period of the deepest voice


class Tempo:
    """One stream. Speed 1 passes everything through at once.

    Args:
        speed: length of the input over that of the output.
    """

    def __init__(self, speed: float, sample_rate: int) -> None:
        self._speed = speed
        self._hop = int(FRAME_S * sample_rate) // 2
        self._search = int(SEARCH_S * sample_rate)
        self._window = np.hanning(2 * self._hop + 1)[:-1].astype(np.float32)
        self._input = np.zeros(0, np.float32)  # from sample `_origin` of the stream on
        self._origin = 0
        self._frame = 0
        self._tail = np.zeros(self._hop, np.float32)  # second half of the last frame, windowed
        self._next = 0  # where the last frame would go on without a change of speed
        self._given = 0

    def step(self, wav: NDArray[np.float32], last: bool = False) -> NDArray[np.float32]:
        """(S,) float32 -> what is ready; with `last` the rest too, so that the whole has the length / speed."""
        if self._speed == 1.0:
            return wav
        self._input = np.concatenate([self._input, wav])
        received = self._origin + len(self._input)
        wanted = round(received / self._speed)
        parts = []
        if last:
            # Silence behind the end, so that the frames that reach over it can be laid.
            self._input = np.concatenate([self._input, np.zeros(3 * self._hop + 2 * self._search, np.float32)])
        while (frame := self._take()) is not None:
            parts.append(frame)
            if last and self._given + sum(map(len, parts)) >= wanted:
                break
        made = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        if last:
            made = made[: wanted - self._given]
        self._given += len(made)
        return made

    def _take(self) -> NDArray[np.float32] | None:
        """The next hop of output, or None while its input is not there."""
        hop, search = self._hop, self._search
        ideal = int(self._frame * hop * self._speed)
        if max(ideal + search, self._next) + 2 * hop > self._origin + len(self._input):
            return None
        start = ideal if self._frame == 0 else self._best(ideal)
        frame = self._at(start, 2 * hop) * self._window
        if self._frame == 0:
            frame[:hop] = self._at(start, hop)  # nothing is laid under the first half
        made = self._tail + frame[:hop]
        self._tail = frame[hop:]
        self._next = start + hop
        self._frame += 1
        self._forget(min(self._next, int(self._frame * hop * self._speed) - search))
        return made.astype(np.float32)

    def _best(self, ideal: int) -> int:
        """The start near `ideal` whose frame is most like the one that would follow the last frame."""
        first = max(ideal - self._search, self._origin)
        wanted = self._at(self._next, self._hop)
        around = self._at(first, ideal + self._search - first + self._hop)
        likeness = np.correlate(around, wanted, "valid")
        energy = np.convolve(around * around, np.ones(self._hop, np.float32), "valid")
        return first + int(np.argmax(likeness / np.sqrt(np.maximum(energy, 1e-6))))

    def _at(self, start: int, length: int) -> NDArray[np.float32]:
        return self._input[start - self._origin : start - self._origin + length]

    def _forget(self, before: int) -> None:
        drop = max(0, before - self._origin)
        self._input = self._input[drop:]
        self._origin += drop
