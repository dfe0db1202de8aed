"""The route `/v1/realtime`: the life of a WebSocket from its request to the close and its reason.

Handles admission, resumption, and the end of a conversation.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import sys
import time
import traceback
from collections.abc import MutableMapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from starlette.datastructures import Headers
from starlette.websockets import WebSocketState

from duologue.serving.admission import AdmissionError, ClientConnection, new_session_id, offered_key
from duologue.serving.client_secrets import ClientSecrets
from duologue.serving.errors import error_response
from duologue.serving.items import Items, SavedConversation
from duologue.serving.objects import ProtocolError, SessionConfig
from duologue.serving.protocol import Error, new_id
from duologue.serving.realtime_session import RealtimeSession
from duologue.serving.recording import SessionRecorder
from duologue.serving.send_queue import SendQueue, SessionEnded
from duologue.serving.service import Service
from duologue.serving.session_records import SessionWriter
from duologue.serving.settings import Settings

log = logging.getLogger(__name__)

SUBPROTOCOL = "realtime"
DISCONNECT_S = 5.0
CLOSE_S = 2.0  # wait for the client's close frame
MAX_REASON = 120  # bytes; a close frame holds 123


class SessionSocket(Protocol):
    """What a session uses of a WebSocket; a call over WebRTC has the same methods."""

    async def send_text(self, data: str) -> None: ...
    async def receive(self) -> MutableMapping[str, Any]: ...
    async def close(self, code: int = 1000, reason: str = "") -> None: ...


class CallSocket(SessionSocket, Protocol):
    """A call, which opens after its answer has been sent."""

    async def wait_until_open(self) -> bool: ...


@dataclass(eq=False)
class _OpenConnection:
    key: str
    task: asyncio.Task[None]
    closed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class ConnectionManager:
    """The open connections of one server."""

    service: Service
    secrets: ClientSecrets
    _open: dict[str, _OpenConnection] = field(default_factory=dict)  # by session id
    _calls: set[asyncio.Task[None]] = field(default_factory=set)

    async def connect(self, socket: WebSocket, model: str, session_id: str) -> None:
        """Handles one WebSocket from its request to its end."""
        offered = socket.scope.get("subprotocols") or []
        try:
            key, config = self.admit(socket.headers, model, offered)
            await self._disconnect_previous(session_id, key)
            with self.service.admission.session(key):
                await socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
                await self._serve(socket, config, model or config.model or self.service.model, session_id, key)
        except AdmissionError as error:
            await self._refuse(socket, error)

    def admit(self, headers: Headers, model: str, offered: Sequence[str] = ()) -> tuple[str, SessionConfig]:
        """Returns the name of the client's key, and the configuration of its new session.

        Args:
            headers: of the request.
            model: the model that the client asks for, or "".
            offered: subprotocols of a WebSocket.

        Raises:
            AdmissionError: the key, the client secret, the page or the host name is not accepted.
        """
        admission = self.service.admission
        host, origin, authorization = headers.get("host"), headers.get("origin"), headers.get("authorization")
        secret = self.secrets.find(offered_key(authorization, offered))
        if secret is None:
            admission.check_address(host, origin)
            return admission.check_key(authorization, offered), self.service.session_config()
        admission.check_address(host, origin, secret.allowed_origin)
        secret.claim(origin, model)
        return secret.key, secret.config

    def start_call(self, call: CallSocket, config: SessionConfig, key: str) -> None:
        """Serves a call in a task of its own. Raises AdmissionError."""
        counted = ExitStack()
        counted.enter_context(self.service.admission.session(key))

        async def serve() -> None:
            with counted:
                try:
                    if await call.wait_until_open():
                        await self._serve(call, config, config.model or self.service.model, "", key)
                finally:
                    await call.close()

        task = asyncio.create_task(serve())
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def end_calls(self) -> None:
        """Ends all calls when the server stops."""
        calls = list(self._calls)
        for task in calls:
            task.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def _disconnect_previous(self, session_id: str, key: str) -> None:
        """Ends the earlier connection of a client that reconnects before the server noticed the drop."""
        existing = self._open.get(session_id)
        if existing is not None and existing.key == key:
            existing.task.cancel()
            with suppress(TimeoutError):
                async with asyncio.timeout(DISCONNECT_S):
                    await existing.closed.wait()

    async def _serve(self, socket: SessionSocket, config: SessionConfig, model: str, session_id: str, key: str) -> None:
        service, settings = self.service, self.service.settings
        saved = await service.resume(session_id, key) if session_id else None
        if saved is None:
            session_id = new_session_id()
            saved = SavedConversation(config, Items(service.bot.models.vocabulary, new_id("conv")))
        else:
            service.metrics.sessions_resumed.inc()
        expires_at = int(time.time() + settings.session_s)
        # Clients see the model name that they requested.
        saved.config = saved.config.model_copy(update={"id": session_id, "model": model, "expires_at": expires_at})
        client = ClientConnection(session_id, service.admission.draining)
        if settings.record_folder is not None:
            client.recorder = await asyncio.to_thread(
                SessionRecorder, settings.record_folder, session_id, service.model
            )
        writer = SessionWriter(service.sessions, session_id, key, saved)
        task = asyncio.create_task(_run_session(socket, service, client, saved, writer))
        existing = self._open[session_id] = _OpenConnection(key, task)
        log.info("conversation started (%s), %d open", key or "no key", len(self._open))
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await writer.write()
            service.resumable.put(session_id, key, saved)
            if client.recorder is not None:
                await _finish_recording(client.recorder, saved)
            del self._open[session_id]
            log.info("conversation ended (%s), %d open", key or "no key", len(self._open))
            existing.closed.set()
            if not self._open:
                asyncio.get_running_loop().run_in_executor(None, _trim_heap)

    async def _refuse(self, socket: WebSocket, error: AdmissionError) -> None:
        """Sends a refusal.

        Browsers hide HTTP statuses from pages. A page is therefore accepted and receives an error event, unless its
        origin or host is not allowed.
        """
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


def _trim_heap() -> None:
    """Returns free memory to the system (glibc does not do so by itself)."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


