"""A real-time session in the process of its client: the server's code from message to message, without a network."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, cast

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosedError
from websockets.frames import Close

from duologue.client.connection import Connection
from duologue.conversation.chatbot import Chatbot
from duologue.serving.client_secrets import ClientSecrets
from duologue.serving.realtime import ConnectionManager
from duologue.serving.service import Service
from duologue.serving.settings import Settings

URL = "in-process"


class _ServerEnd:
    """The server's end of a connection, with the methods of a WebSocket that a session uses."""

    def __init__(self, sent: asyncio.Queue[str | Close], received: asyncio.Queue[dict[str, Any]]) -> None:
        self._sent, self._received = sent, received

    async def wait_until_open(self) -> bool:
        return True

    async def send_text(self, data: str) -> None:
        self._sent.put_nowait(data)

    async def receive(self) -> dict[str, Any]:
        return await self._received.get()

    async def close(self, code: int = 1000, reason: str = "") -> None:
        self._sent.put_nowait(Close(code, reason))


class _ClientEnd:
    """The client's end of a connection, with the methods of a WebSocket that a `Connection` uses."""

    def __init__(self, sent: asyncio.Queue[dict[str, Any]], received: asyncio.Queue[str | Close]) -> None:
        self._sent, self._received = sent, received

    async def send(self, message: str) -> None:
        self._sent.put_nowait({"type": "websocket.receive", "text": message})

    async def recv(self) -> str:
        message = await self._received.get()
        if isinstance(message, Close):
            self._received.put_nowait(message)  # every later call ends alike
            raise ConnectionClosedError(message, None)
        return message

    async def close(self) -> None:
        self._sent.put_nowait({"type": "websocket.disconnect"})


@contextlib.asynccontextmanager
async def connect_in_process(bot: Chatbot, settings: Settings) -> AsyncIterator[Connection]:
    """Opens a session with a server of its own on this event loop, and ends it."""
    connections = ConnectionManager(Service(bot, settings), ClientSecrets())
    to_client: asyncio.Queue[str | Close] = asyncio.Queue()
    to_server: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    client = _ClientEnd(to_server, to_client)
    connections.start_call(_ServerEnd(to_client, to_server), connections.service.session_config(), "")
    try:
        yield Connection(cast(ClientConnection, client), URL)
    finally:
        await client.close()
        await connections.end_calls()
