"""One conversation as the client has it: sends what is heard, plays what comes, stops when the user speaks into it.

The server finds the turns. When it hears the user start while an answer plays, playback stops at once and the server is
told with `conversation.item.truncate` how much of the answer was heard.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duologue.client.connection import WIRE_RATE, Connection, Dropped, ServerEvent, decode_pcm
from duologue.client.playback import Playback

SILENT_SERVER_S = 60.0
TRANSCRIBER = "gpt-4o-mini-transcribe"  # a name that other servers know too; ours takes any

Observer = Callable[[ServerEvent], None]


@dataclass(frozen=True)
class TalkSettings:
    """What is asked of the server.

    Attributes:
        voice, instructions: empty leaves the server's.
        manual: turns end where the sound ends, not where the server hears a pause.
        transcribe: ask for what the server understood.
        barge_in: the user may speak into an answer. Without it the microphone is silent while an answer plays, for
            loudspeakers that the microphone hears.
        silence_ms: pause that ends a turn; None leaves the server's.
    """

    voice: str = ""
    instructions: str = ""
    manual: bool = False
    transcribe: bool = True
    barge_in: bool = True
    silence_ms: int | None = None
    max_tokens: int | None = None

    def session(self) -> dict[str, Any]:
        """The `session` of session.update."""
        wire = {"type": "audio/pcm", "rate": WIRE_RATE}
        turns: dict[str, Any] = {"type": "server_vad", "create_response": True, "interrupt_response": self.barge_in}
        if self.silence_ms is not None:
            turns["silence_duration_ms"] = self.silence_ms
        listen: dict[str, Any] = {"format": wire, "turn_detection": None if self.manual else turns}
        if self.transcribe:
            listen["transcription"] = {"model": TRANSCRIBER}
        speak: dict[str, Any] = {"format": wire}
        if self.voice:
            speak["voice"] = self.voice
        session: dict[str, Any] = {
            "type": "realtime",
            "output_modalities": ["audio"],
            "audio": {"input": listen, "output": speak},
        }
        if self.instructions:
            session["instructions"] = self.instructions
        if self.max_tokens is not None:
            session["max_output_tokens"] = self.max_tokens
        return session


@dataclass
class Exchange:
    """One turn of the user and its answer, as they looked from here.

    Attributes:
        first_audio_ms: from the end of the turn (the server's word for it, or ours in manual turns) to the first sound.
        first_audio_at: when that was, on the client's clock.
        heard_ms: how much of the answer was played, when it was interrupted.
        status: of the response: "completed", "cancelled", "incomplete", "failed"; empty while there is none.
    """

    user: str = ""
    answer: str = ""
    first_audio_ms: float | None = None
    heard_ms: int | None = None
    status: str = ""
    turn_end: float = field(default=0.0, repr=False)
    first_audio_at: float | None = field(default=None, repr=False)


@dataclass
class Summary:
    """What a conversation came to."""

    exchanges: list[Exchange] = field(default_factory=list)
    num_gaps: int = 0
    gap_ms: float = 0.0
    num_lost: int = 0  # chunks of the microphone for which there was no room
    errors: list[str] = field(default_factory=list)
    ended_by: str = ""  # the sentence of a server or a line that ended it
    output: str | None = None  # the file that the answers were written to

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        values = asdict(self)
        for exchange in values["exchanges"]:
            del exchange["turn_end"], exchange["first_audio_at"]
        return {"type": "talk.summary", **values}


class Talk:
    """A conversation over an open connection. `run` holds it; `summary` says at any time what it came to."""

    def __init__(
        self,
        connection: Connection,
        playback: Playback,
        settings: TalkSettings,
        observe: Observer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            observe: called with every event of the server, and with those of our own, whose types begin with "talk.".
        """
        self._connection, self._playback, self._settings = connection, playback, settings
        self._observe, self._clock = observe, clock
        self.summary = Summary()
        self._user_speaks = False  # as the server hears it
        self._answer_due = False  # asked for, not begun
        self._question: Exchange | None = None  # not answered yet
        self._questions: dict[str, Exchange] = {}  # by the user's item
        self._responses: dict[str, Exchange] = {}  # under way, by id
        self._answers: dict[str, Exchange] = {}  # by the answer's item
        self._cut: set[str] = set()  # responses under way that the user spoke into
        self._turn_end = self._last_event = clock()
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Ends `run` at once; called in the loop."""
        self._stopped.set()

    async def run(
        self,
        source: AsyncIterator[NDArray[np.int16]],
        silence: AsyncIterator[NDArray[np.int16]] | None = None,
        tail_s: float = 2.0,
    ) -> Summary:
        """Talks until the source ends, or the server ends it.

        Args:
            source: sound (S,) at `WIRE_RATE`, in real time.
            silence: sent after the source, in real time too, until everything is answered and played and at least
                `tail_s` of it went by. None: the conversation is over when the source is.
        """
        receiving = asyncio.create_task(self._receive())
        sending = asyncio.create_task(self._send(source, silence, tail_s))
        stopping = asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait((receiving, sending, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (receiving, sending, stopping):
                task.cancel()
            results = await asyncio.gather(receiving, sending, stopping, return_exceptions=True)
            self.summary.num_gaps, self.summary.gap_ms = self._playback.num_gaps, round(self._playback.gap_ms, 1)
        for result in results:
            if isinstance(result, Dropped):
                self.summary.ended_by = str(result)
            elif isinstance(result, Exception):
                raise result
        return self.summary

    async def _send(
        self,
        source: AsyncIterator[NDArray[np.int16]],
        silence: AsyncIterator[NDArray[np.int16]] | None,
        tail_s: float,
    ) -> None:
        await self._connection.send({"type": "session.update", "session": self._settings.session()})
        async for pcm in source:
            if not self._settings.barge_in and self._playback.active:
                pcm = np.zeros_like(pcm)
            await self._connection.append(pcm)
        if self._settings.manual:
            self._answer_due, self._turn_end = True, self._clock()
            await self._connection.send({"type": "input_audio_buffer.commit"})
            await self._connection.send({"type": "response.create"})
        if silence is None:
            return
        rest = 0
        async for pcm in silence:
            rest += len(pcm)
            if rest >= tail_s * WIRE_RATE and not self.busy:
                return
            if self._clock() - self._last_event > SILENT_SERVER_S:
                raise Dropped(f"{self._connection.url} said nothing for {SILENT_SERVER_S:.0f} s and owed an answer")
            if not self._settings.manual:
                await self._connection.append(pcm)

    @property
    def busy(self) -> bool:
        """Whether the user is heard speaking, or an answer is owed, comes or plays."""
        return self._user_speaks or self._answer_due or bool(self._responses) or self._playback.active

    async def _receive(self) -> None:
        while True:
            event = await self._connection.receive()
            self._last_event = self._clock()
            await self._take(event)
            self._observe(event)

    async def _take(self, event: ServerEvent) -> None:
        match event["type"]:
            case "input_audio_buffer.speech_started":
                self._user_speaks = True
                await self._stop_playing()
            case "input_audio_buffer.speech_stopped":
                self._user_speaks, self._answer_due, self._turn_end = False, True, self._clock()
            case "input_audio_buffer.committed":
                self._question = Exchange(turn_end=self._turn_end)
                self._questions[event["item_id"]] = self._question
                self.summary.exchanges.append(self._question)
            case "conversation.item.input_audio_transcription.completed":
                if question := self._questions.pop(event["item_id"], None):
                    question.user = event["transcript"]
            case "error":
                self.summary.errors.append(event["error"]["message"])
                self._answer_due = False
            case kind if kind.startswith("response."):
                self._take_response(kind, event)

    def _take_response(self, kind: str, event: ServerEvent) -> None:
        if kind == "response.created":
            exchange = self._question
            if exchange is None:
                exchange = Exchange(turn_end=self._turn_end)
                self.summary.exchanges.append(exchange)
            self._responses[event["response"]["id"]] = exchange
            self._question, self._answer_due = None, False
            return
        if kind == "response.done":
            response = event["response"]
            for item in response["output"]:
                self._playback.end(item["id"])
            if answered := self._responses.pop(response["id"], None):
                answered.status = response["status"]
            self._cut.discard(response["id"])
            return
        response_id = event.get("response_id", "")
        exchange = self._responses.get(response_id)
        if exchange is None:
            return
        if kind == "response.output_item.added":
            self._answers[event["item"]["id"]] = exchange
        elif kind in ("response.output_audio_transcript.delta", "response.output_text.delta"):
            exchange.answer += event["delta"]
        elif kind == "response.output_audio.delta":
            if exchange.first_audio_ms is None:
                exchange.first_audio_at = self._clock()
                exchange.first_audio_ms = round((exchange.first_audio_at - exchange.turn_end) * 1000, 1)
            if response_id not in self._cut:
                self._playback.add(event["item_id"], decode_pcm(event["delta"]))
        elif kind == "response.output_audio.done":
            self._playback.end(event["item_id"])

    async def _stop_playing(self) -> None:
        """The user speaks: nothing more is played, and the server learns what was."""
        if not self._settings.barge_in:
            return
        self._cut.update(self._responses)
        for cut in self._playback.cut():
            if exchange := self._answers.get(cut.item_id):
                exchange.heard_ms = cut.played_ms
            truncate = {"item_id": cut.item_id, "content_index": 0, "audio_end_ms": cut.played_ms}
            await self._connection.send({"type": "conversation.item.truncate", **truncate})
            self._observe({"type": "talk.interrupted", "item_id": cut.item_id, "played_ms": cut.played_ms})
