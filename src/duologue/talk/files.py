"""A sound file in place of the microphone, and one in place of the loudspeaker, both in real time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from duologue.audio import load_audio, resample, save_audio
from duologue.client.playback import Playback
from duologue.client.realtime import WIRE_RATE, to_pcm

CHUNK = WIRE_RATE // 50  # samples: 20 ms

Sleep = Callable[[float], Awaitable[None]]
Clock = Callable[[], float]


def read_pcm(path: str | Path) -> NDArray[np.int16]:
    """A sound file as (S,) at `WIRE_RATE`. Raises ValueError as `load_audio`."""
    wav, sample_rate = load_audio(path)
    return to_pcm(resample(wav, sample_rate, WIRE_RATE))


class Pace:
    """Ticks of 20 ms on one clock, without drift: a late tick does not move the next."""

    def __init__(self, clock: Clock = time.monotonic, sleep: Sleep = asyncio.sleep) -> None:
        self._clock, self._sleep = clock, sleep
        self._next = clock()

    async def tick(self) -> None:
        self._next += CHUNK / WIRE_RATE
        await self._sleep(max(0.0, self._next - self._clock()))


async def paced(pcm: NDArray[np.int16], pace: Pace) -> AsyncIterator[NDArray[np.int16]]:
    """The sound in chunks of 20 ms, each when a microphone would have it."""
    for start in range(0, len(pcm), CHUNK):
        await pace.tick()
        yield pcm[start : start + CHUNK]


async def silence(pace: Pace) -> AsyncIterator[NDArray[np.int16]]:
    """Silence without end."""
    while True:
        await pace.tick()
        yield np.zeros(CHUNK, np.int16)


class Recorder:
    """A loudspeaker that writes down what it plays: the answers one after the other, without the waiting between."""

    def __init__(self, playback: Playback) -> None:
        self._playback = playback
        self._played: list[NDArray[np.int16]] = []

    async def run(self, pace: Pace) -> None:
        """Plays in real time until it is cancelled."""
        while True:
            await pace.tick()
            if self._playback.active:
                self._played.append(self._playback.take(CHUNK))

    @property
    def num_samples(self) -> int:
        return sum(map(len, self._played))

    def save(self, path: str | Path) -> None:
        """Writes it as a sound file; its name says of what kind. Raises ValueError when nothing was played."""
        if not self._played:
            raise ValueError(f"{path} is not written: nothing was played")
        save_audio(path, np.concatenate(self._played).astype(np.float32) / 32768.0, WIRE_RATE)
