"""A connection to a server of OpenAI's Realtime protocol, this one or another.

Audio on the wire is pcm: 16-bit little-endian, mono, 24 kHz, base64 in JSON text frames.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np
from numpy.typing import NDArray
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

WIRE_RATE = 24_000
PATH = "/v1/realtime"
MAX_MESSAGE = 16 * 2**20  # bytes of one event from the server
CONNECT_S = 20.0
RETRIES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)  # waits before the tries to reconnect; the server keeps a session for 60 s
# Close codes after which the same conversation can go on: no close frame, going away, restart, full, bad gateway.
TRANSIENT = (1001, 1006, 1011, 1012, 1013, 1014)

ServerEvent = dict[str, Any]


class ConnectionLost(RuntimeError):
    """The server or the network ended the conversation. The message is one sentence with code and reason.

    Attributes:
        code: the close code; 1006 without a close frame, 0 if the connection is still open.
    """

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


def realtime_url(server: str, model: str) -> str:
    """Converts `http://host:port`, `ws://host:port/v1/realtime` or `host:port` to the WebSocket URL.

    Raises:
        ValueError: the host is missing, or the scheme is not http, https, ws or wss.
    """
    parts = urlsplit(server if "://" in server else f"ws://{server}")
    scheme = {"http": "ws", "ws": "ws", "https": "wss", "wss": "wss"}.get(parts.scheme)
    if scheme is None or not parts.hostname:
        raise ValueError(f"{server!r} is not a server URL; an example is http://127.0.0.1:8000")
    path = parts.path.rstrip("/")
    if not path.endswith("/realtime"):
        path = f"{path}/realtime" if path.endswith("/v1") else f"{path}{PATH}"
    query = parts.query or urlencode({"model": model})
    return f"{scheme}://{parts.netloc}{path}?{query}"


class Connection:
    """One conversation with a server; opened by `open_connection`."""

    def __init__(self, socket: ClientConnection, url: str) -> None:
        self.socket, self.url = socket, url

    async def send(self, event: Mapping[str, object]) -> None:
        """Sends one client event. Raises ConnectionLost."""
        try:
            await self.socket.send(json.dumps(event))
        except ConnectionClosed as closed:
            raise _connection_lost(self.url, closed) from None

    async def append(self, pcm: NDArray[np.int16]) -> None:
        """Appends pcm (S,) at `WIRE_RATE` to the input buffer. Raises ConnectionLost."""
        await self.send({"type": "input_audio_buffer.append", "audio": encode_pcm(pcm)})

    async def receive(self) -> ServerEvent:
        """Returns the next server event. Raises ConnectionLost."""
        try:
            event = json.loads(await self.socket.recv())
        except ConnectionClosed as closed:
            raise _connection_lost(self.url, closed) from None
        except ValueError as error:
            raise ConnectionLost(f"{self.url} sent a message that is not an event ({error})") from None
        if not isinstance(event, dict) or not isinstance(event.get("type"), str):
            raise ConnectionLost(f"{self.url} sent a message that is not an event")
        return event

    async def receive_until(self, *kinds: str) -> list[ServerEvent]:
        """Returns all events up to and including the first one of these types."""
        events = [await self.receive()]
        while events[-1]["type"] not in kinds:
            events.append(await self.receive())
        return events


class ResumingConnection(Connection):
    """A connection that comes back to its conversation after a drop, while `receive` is awaited.

    `receive` then also returns events of the client: `talk.reconnecting` (reason, retry_s, attempt, attempts) before
    each try, and `talk.reconnected` (resumed: whether the server still had the conversation) before the server's
    `session.created`. `send` waits meanwhile. After the last try `receive` raises ConnectionLost.
    """

    def __init__(
        self,
        socket: ClientConnection,
        url: str,
        dial: Callable[[str], Awaitable[ClientConnection]],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Args:
        socket, url: the open connection.
        dial: opens a URL; raises ValueError.
        sleep: waits for a number of seconds.
        """
        super().__init__(socket, url)
        self._dial, self._sleep = dial, sleep
        self._session_id = ""
        self._created: ServerEvent | None = None  # received, but not returned yet
        self._lost: ConnectionLost | None = None
        self._attempt = 0
        self._usable = asyncio.Event()
        self._usable.set()

    async def send(self, event: Mapping[str, object]) -> None:
        while True:
            await self._usable.wait()
            socket = self.socket
            try:
                return await super().send(event)
            except ConnectionLost as lost:
                if lost.code not in TRANSIENT:
                    raise
                if socket is self.socket:
                    self._usable.clear()

    async def receive(self) -> ServerEvent:
        while self._lost is not None:
            event = await self._try_again(self._lost)
            if event is not None:
                return event
        if self._created is not None:
            event, self._created = self._created, None
            return event
        try:
            event = await super().receive()
        except ConnectionLost as lost:
            if lost.code not in TRANSIENT or not self._session_id:
                raise
            self._lost, self._attempt = lost, 0
            self._usable.clear()
            return self._announcement(lost)
        if event["type"] == "session.created":
            self._session_id = event["session"].get("id", "")
        return event

    def _announcement(self, lost: ConnectionLost) -> ServerEvent:
        waits = {"retry_s": RETRIES_S[self._attempt], "attempt": self._attempt + 1, "attempts": len(RETRIES_S)}
        return {"type": "talk.reconnecting", "reason": str(lost), **waits}

    async def _try_again(self, lost: ConnectionLost) -> ServerEvent | None:
        """Waits and connects once; returns the event that announces the result."""
        await self._sleep(RETRIES_S[self._attempt])
        try:
            self.socket = await self._dial(with_session(self.url, self._session_id))
            created = await super().receive()
            if created["type"] != "session.created":
                reason = created.get("error", {}).get("message", created["type"])
                raise ConnectionLost(f"{self.url} refused the conversation: {reason}")
        except (ValueError, ConnectionLost) as failed:
            self._attempt += 1
            if self._attempt == len(RETRIES_S):
                raise ConnectionLost(f"{lost}; {len(RETRIES_S)} tries to reconnect failed: {failed}") from None
            return self._announcement(lost)
        before, self._session_id = self._session_id, created.get("session", {}).get("id", "")
        self._created, self._lost = created, None
        self._usable.set()
        return {"type": "talk.reconnected", "resumed": before == self._session_id}


