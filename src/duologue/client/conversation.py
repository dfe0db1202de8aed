"""The client side of a conversation: sends user audio, plays answers, handles barge-in.

The server detects turns. When the user starts to speak during an answer, playback stops at once. The client then
reports the played duration with `conversation.item.truncate`.

Over a connection that resumes, the conversation goes on after a drop. A running answer then ends with what arrived.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duologue.client.connection import WIRE_RATE, Connection, ConnectionLost, ServerEvent, decode_pcm
from duologue.client.playback import Playback, PlaybackPosition

SILENT_SERVER_S = 60.0
ACK_S = 0.2  # interval of the reports of what was played
ACK_UPDATE = "playback-reports"  # id of the event that offers them; only this server takes the offer
TRANSCRIBER = "gpt-4o-mini-transcribe"  # OpenAI's name; this server accepts any

Observer = Callable[[ServerEvent], None]


@dataclass(frozen=True)
class TalkSettings:
    """Settings of a conversation.

    Attributes:
        voice, instructions: empty keeps the server's default.
        manual: turns end with the source audio, not at a detected pause.
        transcribe: request transcripts of the user.
        barge_in: whether the user may interrupt. If not, silence is sent during answers, against echo from
            loudspeakers.
        silence_ms: pause that ends a turn; None keeps the server's default.
        max_tokens: maximum tokens of an answer.
    """

    voice: str = ""
    instructions: str = ""
    manual: bool = False
    transcribe: bool = True
    barge_in: bool = True
    silence_ms: int | None = None
    max_tokens: int | None = None

    def session(self) -> dict[str, Any]:
        """Returns the `session` of session.update."""
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
    """One user turn and its answer, as the client observed them.

    Attributes:
        user: transcript of the user.
        answer: text of the answer.
        first_audio_ms: from the end of the turn to the first audio; the end is the server's event, or the commit in
            manual turns.
        heard_ms: milliseconds played before an interruption, or None.
        status: "completed", "cancelled", "incomplete" or "failed"; empty before the response.
        turn_end, first_audio_at: times on the client's clock.
    """

    user: str = ""
    answer: str = ""
    first_audio_ms: float | None = None
    heard_ms: int | None = None
    status: str = ""
    turn_end: float = field(default=0.0, repr=False)
    first_audio_at: float | None = field(default=None, repr=False)


@dataclass
class TalkSummary:
    """The result of a conversation."""

    exchanges: list[Exchange] = field(default_factory=list)
    num_gaps: int = 0
    gap_ms: float = 0.0
    num_lost: int = 0  # microphone chunks lost to overflow
    num_reconnects: int = 0  # dropped connections after which the talk went on
    errors: list[str] = field(default_factory=list)
    ended_by: str = ""  # error of the server or connection
    output: str | None = None  # path of the answers' audio file

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        for exchange in values["exchanges"]:
            del exchange["turn_end"], exchange["first_audio_at"]
        return {"type": "talk.summary", **values}


class TalkClient:
    """A conversation over an open connection. `run` holds it; `summary` is its current result."""

    def __init__(
        self,
        connection: Connection,
        playback: Playback,
        settings: TalkSettings,
        observe: Observer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        connection: the open connection.
        playback: plays the answers.
        settings: sent to the server.
        observe: receives every server event, and client events whose type starts with "talk.".
        clock: returns seconds.
        """
        self._connection, self._playback, self._settings = connection, playback, settings
        self._observe, self._clock = observe, clock
        self.summary = TalkSummary()
        self._user_speaks = False  # according to the server
        self._answer_due = False  # requested, not started
        self._question: Exchange | None = None  # unanswered
        self._questions: dict[str, Exchange] = {}  # by the user's item id
        self._responses: dict[str, Exchange] = {}  # active, by response id
        self._answers: dict[str, Exchange] = {}  # by the answer's item id
        self._cut: set[str] = set()  # interrupted active responses
        self._turn_end = self._last_event = clock()
        self._reports_playback = False  # the server takes `playback.ack`
        self._reported: tuple[PlaybackPosition | None, float] = (None, 0.0)
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Ends `run` at once. Call it on the event loop."""
        self._stopped.set()

    async def run(
        self,
        source: AsyncIterator[NDArray[np.int16]],
        silence: AsyncIterator[NDArray[np.int16]] | None = None,
        tail_s: float = 2.0,
    ) -> TalkSummary:
        """Talks until the source or the server ends the conversation.

        Args:
            source: chunks of pcm (S,) at `WIRE_RATE`, in real time.
            silence: sent in real time after the source, until everything is answered and played. None stops with the
                source.
            tail_s: minimum duration of that silence.
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
            if isinstance(result, ConnectionLost):
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
            await self._report_playback()
        if self._settings.manual:
            self._answer_due, self._turn_end = True, self._clock()
            await self._connection.send({"type": "input_audio_buffer.commit"})
            await self._connection.send({"type": "response.create"})
        if silence is None:
            return
        rest = 0
        async for pcm in silence:
            rest += len(pcm)
            await self._report_playback()
            if rest >= tail_s * WIRE_RATE and not self.busy:
                return
            if self._clock() - self._last_event > SILENT_SERVER_S:
                raise ConnectionLost(
                    f"{self._connection.url} sent nothing for {SILENT_SERVER_S:.0f} s while an answer was due"
                )
            if not self._settings.manual:
                await self._connection.append(pcm)

    async def _report_playback(self) -> None:
        """Reports the position of playback: at intervals, and at the end."""
        heard, (last, at) = self._playback.heard, self._reported
        if not self._reports_playback or heard is None or heard == last:
            return
        if self._clock() - at < ACK_S and self._playback.active:
            return
        self._reported = heard, self._clock()
        event = {"type": "playback.ack", "item_id": heard.item_id, "played_ms": heard.played_ms}
        await self._connection.send(event)

    @property
    def busy(self) -> bool:
        """Whether the user is speaking, or an answer is due, arriving or playing."""
        return self._user_speaks or self._answer_due or bool(self._responses) or self._playback.active

    async def _receive(self) -> None:
        while True:
            event = await self._connection.receive()
            self._last_event = self._clock()
            if event["type"] == "error" and event["error"].get("event_id") == ACK_UPDATE:
                continue  # a server of another kind
            await self._take(event)
            self._observe(event)

    async def _take(self, event: ServerEvent) -> None:
        match event["type"]:
            case "session.created":
                offer = {"type": "realtime", "include": ["duologue.playback"]}
                await self._connection.send({"type": "session.update", "event_id": ACK_UPDATE, "session": offer})
            case "session.updated":
                include = event.get("session", {}).get("include") or ()
                self._reports_playback = "duologue.playback" in include
            case "talk.reconnecting":
                self._end_answers()
            case "talk.reconnected":
                self.summary.num_reconnects += 1
                if not event["resumed"]:
                    await self._connection.send({"type": "session.update", "session": self._settings.session()})
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

    def _end_answers(self) -> None:
        """Ends what the server was doing when the connection dropped."""
        for item_id, exchange in self._answers.items():
            if any(exchange is active for active in self._responses.values()):
                exchange.status = "incomplete"
                self._playback.end(item_id)
        self._responses.clear()
        self._cut.clear()
        self._question = None
        self._user_speaks = self._answer_due = False

    async def _stop_playing(self) -> None:
        """Handles barge-in: stops playback and reports the played duration to the server."""
        if not self._settings.barge_in:
            return
        self._cut.update(self._responses)
        for cut in self._playback.cut():
            if exchange := self._answers.get(cut.item_id):
                exchange.heard_ms = cut.played_ms
            truncate = {"item_id": cut.item_id, "content_index": 0, "audio_end_ms": cut.played_ms}
            await self._connection.send({"type": "conversation.item.truncate", **truncate})
            self._observe({"type": "talk.interrupted", "item_id": cut.item_id, "played_ms": cut.played_ms})
