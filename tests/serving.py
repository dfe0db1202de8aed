"""A real server over a free port, in a thread of the test's own process, for tests of the routes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from duologue.conversation.chatbot import Chatbot
from duologue.serving.app import create_app
from duologue.serving.server import Server, listen, url_of
from duologue.serving.service import Service
from duologue.serving.settings import Settings

START_S = 300.0  # a busy machine is not a failing test


@dataclass(frozen=True, eq=False)
class Running:
    """A server that runs.

    Attributes:
        url: without a slash at its end.
    """

    url: str
    server: Server
    loop: asyncio.AbstractEventLoop

    @property
    def service(self) -> Service:
        return self.server.service

    @property
    def live_url(self) -> str:
        """Of the real-time conversations."""
        return f"{self.url.replace('http', 'ws', 1)}/v1/realtime"

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=headers, timeout=START_S, trust_env=False)

    def drain(self) -> None:
        """What the first SIGTERM does."""
        self.loop.call_soon_threadsafe(self.server.drain)


@contextlib.contextmanager
def running(bot: Chatbot, **settings: Any) -> Iterator[Running]:
    """Runs a server; it is gone at the end, or the test fails."""
    wanted = Settings(**{"port": 0, **settings})
    listening = listen(wanted)
    ready, loops = threading.Event(), []

    def work() -> None:
        async def serve() -> None:
            loops.append(asyncio.get_running_loop())
            await server.serve([listening])

        asyncio.run(serve())

    server = Server(create_app(bot, wanted), on_ready=ready.set)
    thread = threading.Thread(target=work, name="server", daemon=True)
    thread.start()
    try:
        assert ready.wait(START_S), "the server did not start"
        yield Running(url_of(listening).rstrip("/"), server, loops[0])
    finally:
        server.should_exit = True
        thread.join(START_S)
        assert not thread.is_alive(), "the server did not stop"
