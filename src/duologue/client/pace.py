"""Sound in real time: chunks of 20 ms, each when a microphone would have it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import numpy as np
from numpy.typing import NDArray

from duologue.client.connection import WIRE_RATE

CHUNK = WIRE_RATE // 50  # samples: 20 ms

Sleep = Callable[[float], Awaitable[None]]
Clock = Callable[[], float]


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
