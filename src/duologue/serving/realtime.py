"""The route `/v1/realtime`: who may open a conversation, which one is resumed, and what remains when it ends."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import sys
from contextlib import suppress
from dataclasses import dataclass, field

from fastapi import APIRouter, WebSocket
from starlette.websockets import WebSocketState

from duologue.serving.admission import Refused, Visit, new_session_id
from duologue.serving.connection import converse
from duologue.serving.errors import error_response
from duologue.serving.live import Kept
from duologue.serving.objects import ProtocolError
from duologue.serving.protocol import Error
from duologue.serving.recording import Recorder
from duologue.serving.service import Service
from duologue.turns import Conversation

log = logging.getLogger(__name__)

SUBPROTOCOL = "realtime"
LEAVE_S = 5.0
MAX_REASON = 120  # bytes; a close frame holds 123


@dataclass(eq=False)
class _Open:
    key: str
    task: asyncio.Task[None]
    left: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class Conversations:
    """The conversations of one server."""

    service: Service
    _open: dict[str, _Open] = field(default_factory=dict)  # by session id

    async def visit(self, socket: WebSocket, model: str, session_id: str) -> None:
        """One WebSocket from its request to its end."""
        service = self.service
        offered = socket.scope.get("subprotocols") or []
        try:
            service.admission.check_address(socket.headers.get("host"), socket.headers.get("origin"))
            key = service.admission.check_key(socket.headers.get("authorization"), offered)
            await self._leave(session_id, key)
            with service.admission.session(key):
                await socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
                await self._hold(socket, model or service.model, session_id, key)
        except Refused as error:
            await self._refuse(socket, error)

    async def _leave(self, session_id: str, key: str) -> None:
        """Ends the connection of a client that comes back before the server noticed that it was gone."""
        there = self._open.get(session_id)
        if there is not None and there.key == key:
            there.task.cancel()
            with suppress(TimeoutError):
                async with asyncio.timeout(LEAVE_S):
                    await there.left.wait()

    async def _hold(self, socket: WebSocket, model: str, session_id: str, key: str) -> None:
        service, settings = self.service, self.service.settings
        resumed = service.shelf.take(session_id, key) if session_id else None
        visit = Visit(session_id if resumed is not None else new_session_id(), service.admission.draining)
        visit.resumed = resumed
        if resumed is not None:
            service.metrics.sessions_resumed.inc()
        if settings.record_folder is not None:
            visit.recorder = await asyncio.to_thread(Recorder, settings.record_folder, visit.session_id, service.model)
        task = asyncio.create_task(converse(socket, service.bot, settings, service.metrics, model, visit))
        there = self._open[visit.session_id] = _Open(key, task)
        log.info("a conversation begins (%s), %d now", key or "no key", len(self._open))
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            if visit.kept is not None:
                service.shelf.put(visit.session_id, key, visit.kept)
            await _finish_recording(visit)
            del self._open[visit.session_id]
            log.info("a conversation ends (%s), %d now", key or "no key", len(self._open))
            there.left.set()
            if not self._open:
                asyncio.get_running_loop().run_in_executor(None, _give_memory_back)

    async def _refuse(self, socket: WebSocket, error: Refused) -> None:
        """Says no. A browser's page cannot read an HTTP status, so it is let in to be told; strange pages are not."""
        self.service.metrics.errors.labels(error.code).inc()
        if socket.application_state is WebSocketState.CONNECTED:
            pass
        elif error.code in ("origin_not_allowed", "host_not_allowed") or "origin" not in socket.headers:
            await socket.send_denial_response(error_response(error.message, error.status, error.code))
            return
        else:
            offered = socket.scope.get("subprotocols") or []
            await socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        with suppress(RuntimeError):
            await socket.send_text(Error.of(ProtocolError(error.message, error.code, kind=kind)).model_dump_json())
            await socket.close(error.close_code, error.message[:MAX_REASON])


def _give_memory_back() -> None:
    """What is free goes back to the system, where the C library does not do that by itself (glibc)."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


async def _finish_recording(visit: Visit) -> None:
    """Gives the recording its name, in a thread. The conversation is what the model was shown of it."""
    recorder, kept = visit.recorder, visit.kept
    if recorder is None:
        return
    conversation, about = Conversation(), dict(visit.about)
    if isinstance(kept, Kept):
        turns = tuple(item.turn for item in kept.items if item.turn is not None)
        conversation = Conversation(turns, kept.items.vocabulary.hash)
        about |= {
            "session": kept.config.model_dump(mode="json"),
            "items": [item.body.model_dump(mode="json", exclude_none=True) for item in kept.items],
        }
    try:
        await asyncio.shield(asyncio.to_thread(recorder.finish, conversation, about))
    except OSError as error:
        log.error("a recording could not be written: %s", error.strerror)
        await asyncio.to_thread(recorder.discard)


def realtime_routes(service: Service) -> APIRouter:
    """`/v1/realtime`."""
    router = APIRouter()
    conversations = Conversations(service)

    @router.websocket("/v1/realtime")
    async def realtime(socket: WebSocket, model: str = "", session_id: str = "") -> None:
        await conversations.visit(socket, model, session_id)

    return router
