"""An adapter of voicebench 0.2.0 (PyPI) for servers of OpenAI's Realtime protocol.

voicebench is a harness that plays a scripted call and measures latency, barge-in and talk-over in the sound alone. It
is no relation of the data set VoiceBench. Scenarios name this adapter by its import path:

    adapter:
      type: duologue.evaluation.voicebench_adapter:RealtimeAdapter
      options: {server: "http://127.0.0.1:8000", model: pocket}
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from voicebench.adapters.base import Adapter, AdapterError, AgentAudio, AgentClear, Transcript
from voicebench.clock import Clock

from duologue.audio import StreamingResampler
from duologue.client.connection import WIRE_RATE, Connection, ConnectionLost, decode_pcm, open_connection, realtime_url
from duologue.client.conversation import TalkSettings
from duologue.evaluation.caller import Connect
from duologue.pcm import from_int16, to_int16

KEY_VARIABLE = "DUOLOGUE_API_KEY"


class RealtimeAdapter(Adapter):  # type: ignore[misc]  # voicebench may be absent
    """One call with a server that detects turns. As a client of such a server does, it drops the sound that has not
    been played when the server hears the user.

    Args:
        server: see `realtime_url`.
        model: name of the model.
        transcribe: asks for what the server understood, which voicebench compares with the scenario.
        connect: opens the connection instead of `server`.
        options: for voicebench.
    """

    name: ClassVar[str] = "openai-realtime"

    def __init__(
        self,
        server: str = "http://127.0.0.1:8000",
        model: str = "pocket",
        transcribe: bool = True,
        connect: Connect | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._server, self._model, self._transcribe = server, model, transcribe
        self._connect = connect or (lambda: open_connection(server, model, os.environ.get(KEY_VARIABLE, "")))
        self._stack = contextlib.AsyncExitStack()
        self._connection: Connection | None = None
        self._reader: asyncio.Task[None] | None = None
        self._incoming: dict[str, StreamingResampler] = {}  # by response
        self._cut: set[str] = set()

    async def connect(self) -> None:
        try:
            self._connection = await self._stack.enter_async_context(self._connect())
            settings = TalkSettings(transcribe=self._transcribe)
            await self._connection.send({"type": "session.update", "session": settings.session()})
            events = await self._connection.receive_until("session.updated", "error")
        except (ValueError, ConnectionLost) as error:
            raise AdapterError(str(error)) from error
        if events[-1]["type"] == "error":
            raise AdapterError(str(events[-1]["error"]["message"]))
        self._outgoing = StreamingResampler(self.session.sample_rate, WIRE_RATE)
        self._reader = asyncio.create_task(self._read(self._connection))

    async def send_audio(self, pcm: NDArray[np.float32]) -> None:
        if self._connection is None or self._reader is None or self._reader.done():
            raise AdapterError(f"{self.name}: the server ended the call")
        try:
            await self._connection.append(to_int16(self._outgoing.step(pcm)))
        except ConnectionLost as error:
            raise AdapterError(str(error)) from error

    async def close(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.cancel()
            ended = (await asyncio.gather(reader, return_exceptions=True))[0]
            if isinstance(ended, Exception):
                raise AdapterError(str(ended)) from ended
        await self._stack.aclose()
        self._connection = None

    def describe(self) -> dict[str, Any]:
        return {"type": self.name, "url": realtime_url(self._server, self._model)}

    async def _read(self, connection: Connection) -> None:
        while True:
            event = await connection.receive()
            now, kind = self.session.clock.now(), event["type"]
            if kind == "input_audio_buffer.speech_started":
                self._cut.update(self._incoming)
                self.emit(AgentClear(now))
            elif kind == "response.output_audio.delta" and event["response_id"] not in self._cut:
                self._hear(event["response_id"], from_int16(decode_pcm(event["delta"])), now)
            elif kind == "response.output_audio.done" and event["response_id"] not in self._cut:
                self._hear(event["response_id"], np.zeros(0, np.float32), now, last=True)
            elif kind == "conversation.item.input_audio_transcription.completed":
                self.emit(Transcript("user", event["transcript"], now))
            elif kind == "response.output_audio_transcript.done":
                self.emit(Transcript("agent", event["transcript"], now))

    def _hear(self, response: str, wav: NDArray[np.float32], now: float, last: bool = False) -> None:
        if response not in self._incoming:
            self._incoming[response] = StreamingResampler(WIRE_RATE, self.session.sample_rate)
        if len(pcm := self._incoming[response].step(wav, last)):
            self.emit(AgentAudio(pcm, now))


class LoopClock(Clock):  # type: ignore[misc]  # voicebench may be absent
    """The clock of the running event loop, for calls in simulated time."""

    realtime = True

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._start = self._loop.time()

    def now(self) -> float:
        return self._loop.time() - self._start

    async def sleep_until(self, t: float) -> None:
        await asyncio.sleep(max(0.0, t - self.now()))
