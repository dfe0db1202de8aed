"""The server process: uvicorn around the app, with graceful draining.

At SIGTERM or SIGINT the server refuses new clients and finishes current answers, for at most `drain_s`. A second signal
stops at once. Plain uvicorn would close every WebSocket at the first signal.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import gc
import logging
import signal
import socket
import time
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

PING_S = 20.0  # interval and timeout of WebSocket pings
WARM_UP_S = 2.0
STOP_S = 3  # for connections that remain after draining


def listen(settings: Settings) -> socket.socket:
    """Binds a socket to the server's address, before any slow work.

    Raises:
        ValueError: the address is in use, belongs to another machine, or needs other permissions.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host.strip("[]"), settings.port), family=family, backlog=512)
    except OSError as error:
        reason = "another program uses this port" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise ValueError(f"cannot listen on {settings.host} port {settings.port}: {reason}") from None


def url_of(listening: socket.socket) -> str:
    """Returns the URL of the page on this machine."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


class Server(uvicorn.Server):
    """A uvicorn server for one app.

    Args:
        app: the app of `create_app`.
        on_ready: called when the server accepts clients.

    Attributes:
        drained: whether every client left before the server stopped.
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
                # uvicorn's info log would hold session ids and messages.
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="websockets-sansio",
                ws_max_size=settings.max_message_bytes,
                ws_ping_interval=PING_S,
                ws_ping_timeout=PING_S,
                ws_per_message_deflate=False,  # base64 audio hardly compresses
                timeout_graceful_shutdown=STOP_S,
            )
        )
        self.drained = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.on_ready is not None:
            self.on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Starts draining at the first signal; the process then exits with 0."""
        if self._loop is None or self._draining is not None or not self.started:
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True
            return
        self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Refuses new clients and stops the server when the others are done. Call it on the event loop."""
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        admission, drain_s = self.service.admission, self.service.settings.drain_s
        admission.drain()
        if admission.num_active:
            log.info("stopping: %d sessions and requests active, waiting at most %g s", admission.num_active, drain_s)
        try:
            async with asyncio.timeout(drain_s):
                await admission.wait_until_idle()
            self.drained = True
        except TimeoutError:
            log.warning("stopping with %d sessions and requests still active", admission.num_active)
        self.should_exit = True


def warm_up(bot: Chatbot) -> None:
    """Answers two seconds of faint noise, which loads every component and reports missing packages.

    On CUDA the solves of a released flow are captured first, the largest bucket first.

    Then freezes the garbage collector: scanning the 400 000 objects of the libraries would pause every conversation for
    about 0.5 s.
    """
    card = bot.models.card
    max_tokens = INTERLEAVED.text_run + 2 * rates.BLOCK_TOKENS
    sampling = dataclasses.replace(card.sampling, max_tokens=min(card.sampling.max_tokens, max_tokens))
    start = time.perf_counter()
    if num_graphs := bot.models.decoder.capture(bot.worker.max_rows, card.num_steps, card.guidance_scale):
        log.info("captured %d graphs of the decoder in %.1f s", num_graphs, time.perf_counter() - start)
    session = bot.session(sampling=sampling)
    noise = np.random.default_rng(0).normal(scale=1e-3, size=int(WARM_UP_S * rates.LISTEN_SAMPLE_RATE))
    wav = noise.astype(np.float32)
    SileroStream().step(wav)
    session.feed(wav, rates.LISTEN_SAMPLE_RATE)
    session.reply_now()
    gc.collect()
    gc.freeze()
