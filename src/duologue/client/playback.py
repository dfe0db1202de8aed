"""What a loudspeaker has played, is playing and has run out of. Used by a device's thread and by the receiver at once.

Positions count samples of one output item of the protocol, time comes from a clock that is given.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

MEMORY_S = 2.0  # of what left for the device: no device holds back more
MAX_CUT_ITEMS = 32


@dataclass(frozen=True)
class Cut:
    """Where an item was cut.

    Attributes:
        played_ms: of its sound that had left the loudspeaker.
    """

    item_id: str
    played_ms: int


@dataclass
class _PlayingItem:
    id: str
    chunks: deque[NDArray[np.int16]] = field(default_factory=deque)
    num_waiting: int = 0
    num_taken: int = 0
    started: bool = False
    ended: bool = False
    missing: int = 0  # samples of silence since it ran dry; a gap only if more sound comes

    def pop(self, most: int) -> NDArray[np.int16]:
        parts = []
        while most and self.chunks:
            chunk = self.chunks.popleft()
            parts.append(chunk[:most])
            if len(chunk) > most:
                self.chunks.appendleft(chunk[most:])
            most -= len(parts[-1])
        pcm = np.concatenate(parts) if parts else np.zeros(0, np.int16)
        self.num_waiting -= len(pcm)
        self.num_taken += len(pcm)
        return pcm


@dataclass(frozen=True)
class _Piece:
    """A stretch of what was given to the device."""

    start: int  # in the stream of everything that was given
    item_id: str
    first: int  # in the item
    num_samples: int


class Playback:
    """Sound that waits for the loudspeaker, and the account of it. All methods may be called from any thread.

    Attributes:
        num_gaps: times that an answer stopped in the middle because nothing more had come.
        gap_ms: silence in all of them.
        level: loudest sample of what was taken last, in [0, 1].
    """

    def __init__(
        self,
        sample_rate: int,
        ahead_ms: float = 60.0,
        max_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            ahead_ms: an item starts once that much of it waits: a small store against jitter.
            max_s: the most sound that may wait.
        """
        self.sample_rate, self._clock = sample_rate, clock
        self._ahead, self._max = int(ahead_ms * sample_rate / 1000), int(max_s * sample_rate)
        self._lock = threading.Lock()
        self._items: deque[_PlayingItem] = deque()
        self._given: deque[_Piece] = deque()
        self._num_given = 0
        self._empty_at = clock()  # when the last sample that was given will have been heard
        self._cut: deque[str] = deque(maxlen=MAX_CUT_ITEMS)
        self.num_gaps, self._gap_samples = 0, 0
        self.level = 0.0

    def add(self, item_id: str, pcm: NDArray[np.int16]) -> None:
        """More sound (S,) of an item; of one that was cut nothing more is taken.

        Raises:
            ValueError: more waits than may.
        """
        with self._lock:
            if item_id in self._cut or not len(pcm):
                return
            if sum(item.num_waiting for item in self._items) + len(pcm) > self._max:
                raise ValueError(f"the server sent more than {self._max / self.sample_rate:.0f} s of sound ahead")
            item = self._find(item_id)
            if item.missing:
                self.num_gaps += 1
                self._gap_samples += item.missing
                item.missing = 0
            item.chunks.append(pcm)
            item.num_waiting += len(pcm)

    def end(self, item_id: str) -> None:
        """No more sound of this item will come."""
        with self._lock:
            for item in self._items:
                item.ended = item.ended or item.id == item_id
            self._forget_finished()

    def take(self, num_samples: int, delay_s: float = 0.0) -> NDArray[np.int16]:
        """What the device plays next (S,), silence where there is nothing.

        Args:
            delay_s: from now until the first of these samples is heard.
        """
        with self._lock:
            pcm = np.zeros(num_samples, np.int16)
            filled = 0
            while filled < num_samples and self._items:
                item = self._items[0]
                item.started = item.started or item.ended or item.num_waiting >= self._ahead
                got = item.pop(num_samples - filled) if item.started else pcm[:0]
                if len(got):
                    piece = _Piece(self._num_given + filled, item.id, item.num_taken - len(got), len(got))
                    self._given.append(piece)
                    pcm[filled : filled + len(got)] = got
                    filled += len(got)
                self._forget_finished()
                if self._items and self._items[0] is item:  # it did not fill the rest, or has not begun
                    item.missing += (num_samples - filled) * item.started
                    break
            self.level = float(np.abs(pcm.astype(np.int32)).max(initial=0)) / 32768
            self._num_given += num_samples
            self._empty_at = self._clock() + delay_s + num_samples / self.sample_rate
            while self._given and self._given[0].start < self._num_given - MEMORY_S * self.sample_rate:
                self._given.popleft()
            return pcm

    def cut(self) -> list[Cut]:
        """Barge-in: drops everything that waits. Says for each item that was not heard to its end how far it was."""
        with self._lock:
            heard = self._num_heard()
            unheard = {item.id: item.num_taken for item in self._items}
            for piece in self._given:
                if piece.start + piece.num_samples > heard:
                    unheard.setdefault(piece.item_id, 0)
            positions = dict(unheard)
            for piece in reversed(self._given):  # the earliest stretch that is not heard yet decides
                if piece.item_id in unheard and piece.start + piece.num_samples > heard:
                    positions[piece.item_id] = piece.first + max(0, heard - piece.start)
            self._cut.extend(unheard)
            self._items.clear()
            self._given.clear()
            return [Cut(item_id, position * 1000 // self.sample_rate) for item_id, position in positions.items()]

    @property
    def active(self) -> bool:
        """Whether something plays or waits to be played, what is still inside the device counted too."""
        with self._lock:
            if self._items:
                return True
            return bool(self._given) and self._given[-1].start + self._given[-1].num_samples > self._num_heard()

    @property
    def num_waiting(self) -> int:
        """Samples that the device has not taken."""
        with self._lock:
            return sum(item.num_waiting for item in self._items)

    @property
    def gap_ms(self) -> float:
        return self._gap_samples * 1000 / self.sample_rate

    def _num_heard(self) -> int:
        """Of everything that was given to the device."""
        inside = max(0.0, self._empty_at - self._clock()) * self.sample_rate
        return max(0, self._num_given - round(inside))

    def _find(self, item_id: str) -> _PlayingItem:
        for item in self._items:
            if item.id == item_id:
                return item
        self._items.append(_PlayingItem(item_id))
        return self._items[-1]

    def _forget_finished(self) -> None:
        while self._items and self._items[0].ended and not self._items[0].num_waiting:
            self._items.popleft()
