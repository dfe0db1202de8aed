"""A scripted user of a Realtime server, with microphone and loudspeaker on one clock.

Every 20 ms one chunk goes each way, so the position in the microphone's track is the time. The client is that of
`duologue talk`: it stops playback when the server hears the user, and reports what was played.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from duologue.client.connection import WIRE_RATE, Connection, ServerEvent
from duologue.client.conversation import Exchange, TalkClient, TalkSettings
from duologue.client.playback import CHUNK, Playback, Ticker

Connect = Callable[[], AbstractAsyncContextManager[Connection]]

AUDIBLE = 100  # of 32767: -50 dB
ECHO_DELAY = 5  # chunks, 0.1 s: from loudspeaker to microphone
_SILENCE = np.zeros(CHUNK, np.int16)


@dataclass(frozen=True)
class SeenEvent:
    """An event of the server, or one of the client whose type starts with "talk.".

    Attributes:
        at: samples of the microphone's track that had been sent.
        seen_s: `time.perf_counter` when it arrived.
    """

    at: int
    seen_s: float
    event: ServerEvent


class Caller:
    """One conversation with a server; made by `calling`.

    Args:
        echo: share of the loudspeaker's amplitude that returns to the microphone, 0.1 s later.

    Attributes:
        at: samples of both tracks so far.
        events: of the server and of the client, in order.
    """

    def __init__(self, connection: Connection, echo: float = 0.0) -> None:
        clock = asyncio.get_running_loop().time
        self._connection, self._echo = connection, echo
        self._playback, self._ticker = Playback(WIRE_RATE, clock=clock), Ticker(clock)
        self._client = TalkClient(connection, self._playback, TalkSettings(transcribe=False), self._see, clock)
        self._chunks: asyncio.Queue[NDArray[np.int16] | None] = asyncio.Queue()
        self.at = 0
        self._said: list[NDArray[np.int16]] = []
        self._heard: list[NDArray[np.int16]] = []
        self._echoes = deque([_SILENCE] * ECHO_DELAY)
        self.events: list[SeenEvent] = []
        self._running = asyncio.create_task(self._client.run(self._microphone()))

    @property
    def said(self) -> NDArray[np.int16]:
        """The microphone's track (S,) at `WIRE_RATE`, echo included."""
        return np.concatenate([*self._said, _SILENCE[:0]])

    @property
    def heard(self) -> NDArray[np.int16]:
        """The loudspeaker's track (S,) at `WIRE_RATE`."""
        return np.concatenate([*self._heard, _SILENCE[:0]])

    @property
    def exchanges(self) -> list[Exchange]:
        """The turns of the user and their answers."""
        return self._client.summary.exchanges

    @property
    def errors(self) -> list[str]:
        """Errors that the server sent."""
        return self._client.summary.errors

    @property
    def hears(self) -> bool:
        """Whether the last chunk of the loudspeaker was audible."""
        return bool(self._heard) and bool(np.abs(self._heard[-1].astype(np.int32)).max() > AUDIBLE)

    @property
    def waits(self) -> bool:
        """Whether an answer is due, arriving or playing."""
        return self._client.busy

    def of(self, kind: str, since: int = 0) -> list[SeenEvent]:
        """The events of one type that came after this position."""
        return [one for one in self.events if one.event["type"] == kind and one.at >= since]

    def forget(self) -> None:
        """Drops both tracks and all events; positions go on."""
        self._said.clear()
        self._heard.clear()
        self.events.clear()

    async def say(self, pcm: NDArray[np.int16]) -> None:
        """Speaks pcm (S,); the last chunk is filled with silence."""
        for start in range(0, len(pcm), CHUNK):
            await self._pass(pcm[start : start + CHUNK])

    async def listen(self, until: Callable[[], bool], most_s: float) -> bool:
        """Is silent until a condition holds, which is checked every 20 ms; returns whether it held in time."""
        end = self.at + most_s * WIRE_RATE
        while not until():
            if self.at >= end:
                return False
            await self._pass(_SILENCE)
        return True

    async def wait(self, seconds: float) -> None:
        """Is silent for this time."""
        await self.listen(lambda: False, seconds)

    async def transcript(self, item_id: str, most_s: float = 2.0) -> str:
        """Returns the text of an answer as the server's history has it."""
        before = len(self.events)
        await self._connection.send({"type": "conversation.item.retrieve", "item_id": item_id})

        def found() -> list[ServerEvent]:
            new = (one.event for one in self.events[before:])
            return [one for one in new if one["type"] == "conversation.item.retrieved"]

        await self.listen(lambda: bool(found()), most_s)
        content = found()[0]["item"]["content"] if found() else []
        return " ".join(str(part.get("transcript") or "") for part in content)

    async def hang_up(self) -> None:
        """Ends the conversation. Raises ValueError if the server ended it before."""
        self._chunks.put_nowait(None)
        summary = await self._running
        if summary.ended_by:
            raise ValueError(summary.ended_by)

    async def _pass(self, mic: NDArray[np.int16]) -> None:
        """Lets 20 ms pass."""
        await self._ticker.tick()
        if self._running.done():
            await self.hang_up()
        heard = self._playback.take(CHUNK)
        self._echoes.append(heard)
        echo = self._echoes.popleft()
        chunk = np.zeros(CHUNK, np.int16)
        chunk[: len(mic)] = mic
        if self._echo:
            chunk = np.clip(chunk + np.rint(self._echo * echo), -32768, 32767).astype(np.int16)
        self._said.append(chunk)
        self._heard.append(heard)
        self.at += CHUNK
        self._chunks.put_nowait(chunk)

    async def _microphone(self) -> AsyncIterator[NDArray[np.int16]]:
        while (chunk := await self._chunks.get()) is not None:
            yield chunk

    def _see(self, event: ServerEvent) -> None:
        if event["type"] == "response.output_audio.delta":
            event = {**event, "delta": ""}  # an hour of sound would fill the memory
        self.events.append(SeenEvent(self.at, time.perf_counter(), event))


@contextlib.asynccontextmanager
async def calling(connect: Connect, echo: float = 0.0) -> AsyncIterator[Caller]:
    """Opens a conversation and ends it; see `Caller`."""
    async with connect() as connection:
        caller = Caller(connection, echo)
        try:
            yield caller
        finally:
            await caller.hang_up()
