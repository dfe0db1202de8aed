"""The process: uvicorn around the app, with a door that closes before the server stops.

At SIGTERM or SIGINT nobody new is let in and is told so; answers under way finish, for `drain_s` at most. A second
signal stops at once. uvicorn by itself would cut every WebSocket at the first.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import gc
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import numpy as np
import uvicorn
from fastapi import FastAPI

from duologue import rates
from duologue.conversation.chatbot import Chatbot
from duologue.interleave import INTERLEAVED
from duologue.serving.service import Service
from duologue.serving.settings import Settings
from duologue.serving.turn_detection import SileroStream

log = logging.getLogger(__name__)

PING_S = 20.0  # a client that does not answer a ping for so long is gone
WARM_UP_S = 2.0
STOP_S = 3  # for what is left when the time to drain is over


def listen(settings: Settings) -> socket.socket:
    """A socket on the server's address, bound before anything slow is done.

    Raises:
        ValueError: the address is in use, is not of this machine, or needs other rights.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host.strip("[]"), settings.port), family=family, backlog=512)
    except OSError as error:
        reason = "another program listens there" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise ValueError(f"cannot listen on {settings.host} port {settings.port}: {reason}") from None


def url_of(listening: socket.socket) -> str:
    """Where the page is, seen from this machine."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


class Server(uvicorn.Server):
    """One app on one address.

    Args:
        on_ready: called when clients can come.

    Attributes:
        drained: did everybody leave by themselves before the server stopped?
    """

    def __init__(self, app: FastAPI, on_ready: Callable[[], None] | None = None) -> None:
        self.on_ready = on_ready
        self.service: Service = app.state.service
        settings = self.service.settings
        super().__init__(
            uvicorn.Config(
                app,
                settings.host,
                settings.port,
                log_config=None,
                # Below warnings uvicorn logs addresses with the ids of conversations, and what is said in them.
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="websockets-sansio",
                ws_max_size=settings.max_message_bytes,
                ws_ping_interval=PING_S,
                ws_ping_timeout=PING_S,
                ws_per_message_deflate=False,  # sound in base64 does not become smaller, and it costs time
                timeout_graceful_shutdown=STOP_S,
            )
        )
        self.drained = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.on_ready is not None:
            self.on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of the first signal: no error, so the process ends with 0."""
        if self._loop is None or self._draining is not None or not self.started:
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True
            return
        self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Closes the door and stops the server when everybody has left. For the event loop's own thread."""
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        admission, drain_s = self.service.admission, self.service.settings.drain_s
        admission.drain()
        if admission.num_inside:
            log.info("stopping: %d under way, at most %g s", admission.num_inside, drain_s)
        try:
            async with asyncio.timeout(drain_s):
                await admission.empty()
            self.drained = True
        except TimeoutError:
            log.warning("stopping with %d still under way", admission.num_inside)
        self.should_exit = True


def warm_up(bot: Chatbot) -> None:
    """Hears two seconds of faint noise and answers shortly, for nobody. What is not installed shows here.

    What is loaded by then is taken out of the garbage collection: looking through the 400 000 objects of the libraries
    would stop every conversation for about half a second.
    """
    card = bot.models.card
    enough = INTERLEAVED.text_run + 2 * rates.BLOCK_TOKENS
    sampling = dataclasses.replace(card.sampling, max_tokens=min(card.sampling.max_tokens, enough))
    session = bot.session(sampling=sampling)
    noise = np.random.default_rng(0).normal(scale=1e-3, size=int(WARM_UP_S * rates.LISTEN_SAMPLE_RATE))
    wav = noise.astype(np.float32)
    SileroStream().step(wav)
    session.feed(wav, rates.LISTEN_SAMPLE_RATE)
    session.reply_now()
    gc.collect()
    gc.freeze()
