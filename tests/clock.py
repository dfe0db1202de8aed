"""A clock that only a test moves."""

import asyncio


class Clock:
    """Seconds; sleeping passes them at once."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)
