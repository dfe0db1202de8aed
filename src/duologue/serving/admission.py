"""Who may come in: keys, origins, hosts, how many at a time; who comes back to which conversation; and the door that
closes before the server stops."""

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

KEY_SUBPROTOCOL = "openai-insecure-api-key."  # how a browser, which cannot set headers, shows its key
STOPPING = "the server is stopping and takes nothing new; try again later"


class Refused(Exception):
    """A client is not let in.

    Attributes:
        status: of HTTP.
        code: as in OpenAI's error JSON.
        close_code: of a WebSocket that had to be accepted to be told.
    """

    def __init__(self, status: int, code: str, message: str, close_code: int = 1008) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.close_code = status, code, message, close_code


@dataclass(eq=False)
class ClientConnection:
    """One client of `/v1/realtime` that was let in.

    Attributes:
        session_id: sent in `session.created`; with `?session_id=` a dropped client comes back to its conversation.
        draining: set when the server stops: finish the current answer, then close with 1012 and a reason.
        recorder: takes the sound of both sides, or None when nothing is recorded.
    """

    session_id: str
    draining: asyncio.Event
    recorder: SessionRecorder | None = None


@dataclass(eq=False)
class _Stored:
    key: str
    conversation: SavedConversation
    timer: asyncio.TimerHandle


@dataclass(eq=False)
class ResumeStore:
    """Conversations whose client was dropped, by session id, until they are taken or expire. Lives on the event loop.

    Attributes:
        keep_s: how long; 0 keeps nothing.
        max_kept: conversations at a time; the oldest goes first.
    """

    keep_s: float
    max_kept: int
    _stored: dict[str, _Stored] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._stored)

    def put(self, session_id: str, key: str, conversation: SavedConversation) -> None:
        """Keeps the conversation of a session that was opened under this key's name."""
        if self.keep_s <= 0:
            return
        self._drop(session_id)
        while len(self._stored) >= self.max_kept:
            self._drop(next(iter(self._stored)))
        timer = asyncio.get_running_loop().call_later(self.keep_s, self._drop, session_id)
        self._stored[session_id] = _Stored(key, conversation, timer)

    def take(self, session_id: str, key: str) -> SavedConversation | None:
        """The conversation, which is then no longer kept; None if there is none or it belongs to another key."""
        stored = self._stored.get(session_id)
        if stored is None or stored.key != key:
            return None
        self._drop(session_id)
        return stored.conversation

    def clear(self) -> None:
        """Forgets everything."""
        for session_id in list(self._stored):
            self._drop(session_id)

    def _drop(self, session_id: str) -> None:
        if (stored := self._stored.pop(session_id, None)) is not None:
            stored.timer.cancel()


@dataclass(eq=False)
class Admission:
    """Counts who is in, and refuses who must stay out with a reason. Lives on the event loop."""

    settings: Settings
    metrics: Metrics
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    _sessions: Counter[str] = field(default_factory=Counter)
    _requests: int = 0

    def drain(self) -> None:
        """From now on nobody new comes in."""
        self.draining.set()

    @property
    def num_inside(self) -> int:
        """Sessions and requests under way."""
        return sum(self._sessions.values()) + self._requests

    async def empty(self) -> None:
        """Waits until everybody has left. Nobody is hurried: cancel it when the time is over."""
        while self.num_inside:
            await asyncio.sleep(0.02)

    def check_key(self, authorization: str | None, subprotocols: Sequence[str] = ()) -> str:
        """The name under which this client counts: that of its key, or "" where there are no keys.

        Raises:
            Refused: no key, or a wrong one. Takes the same time for every wrong key.
        """
        if not self.settings.api_keys:
            return ""
        scheme, _, offered = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            offered = next((p.removeprefix(KEY_SUBPROTOCOL) for p in subprotocols if p.startswith(KEY_SUBPROTOCOL)), "")
        name = ""
        for index, key in enumerate(self.settings.api_keys):
            if hmac.compare_digest(key.encode(), offered.strip().encode("utf-8", "replace")):
                name = f"key-{index}"
        if not name:
            self.metrics.refused.labels("key").inc()
            shown = "the API key is not one of this server's" if offered else "this server needs an API key"
            raise Refused(401, "invalid_api_key", f"{shown}: send it as `Authorization: Bearer KEY`")
        return name

    def check_address(self, host: str | None, origin: str | None) -> None:
        """May a page from `origin` use the server under the name `host` (with or without a port)?

        Raises:
            Refused: the page comes from elsewhere; or, while there are no keys, the name is not one of this machine,
                which is how a page of another server would pass as one of ours (DNS rebinding).
        """
        name = (urlsplit(f"//{host}").hostname if host else None) or ""
        if not self.settings.api_keys and not is_loopback_host(name) and name not in self.settings.allowed_hosts:
            self.metrics.refused.labels("host").inc()
            raise Refused(403, "host_not_allowed", f"this server is not known as {name!r}; use localhost or 127.0.0.1")
        if origin is None or origin in self.settings.allowed_origins:
            return
        if urlsplit(origin).netloc.lower() != (host or "").lower():
            self.metrics.refused.labels("origin").inc()
            raise Refused(403, "origin_not_allowed", f"pages of {origin!r} may not use this server")

    @contextmanager
    def session(self, key: str) -> Iterator[None]:
        """One real-time session under a key's name.

        Raises:
            Refused: the server stops, or is full in total or for this key.
        """
        settings = self.settings
        self._refuse_when_draining()
        if sum(self._sessions.values()) >= settings.max_sessions:
            self.metrics.refused.labels("full").inc()
            text = f"the server is full: it holds {settings.max_sessions} conversations at a time; try again later"
            raise Refused(503, "server_full", text, 1013)
        if self._sessions[key] >= settings.max_sessions_per_key:
            self.metrics.refused.labels("full_for_key").inc()
            whose = "this API key" if key else "one client"
            text = f"{whose} can hold {settings.max_sessions_per_key} conversations at a time; end one of them first"
            raise Refused(429, "too_many_sessions", text, 1013)
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
        """One REST request that the models work on.

        Raises:
            Refused: the server stops, or works on as many as it may.
        """
        self._refuse_when_draining()
        if self._requests >= self.settings.max_requests:
            self.metrics.refused.labels("busy").inc()
            text = f"the server works on {self.settings.max_requests} requests already; try again later"
            raise Refused(429, "server_busy", text)
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
            raise Refused(503, "server_stopping", STOPPING, 1012)


def new_session_id() -> str:
    """Cannot be guessed: whoever knows it can go on with the conversation."""
    return f"sess_{secrets.token_hex(16)}"
