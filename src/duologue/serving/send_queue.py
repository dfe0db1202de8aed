"""The bounded queue of events for one client, and the task that sends them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from starlette.websockets import WebSocketDisconnect

from duologue.serving.metrics import Metrics
from duologue.serving.protocol import ServerEvent

STALLED_CODE = 1008


class SessionEnded(Exception):
    """The end of a session.

    Attributes:
        code, reason: for the WebSocket's close frame.
        label: for the metrics.
    """

    def __init__(self, code: int, reason: str, label: str) -> None:
        super().__init__(reason)
        self.code, self.reason, self.label = code, reason, label


class Socket(Protocol):
    async def send_text(self, data: str) -> None: ...


class SendQueue:
    """Events in order. `put` waits while the queue is full. A client that blocks one event for `stall_s` is dropped.

    Args:
        observe: called with the type of each event when it enters the queue.
    """

    def __init__(
        self, socket: Socket, max_events: int, stall_s: float, metrics: Metrics, observe: Callable[[str], None]
    ) -> None:
        self._socket, self._stall_s, self._metrics, self._observe = socket, stall_s, metrics, observe
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
            event: the event.
            unless: called before sending; if true, the event is dropped.
            when_sent: called after sending.
        """
        self._metrics.outbound_events.observe(self._queue.qsize())
        self._observe(event.type)
        await self._queue.put((event, unless, when_sent))

    async def send(self) -> None:
        """Sends events until the client stalls or disconnects; then raises SessionEnded."""
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
                raise SessionEnded(
                    STALLED_CODE, f"the client has read nothing for {self._stall_s:g} s while events waited", "stalled"
                ) from None
            except WebSocketDisconnect:
                raise SessionEnded(1000, "the client disconnected", "client") from None
            finally:
                self._queue.task_done()

    async def empty(self) -> None:
        """Waits until every event has been sent."""
        await self._queue.join()
