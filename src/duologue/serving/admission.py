"""Admission of clients: API keys, origins, hosts, limits, resumable conversations, and draining before the server
stops."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from duologue.serving.items import SavedConversation
from duologue.serving.metrics import Metrics
from duologue.serving.recording import SessionRecorder
from duologue.serving.settings import Settings, is_loopback_host

KEY_SUBPROTOCOL = "openai-insecure-api-key."  # browsers cannot set headers on a WebSocket
STOPPING = "the server is stopping and accepts no new work; try again later"


class AdmissionError(Exception):
    """The refusal of a client.

    Attributes:
        status: HTTP status.
        code: error code, as in OpenAI's error JSON.
        close_code: WebSocket close code, used where the socket is accepted to send the reason.
    """

    def __init__(self, status: int, code: str, message: str, close_code: int = 1008) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.close_code = status, code, message, close_code


@dataclass(eq=False)
class ClientConnection:
    """An admitted client of `/v1/realtime`.

    Attributes:
        session_id: sent in `session.created`; a dropped client resumes its conversation with `?session_id=`.
        draining: set when the server stops. The current answer is finished first, then the socket closes with 1012.
        recorder: records the audio of both sides; None when recording is off.
    """

    session_id: str
    draining: asyncio.Event
    recorder: SessionRecorder | None = None


@dataclass(eq=False)
class _StoredConversation:
    key: str
    conversation: SavedConversation
    timer: asyncio.TimerHandle


@dataclass(eq=False)
class ResumeStore:
    """Conversations of dropped clients by session id, until they are taken or expire. Belongs to the event loop.

    Attributes:
        keep_s: time to live in seconds; 0 stores nothing.
        max_kept: maximum number of conversations; the oldest is dropped first.
    """

    keep_s: float
    max_kept: int
    _stored: dict[str, _StoredConversation] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._stored)

    def put(self, session_id: str, key: str, conversation: SavedConversation) -> None:
        """Stores the conversation of a session opened under this key name."""
        if self.keep_s <= 0:
            return
        self._drop(session_id)
        while len(self._stored) >= self.max_kept:
            self._drop(next(iter(self._stored)))
        timer = asyncio.get_running_loop().call_later(self.keep_s, self._drop, session_id)
        self._stored[session_id] = _StoredConversation(key, conversation, timer)

    def take(self, session_id: str, key: str) -> SavedConversation | None:
        """Removes and returns the conversation. Returns None if there is none or another key owns it."""
        stored = self._stored.get(session_id)
        if stored is None or stored.key != key:
            return None
        self._drop(session_id)
        return stored.conversation

    def clear(self) -> None:
        for session_id in list(self._stored):
            self._drop(session_id)

    def _drop(self, session_id: str) -> None:
        if (stored := self._stored.pop(session_id, None)) is not None:
            stored.timer.cancel()


@dataclass(eq=False)
class Admission:
    """Counts active clients and refuses new ones with a reason. Belongs to the event loop."""

    settings: Settings
    metrics: Metrics
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    _sessions: Counter[str] = field(default_factory=Counter)
    _requests: int = 0

    def drain(self) -> None:
        """Refuses every new client from now on."""
        self.draining.set()

    @property
    def num_active(self) -> int:
        """Number of active sessions and requests."""
        return sum(self._sessions.values()) + self._requests

    async def wait_until_idle(self) -> None:
        """Waits until every session and request has ended. Cancel it to stop waiting."""
        while self.num_active:
            await asyncio.sleep(0.02)

    def check_key(self, authorization: str | None, subprotocols: Sequence[str] = ()) -> str:
        """Returns the name of the client's key, or "" on a server without keys.

        Raises:
            AdmissionError: the key is missing or wrong. The comparison takes constant time.
        """
        if not self.settings.api_keys:
            return ""
        offered = offered_key(authorization, subprotocols)
        name = ""
        for index, key in enumerate(self.settings.api_keys):
            if hmac.compare_digest(key.encode(), offered.encode("utf-8", "replace")):
                name = f"key-{index}"
        if not name:
            self.metrics.refused.labels("key").inc()
            problem = "the API key is wrong" if offered else "this server needs an API key"
            raise AdmissionError(401, "invalid_api_key", f"{problem}: send it as `Authorization: Bearer KEY`")
        return name

    def check_address(self, host: str | None, origin: str | None, allowed: str | None = None) -> None:
        """Checks the page's `origin` and the `host` name (with or without a port) of a request.

        Args:
            allowed: one more allowed origin, of the request's client secret.

        Raises:
            AdmissionError: the page belongs to another server. Without keys, a host name that is not one of this
                machine is refused too: DNS rebinding would pass a foreign page as ours.
        """
        name = (urlsplit(f"//{host}").hostname if host else None) or ""
        if not self.settings.api_keys and not is_loopback_host(name) and name not in self.settings.allowed_hosts:
            self.metrics.refused.labels("host").inc()
            raise AdmissionError(
                403,
                "host_not_allowed",
                f"this server does not accept the host name {name!r}; use localhost or 127.0.0.1, or start it with "
                "--keys FILE, which admits every host name",
            )
        if origin is None or origin == allowed or origin in self.settings.allowed_origins:
            return
        if urlsplit(origin).netloc.lower() != (host or "").lower():
            self.metrics.refused.labels("origin").inc()
            raise AdmissionError(
                403,
                "origin_not_allowed",
                f"pages of {origin!r} may not use this server, which --origin at its start would admit",
            )

    @contextmanager
    def session(self, key: str) -> Iterator[None]:
        """Counts one real-time session under a key name.

        Raises:
            AdmissionError: the server is stopping, or is full in total or for this key.
        """
        settings = self.settings
        self._refuse_when_draining()
        if sum(self._sessions.values()) >= settings.max_sessions:
            self.metrics.refused.labels("full").inc()
            text = f"the server is full: it holds {settings.max_sessions} conversations at a time; try again later"
            raise AdmissionError(503, "server_full", text, 1013)
        if self._sessions[key] >= settings.max_sessions_per_key:
            self.metrics.refused.labels("full_for_key").inc()
            owner = "this API key" if key else "one client"
            text = f"{owner} can hold {settings.max_sessions_per_key} conversations at a time; end one of them first"
            raise AdmissionError(429, "too_many_sessions", text, 1013)
        self._sessions[key] += 1
        self.metrics.sessions.inc()
        self.metrics.sessions_opened.inc()
        try:
            yield
        finally:
            self._sessions[key] -= 1
            if not self._sessions[key]:
                del self._sessions[key]
            self.metrics.sessions.dec()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts one REST request that uses the models.

        Raises:
            AdmissionError: the server is stopping, or has reached `max_requests`.
        """
        self._refuse_when_draining()
        if self._requests >= self.settings.max_requests:
            self.metrics.refused.labels("busy").inc()
            text = f"the server already works on {self.settings.max_requests} requests; try again later"
            raise AdmissionError(429, "server_busy", text)
        self._requests += 1
        self.metrics.requests_running.inc()
        try:
            yield
        finally:
            self._requests -= 1
            self.metrics.requests_running.dec()

    def _refuse_when_draining(self) -> None:
        if self.draining.is_set():
            self.metrics.refused.labels("draining").inc()
            raise AdmissionError(503, "server_stopping", STOPPING, 1012)


def offered_key(authorization: str | None, subprotocols: Sequence[str] = ()) -> str:
    """Returns the key that a client sends in its header or, as browsers do, in a WebSocket subprotocol; "" if none."""
    scheme, _, offered = (authorization or "").partition(" ")
    if scheme.lower() != "bearer":
        offered = next((p.removeprefix(KEY_SUBPROTOCOL) for p in subprotocols if p.startswith(KEY_SUBPROTOCOL)), "")
    return offered.strip()


def new_session_id() -> str:
    """Returns a session id that cannot be guessed, because its holder can resume the conversation."""
    return f"sess_{secrets.token_hex(16)}"
