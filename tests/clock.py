"""Clocks that a test moves."""

import asyncio


def pass_time(loop: asyncio.AbstractEventLoop, seconds: float) -> None:
    """Moves the clock of an event loop of another thread forward: timers that are due by then fire at once."""
    before = loop.time
    loop.time = lambda: before() + seconds  # type: ignore[method-assign]
    loop.call_soon_threadsafe(lambda: None)  # wakes it


class Clock:
    """Seconds; sleeping passes them at once."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)
