"""An event loop with a simulated clock: idle time costs nothing, and computation takes no simulated time.

The clock stands still while anything computes. When every thread is idle and every task waits, it moves to the next
timer. So a conversation of an hour takes as long as its computation, and the same run gives the same times.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple, Unpack

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

START_S = 1000.0  # a clock that starts at 0 would look like times that were never set
POLL_S = 0.005


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time` is simulated.

    Args:
        busy: returns whether a thread computes whose result the loop may wait for. It must become false only after
            that thread has scheduled its callbacks. Calls in executors of this loop need not be reported.
    """

    def __init__(self, busy: Callable[[], bool]) -> None:
        self._now, self._busy, self._num_calls = START_S, busy, 0
        super().__init__(_SimulatedSelector(self))

    def time(self) -> float:
        return self._now

    @property
    def busy(self) -> bool:
        return self._num_calls > 0 or self._busy()

    def move(self, seconds: float) -> None:
        """Moves the clock forward."""
        self._now += seconds

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Arguments]], Result], *args: *Arguments
    ) -> asyncio.Future[Result]:
        future = super().run_in_executor(executor, func, *args)
        self._num_calls += 1
        future.add_done_callback(self._call_done)
        return future

    def _call_done(self, _: asyncio.Future[Any]) -> None:
        self._num_calls -= 1

    async def shutdown_default_executor(self, *timeout: Any) -> None:
        self._num_calls += 1
        try:
            await super().shutdown_default_executor(*timeout)
        finally:
            self._num_calls -= 1


class _SimulatedSelector(selectors.DefaultSelector):
    """A selector that moves the clock of its loop instead of waiting."""

    def __init__(self, loop: SimulatedLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        while self._loop.busy:
            if events := super().select(POLL_S):
                return events
        if events := super().select(0):  # a callback of the last computation
            return events
        if timeout is None:
            raise RuntimeError("every task waits, and nothing will wake one: the simulated time has no next moment")
        self._loop.move(timeout)
        return events


def run_simulated(work: Coroutine[Any, Any, Result], busy: Callable[[], bool]) -> Result:
    """Runs a coroutine as `asyncio.run` does, in simulated time; see `SimulatedLoop`."""
    with asyncio.Runner(loop_factory=lambda: SimulatedLoop(busy)) as runner:
        return runner.run(work)