async def _finish_recording(recorder: SessionRecorder, saved: SavedConversation) -> None:
    """Completes the recording in a thread. The conversation holds the turns given to the model."""
    about = {
        "session": saved.config.model_dump(mode="json"),
        "items": [item.body.model_dump(mode="json", exclude_none=True) for item in saved.items],
    }
    try:
        await asyncio.shield(asyncio.to_thread(recorder.finish, saved.items.turns(), about))
    except OSError as error:
        log.error("a recording could not be written: %s", error.strerror)
        await asyncio.to_thread(recorder.discard)


async def _run_session(
    socket: SessionSocket,
    service: Service,
    client: ClientConnection,
    conversation: SavedConversation,
    writer: SessionWriter,
) -> None:
    """Runs one conversation over an accepted WebSocket until it closes. Updates `conversation`."""
    settings, metrics = service.settings, service.metrics
    queue = SendQueue(socket, settings.outbound_events, settings.stall_s, metrics, writer.note)
    session: RealtimeSession | None = None
    # The default reason: the tasks were cancelled from outside.
    ending = SessionEnded(1012, "the server ended the connection", "draining")
    try:
        async with asyncio.TaskGroup() as tasks:
            session = RealtimeSession(service.bot, settings, metrics, client, queue, tasks, conversation)
            tasks.create_task(queue.send())
            tasks.create_task(writer.run())
            tasks.create_task(_end_after(settings.session_s))
            tasks.create_task(_end_when_draining(client, session, queue))
            await session.begin()
            await _receive_messages(socket, session, settings)
    except* SessionEnded as group:
        ending = _ending_of(group)
        # Breaks the reference cycle between the group and its frame, so that audio is freed at once.
        traceback.clear_frames(group.__traceback__)
    except* Exception:
        ending = SessionEnded(1011, "the server failed; see its log", "error")
        log.exception("a conversation failed")
    finally:
        if session is not None:
            session.end()
        metrics.closed.labels(ending.label).inc()
        with suppress(Exception):
            async with asyncio.timeout(CLOSE_S):
                await socket.close(ending.code, ending.reason)


async def _receive_messages(socket: SessionSocket, session: RealtimeSession, settings: Settings) -> None:
    """Receives messages until it raises SessionEnded."""
    clock = asyncio.get_running_loop().time
    idle_at = clock() + settings.idle_s
    while True:
        stalls_at = session.turn_stalls_at
        try:
            async with asyncio.timeout_at(idle_at if stalls_at is None else min(idle_at, stalls_at)):
                message = await socket.receive()
        except TimeoutError:
            if stalls_at is not None and stalls_at < idle_at:
                await session.end_stalled_turn()
                continue
            raise SessionEnded(1000, f"the client has sent nothing for {settings.idle_s:g} s", "idle") from None
        except (WebSocketDisconnect, RuntimeError):
            raise SessionEnded(1000, "the client disconnected", "client") from None
        if message["type"] == "websocket.disconnect":
            raise SessionEnded(1000, "the client disconnected", "client")
        text = message.get("text")
        content: str | bytes = message.get("bytes") or b"" if text is None else text
        if len(content) > settings.max_message_bytes:
            raise SessionEnded(1009, f"a message may have at most {settings.max_message_bytes} bytes", "message_size")
        await session.take(content)
        idle_at = clock() + settings.idle_s


async def _end_after(session_s: float) -> None:
    await asyncio.sleep(session_s)
    raise SessionEnded(1000, f"a session may last at most {session_s:g} s", "session_length")


async def _end_when_draining(client: ClientConnection, session: RealtimeSession, queue: SendQueue) -> None:
    """Ends the session when the server stops, after the current answers."""
    await client.draining.wait()
    await session.finish_answers()
    await queue.empty()
    raise SessionEnded(1012, "the server is stopping; connect again later", "draining")


def _ending_of(group: BaseExceptionGroup[SessionEnded]) -> SessionEnded:
    """Returns a copy of the first end in the group, without the traceback, which would keep the session alive."""
    first = group.exceptions[0]
    if isinstance(first, BaseExceptionGroup):
        return _ending_of(first)
    return SessionEnded(first.code, first.reason, first.label)


def realtime_routes(conversations: ConnectionManager) -> APIRouter:
    router = APIRouter()

    @router.websocket("/v1/realtime")
    async def realtime(socket: WebSocket, model: str = "", session_id: str = "") -> None:
        await conversations.connect(socket, model, session_id)

    return router
