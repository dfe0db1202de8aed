"""A connection to a server of OpenAI's Realtime protocol, this one or another.

Audio on the wire is pcm: 16-bit little-endian, mono, 24 kHz, base64 in JSON text frames.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np
from numpy.typing import NDArray
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

WIRE_RATE = 24_000
PATH = "/v1/realtime"
MAX_MESSAGE = 16 * 2**20  # bytes of one event from the server
CONNECT_S = 20.0

ServerEvent = dict[str, Any]


class ConnectionLost(RuntimeError):
    """The server or the network ended the conversation. The message is one sentence with code and reason."""


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


@contextlib.asynccontextmanager
async def open_connection(server: str, model: str = "pocket", key: str = "") -> AsyncIterator[Connection]:
    """Opens a connection and closes it at the end.

    Args:
        server: see `realtime_url`.
        model: name of the model.
        key: API key, or empty.

    Raises:
        ValueError: one sentence: the URL is invalid, no server answers, or it refused the client.
    """
    url = realtime_url(server, model)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        socket = await connect(
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
    try:
        yield Connection(socket, url)
    finally:
        await socket.close()


def encode_pcm(pcm: NDArray[np.int16]) -> str:
    return base64.b64encode(pcm.astype("<i2").tobytes()).decode("ascii")


def decode_pcm(text: str) -> NDArray[np.int16]:
    """Decodes base64 of 16-bit little-endian samples to (S,) int16. Raises ValueError for other text."""
    return np.frombuffer(base64.b64decode(text, validate=True), "<i2").astype(np.int16)


def _connection_lost(url: str, closed: ConnectionClosed) -> ConnectionLost:
    if closed.rcvd is None:
        return ConnectionLost(f"the connection to {url} broke")
    reason = _error_sentence(closed.rcvd.reason) or "without a reason"
    return ConnectionLost(f"{url} ended the conversation ({closed.rcvd.code}): {reason}")


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
