"""The client's playback queue and real-time pacing. Positions count samples of one output item.

The audio device's thread and the receiving task use a `Playback` concurrently.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from duologue.client.connection import WIRE_RATE

MEMORY_S = 2.0  # record of samples given to the device; exceeds any device latency
MAX_CUT_ITEMS = 32
CHUNK = WIRE_RATE // 50  # samples: 20 ms


@dataclass(frozen=True)
class PlaybackPosition:
    """A position in an item: where it was cut, or what was heard of it.

    Attributes:
        item_id: the item.
        played_ms: milliseconds of the item before it.
    """

    item_id: str
    played_ms: int


@dataclass
class _ItemQueue:
    id: str
    chunks: deque[NDArray[np.int16]] = field(default_factory=deque)
    num_waiting: int = 0
    num_taken: int = 0
    started: bool = False
    ended: bool = False
    missing: int = 0  # samples of silence since the underrun

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
class _PlayedSpan:
    """A span of samples given to the device."""

    start: int  # position in the device's stream
    item_id: str
    first: int  # position in the item
    num_samples: int


class Playback:
    """The queue of audio for the loudspeaker, with a record of what was played. Thread-safe.

    Attributes:
        num_gaps: number of underruns within an answer.
        gap_ms: total silence of the underruns.
        level: peak of the last chunk, in [0, 1].
    """

    def __init__(
        self,
        sample_rate: int,
        ahead_ms: float = 60.0,
        max_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        sample_rate: in Hz.
        ahead_ms: jitter buffer: an item starts once this much is queued.
        max_s: maximum audio in the queue.
        clock: returns seconds.
        """
        self.sample_rate, self._clock = sample_rate, clock
        self._ahead, self._max = int(ahead_ms * sample_rate / 1000), int(max_s * sample_rate)
        self._lock = threading.Lock()
        self._items: deque[_ItemQueue] = deque()
        self._given: deque[_PlayedSpan] = deque()
        self._num_given = 0
        self._empty_at = clock()  # time at which the last sample is audible
        self._cut: deque[str] = deque(maxlen=MAX_CUT_ITEMS)
        self.num_gaps, self._gap_samples = 0, 0
        self.level = 0.0

    def add(self, item_id: str, pcm: NDArray[np.int16]) -> None:
        """Queues pcm (S,) of an item, unless the item was cut.

        Raises:
            ValueError: the queue is full.
        """
        with self._lock:
            if item_id in self._cut or not len(pcm):
                return
            if sum(item.num_waiting for item in self._items) + len(pcm) > self._max:
                raise ValueError(f"the server sent more than {self._max / self.sample_rate:.0f} s of audio ahead")
            item = self._find(item_id)
            if item.missing:
                self.num_gaps += 1
                self._gap_samples += item.missing
                item.missing = 0
            item.chunks.append(pcm)
            item.num_waiting += len(pcm)

    def end(self, item_id: str) -> None:
        """Marks the item as complete."""
        with self._lock:
            for item in self._items:
                item.ended = item.ended or item.id == item_id
            self._forget_finished()

    def take(self, num_samples: int, delay_s: float = 0.0) -> NDArray[np.int16]:
        """Returns the next samples (S,) for the device, padded with silence.

        Args:
            num_samples: length of the result.
            delay_s: time until the first of these samples is audible.
        """
        with self._lock:
            pcm = np.zeros(num_samples, np.int16)
            filled = 0
            while filled < num_samples and self._items:
                item = self._items[0]
                item.started = item.started or item.ended or item.num_waiting >= self._ahead
                got = item.pop(num_samples - filled) if item.started else pcm[:0]
                if len(got):
                    piece = _PlayedSpan(self._num_given + filled, item.id, item.num_taken - len(got), len(got))
                    self._given.append(piece)
                    pcm[filled : filled + len(got)] = got
                    filled += len(got)
                self._forget_finished()
                if self._items and self._items[0] is item:  # underrun, or not started
                    item.missing += (num_samples - filled) * item.started
                    break
            self.level = float(np.abs(pcm.astype(np.int32)).max(initial=0)) / 32768
            self._num_given += num_samples
            self._empty_at = self._clock() + delay_s + num_samples / self.sample_rate
            while self._given and self._given[0].start < self._num_given - MEMORY_S * self.sample_rate:
                self._given.popleft()
            return pcm

    def cut(self) -> list[PlaybackPosition]:
        """Drops all queued audio (barge-in). Returns the position of each item that was not played to its end."""
        with self._lock:
            num_heard = self._num_heard()
            unheard = {item.id: item.num_taken for item in self._items}
            for piece in self._given:
                if piece.start + piece.num_samples > num_heard:
                    unheard.setdefault(piece.item_id, 0)
            positions = dict(unheard)
            for piece in reversed(self._given):  # the earliest unheard span decides
                if piece.item_id in unheard and piece.start + piece.num_samples > num_heard:
                    positions[piece.item_id] = piece.first + max(0, num_heard - piece.start)
            self._cut.extend(unheard)
            self._items.clear()
            self._given.clear()
            return [
                PlaybackPosition(item_id, position * 1000 // self.sample_rate)
                for item_id, position in positions.items()
            ]

    @property
    def heard(self) -> PlaybackPosition | None:
        """The latest item of which the device has played something, and the position in it."""
        with self._lock:
            num_heard = self._num_heard()
            for piece in reversed(self._given):
                if piece.start < num_heard:
                    position = piece.first + min(piece.num_samples, num_heard - piece.start)
                    return PlaybackPosition(piece.item_id, position * 1000 // self.sample_rate)
            return None

    @property
    def active(self) -> bool:
        """Whether audio is playing or queued, including audio inside the device."""
        with self._lock:
            if self._items:
                return True
            return bool(self._given) and self._given[-1].start + self._given[-1].num_samples > self._num_heard()

    @property
    def num_waiting(self) -> int:
        """Number of queued samples."""
        with self._lock:
            return sum(item.num_waiting for item in self._items)

    @property
    def gap_ms(self) -> float:
        return self._gap_samples * 1000 / self.sample_rate

    def _num_heard(self) -> int:
        """Returns how many of the samples given to the device have been played."""
        inside = max(0.0, self._empty_at - self._clock()) * self.sample_rate
        return max(0, self._num_given - round(inside))

    def _find(self, item_id: str) -> _ItemQueue:
        for item in self._items:
            if item.id == item_id:
                return item
        self._items.append(_ItemQueue(item_id))
        return self._items[-1]

    def _forget_finished(self) -> None:
        while self._items and self._items[0].ended and not self._items[0].num_waiting:
            self._items.popleft()


class Ticker:
    """Ticks of 20 ms without drift: a late tick does not delay the next one."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clock, self._sleep = clock, sleep
        self._next = clock()

    async def tick(self) -> None:
        self._next += CHUNK / WIRE_RATE
        await self._sleep(max(0.0, self._next - self._clock()))


async def in_real_time(pcm: NDArray[np.int16], ticker: Ticker) -> AsyncIterator[NDArray[np.int16]]:
    """Yields the audio in chunks of 20 ms, at the pace of a microphone."""
    for start in range(0, len(pcm), CHUNK):
        await ticker.tick()
        yield pcm[start : start + CHUNK]


async def silence(ticker: Ticker) -> AsyncIterator[NDArray[np.int16]]:
    """Yields silence without end, in real time."""
    while True:
        await ticker.tick()
        yield np.zeros(CHUNK, np.int16)