def with_session(url: str, session_id: str) -> str:
    """Returns the URL that resumes a session."""
    parts = urlsplit(url)
    query = [(name, value) for name, value in parse_qsl(parts.query) if name != "session_id"]
    return parts._replace(query=urlencode([*query, ("session_id", session_id)])).geturl()


@contextlib.asynccontextmanager
async def open_connection(
    server: str, model: str = "pocket", key: str = "", reconnect: bool = False
) -> AsyncIterator[Connection]:
    """Opens a connection and closes it at the end.

    Args:
        server: see `realtime_url`.
        model: name of the model.
        key: API key, or empty.
        reconnect: resume the conversation after a drop, see `ResumingConnection`.

    Raises:
        ValueError: one sentence: the URL is invalid, no server answers, or it refused the client.
    """
    url = realtime_url(server, model)
    socket = await _dial(url, key)
    connection = Connection(socket, url)
    if reconnect:
        connection = ResumingConnection(socket, url, lambda address: _dial(address, key))
    try:
        yield connection
    finally:
        await connection.socket.close()


async def _dial(url: str, key: str) -> ClientConnection:
    """Opens a WebSocket. Raises ValueError as `open_connection`."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        return await connect(
            url,
            additional_headers=headers,
            max_size=MAX_MESSAGE,
            open_timeout=CONNECT_S,
            proxy=None if _is_loopback(url) else True,
        )
    except InvalidStatus as error:
        body = error.response.body or b""
        reason = _error_sentence(body.decode("utf-8", "replace")) or error.response.reason_phrase
        raise ValueError(f"{url} refused the conversation: {error.response.status_code} {reason}") from None
    except ConnectionClosed as error:
        raise ValueError(str(_connection_lost(url, error))) from None
    except TimeoutError:
        raise ValueError(f"{url} did not answer within {CONNECT_S:.0f} s") from None
    except (OSError, InvalidHandshake, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"there is no real-time server at {url} ({reason}); `duologue serve` starts one") from None


def encode_pcm(pcm: NDArray[np.int16]) -> str:
    return base64.b64encode(pcm.astype("<i2").tobytes()).decode("ascii")


def decode_pcm(text: str) -> NDArray[np.int16]:
    """Decodes base64 of 16-bit little-endian samples to (S,) int16. Raises ValueError for other text."""
    return np.frombuffer(base64.b64decode(text, validate=True), "<i2").astype(np.int16)


def _connection_lost(url: str, closed: ConnectionClosed) -> ConnectionLost:
    if closed.rcvd is None:
        return ConnectionLost(f"the connection to {url} broke", 1006)
    reason = _error_sentence(closed.rcvd.reason) or "without a reason"
    return ConnectionLost(f"{url} ended the conversation ({closed.rcvd.code}): {reason}", closed.rcvd.code)


def _error_sentence(text: str) -> str:
    """Extracts the message of an error body: `{"error": {"message": ...}}`, `{"detail": ...}` or plain text."""
    with contextlib.suppress(ValueError):
        data = json.loads(text)
        if isinstance(data, dict):
            error = data.get("error", data)
            text = str(error.get("message") or error.get("detail") or text) if isinstance(error, dict) else str(error)
    return "".join(char for char in " ".join(text.split())[:300] if char.isprintable())


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
