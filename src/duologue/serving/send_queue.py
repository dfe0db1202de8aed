"""Events on their way to one client: a bounded queue and the task that empties it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple, Protocol

from starlette.websockets import WebSocketDisconnect

from duologue.serving.metrics import Metrics
from duologue.serving.protocol import ServerEvent

STALLED_CODE = 1008


class Ending(NamedTuple):
    """Attributes:
    code, reason: for the WebSocket's close.
    label: for the metrics.
    """

    code: int
    reason: str
    label: str


class Ended(Exception):
    """The conversation is over."""

    def __init__(self, code: int, reason: str, label: str) -> None:
        super().__init__(reason)
        self.ending = Ending(code, reason, label)


class Socket(Protocol):
    async def send_text(self, data: str) -> None: ...


class SendQueue:
    """Events in order. Whoever adds one waits while the queue is full; a client that reads nothing for so long that one
    event cannot be sent within `stall_s` is given up."""

    def __init__(self, socket: Socket, max_events: int, stall_s: float, metrics: Metrics) -> None:
        self._socket, self._stall_s, self._metrics = socket, stall_s, metrics
        self._queue: asyncio.Queue[tuple[ServerEvent, Callable[[], bool] | None, Callable[[], None] | None]]
        self._queue = asyncio.Queue(max_events)

    async def put(
        self,
        event: ServerEvent,
        unless: Callable[[], bool] | None = None,
        when_sent: Callable[[], None] | None = None,
    ) -> None:
        """Adds an event.

        Args:
            unless: asked when the event's turn has come; it is dropped when this is true by then.
            when_sent: called when the event has left.
        """
        self._metrics.outbound_events.observe(self._queue.qsize())
        await self._queue.put((event, unless, when_sent))

    async def send(self) -> None:
        """Sends for ever. Raises Ended when the client has stalled or is gone."""
        while True:
            event, unless, when_sent = await self._queue.get()
            try:
                if unless is not None and unless():
                    continue
                async with asyncio.timeout(self._stall_s):
                    await self._socket.send_text(event.to_json())
                if when_sent is not None:
                    when_sent()
            except TimeoutError:
                raise Ended(
                    STALLED_CODE, f"the client has read nothing for {self._stall_s:g} s while events waited", "stalled"
                ) from None
            except WebSocketDisconnect:
                raise Ended(1000, "the client is gone", "client") from None
            finally:
                self._queue.task_done()

    async def empty(self) -> None:
        """Waits until everything has been sent."""
        await self._queue.join()
