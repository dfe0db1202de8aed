"""One response of a real-time session: the events of a reply become events of the protocol, in the protocol's order.

    response.created, output_item.added, conversation.item.added, content_part.added, deltas ...,
    output_audio.done, output_audio_transcript.done, content_part.done, conversation.item.done, output_item.done,
    response.done

The first event of the reply opens the item. Cancelling ends the response for the client at once; what the model still
makes of it is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from duologue import rates
from duologue.conversation import events
from duologue.conversation.session import Session
from duologue.conversation.worker import WorkerFull
from duologue.interleave import Kind
from duologue.language.requests import EngineFull
from duologue.serving import protocol
from duologue.serving.formats import Outgoing
from duologue.serving.items import Item, Items, Sound
from duologue.serving.metrics import Metrics
from duologue.serving.objects import (
    Content,
    ErrorDetails,
    Format,
    InputTokens,
    Message,
    OutputTokens,
    ProtocolError,
    Response,
    StatusDetails,
    Usage,
)
from duologue.serving.outbox import Outbox
from duologue.serving.playback_estimate import Playback
from duologue.serving.recording import Recorder
from duologue.turns import Conversation, Modality, Role, Turn

log = logging.getLogger(__name__)

MAX_TOKENS_AT_ONCE = 5  # of one `duologue.tokens`
Status = Literal["completed", "cancelled", "incomplete", "failed"]
Reason = Literal["turn_detected", "client_cancelled", "max_output_tokens"]


class _Place(TypedDict):
    """Where a part stands."""

    response_id: str
    item_id: str


@dataclass(frozen=True)
class Wish:
    """What a response shall be.

    Attributes:
        context: the turns that are answered.
        truncate: may the oldest turns be left out where they do not all fit?
        asked: when the question was over, on the event loop's clock; `commit_s` of work went into that.
        in_conversation: does the reply become an item of the conversation?
        told: own events that the client asked for.
    """

    response: Response
    context: Conversation
    voice: str
    wire: Format
    speed: float
    max_tokens: int | None
    truncate: bool
    asked: float
    commit_s: float = 0.0
    in_conversation: bool = True
    told: frozenset[str] = frozenset()

    @property
    def text_only(self) -> bool:
        return self.response.output_modalities == ["text"]


@dataclass(eq=False)
class Answer:
    """A response under way or just over. Everything happens on the event loop; sound is worked on in threads.

    Attributes:
        live: it goes on for the client.
        cancelled: what waits of it in the outbox is not sent.
        over: `response.done` is on its way.
        playback: of the sound that was sent.
    """

    wish: Wish
    session: Session
    items: Items
    outbox: Outbox
    metrics: Metrics
    recorder: Recorder | None = None
    on_item: Callable[[Item], Awaitable[str | None]] | None = None
    live: bool = True
    cancelled: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)
    playback: Playback = field(default_factory=Playback)
    item: Item | None = None

    def __post_init__(self) -> None:
        self._emitting = asyncio.Lock()
        self._finished = False
        self._ids: list[int] = []
        self._text = ""
        self._sound: list[NDArray[np.float32]] = []
        self._outgoing = Outgoing(self.wish.wire, self.wish.speed)
        self._prompt: list[int] = []
        self._num_cached = 0  # of the prompt when the model began with it
        self._previous: str | None = None
        self._tokens: tuple[Literal["text", "speech"], list[int]] = ("text", [])

    @property
    def id(self) -> str:
        return self.wish.response.id

    async def announce(self) -> None:
        """Tells that the response begins; before `run`, so that nothing that ends it can come first."""
        await self.outbox.put(protocol.ResponseCreated(response=self.wish.response))

    async def run(self) -> None:
        """Produces the reply. Never raises, but for cancellation."""
        try:
            await self._reply()
        except ProtocolError as error:
            await self._fail(error.message, error.code, error.kind)
        except (ValueError, EngineFull, WorkerFull) as error:  # one sentence in the user's words
            await self._fail(str(error), "response_failed", "invalid_request_error")
        except Exception:
            log.exception("a reply failed")
            await self._fail("the reply failed; the server's log says why", "internal_error", "server_error")

    async def cancel(self, reason: Reason) -> None:
        """Ends the response at once, with its history cut to what was heard."""
        if not self.live:
            return
        self.live, self.cancelled = False, True
        heard_ms = self._stop_playing()
        self.session.interrupt(heard_ms * self.wish.speed)
        await self._finish("cancelled", reason, heard_ms=heard_ms)

    def abandon(self) -> None:
        """The client is gone: the item becomes what was heard of it, and nobody is told."""
        self.live, self.cancelled = False, True
        heard_ms = self._stop_playing()
        self.session.interrupt(heard_ms * self.wish.speed)
        if self.item is not None and not self._finished:
            self._finished = True
            self._settle(self.item, False)
            if not self.wish.text_only:
                self.item.cut(heard_ms, self.items.vocabulary)

    def stop_playing(self, played_ms: float) -> None:
        """The client says how much it has played, and that it plays no more."""
        self.playback.stop(played_ms)
        if self.recorder is not None:
            self.recorder.cut(played_ms)

    def _stop_playing(self) -> float:
        """How much of what was sent has been played by now, as far as the server can tell; no more is played."""
        played_ms = self.playback.played_ms(asyncio.get_running_loop().time())
        self.playback.stop(played_ms)
        return played_ms

    async def cut(self) -> None:
        """Cuts the history to what has been heard, after the response was over."""
        if self.over.is_set():
            await self._cut(self._stop_playing())

    async def _cut(self, heard_ms: float) -> None:
        item = self.item
        if item is None or self.wish.text_only or not self.wish.in_conversation:
            return
        kept = item.cut(heard_ms, self.items.vocabulary)
        if self.recorder is not None:
            self.recorder.cut(kept)
        await self.outbox.put(protocol.ItemTruncated(item_id=item.id, content_index=0, audio_end_ms=round(kept)))

    async def _reply(self) -> None:
        wish, session = self.wish, self.session
        session.conversation = wish.context
        self._look_at_prompt()
        begun = asyncio.get_running_loop().time()
        if not self.live:
            return
        reply = session.reply(text_only=wish.text_only, max_tokens=wish.max_tokens)
        async with contextlib.aclosing(reply):  # type: ignore[type-var]  # it is an asynchronous generator
            async for event in reply:
                if isinstance(event, events.ReplyDone):
                    await self._done(event, begun - wish.asked)
                elif self.live:
                    await self._take(event)

    def _look_at_prompt(self) -> None:
        """Counts the prompt. Raises ValueError or ProtocolError when it does not fit."""
        modality = Modality.TEXT if self.wish.text_only else Modality.INTERLEAVED
        self._prompt, _ = self.session.prompt(modality)
        self._num_cached = self.session.models.engine.cached_prefix(self._prompt)
        if not self.wish.truncate:
            whole = self.items.vocabulary.prompt_ids(self.session.conversation, modality)
            if len(whole) > len(self._prompt):
                raise ProtocolError(
                    f"the conversation of {len(whole)} tokens does not fit the model, and session.truncation is "
                    "'disabled'",
                    "context_length_exceeded",
                )

    async def _take(self, event: events.Event) -> None:
        if self.item is None:
            await self._open()
        if self.item is None:  # cancelled meanwhile
            return
        if isinstance(event, events.TextDelta):
            await self._tell_tokens("text", list(event.ids))
            self._ids += event.ids
            self._text += event.text
            if event.text:
                kind = protocol.TextDelta if self.wish.text_only else protocol.TranscriptDelta
                await self._emit(kind(**self._place(), delta=event.text))
        elif isinstance(event, events.SpeechDelta):
            await self._tell_tokens("speech", list(event.tokens))
            self._ids += self.items.vocabulary.speech_ids(event.tokens)
        elif isinstance(event, events.AudioDelta):
            self._sound.append(event.wav)
            await self._send_sound(event.wav)

    async def _send_sound(self, wav: NDArray[np.float32], last: bool = False) -> None:
        if self.wish.speed == 1.0:  # 0.2 ms for each second: less than the way to a thread and back
            pieces = self._outgoing.step(wav, last)
        else:
            pieces = await asyncio.to_thread(self._outgoing.step, wav, last)
        if self.live and self.recorder is not None and len(wav):
            self.recorder.spoke(wav, rates.SPEAK_SAMPLE_RATE)
        for audio, duration_ms in pieces:
            await self._emit(protocol.AudioDelta(**self._place(), delta=audio), partial(self._sent, duration_ms))

    def _sent(self, duration_ms: float) -> None:
        if not self.cancelled:
            self.playback.sent(duration_ms, asyncio.get_running_loop().time())

    async def _emit(self, event: protocol.ServerEvent, when_sent: Callable[[], None] | None = None) -> None:
        """Sends an event unless the response is cancelled before its turn comes."""
        async with self._emitting:
            if self.live:
                await self.outbox.put(event, lambda: self.cancelled, when_sent)

    async def _open(self) -> None:
        """The reply begins: its item and the one part of it."""
        async with self._emitting:
            if not self.live:
                return
            body = self._body("in_progress")
            self.item = Item(body, speed=self.wish.speed)
            await self.outbox.put(protocol.OutputItemAdded(response_id=self.id, item=body))
            if self.wish.in_conversation:
                if self.recorder is not None:
                    self.recorder.begin_reply()
                if self.on_item is not None:
                    self._previous = await self.on_item(self.item)
                await self.outbox.put(protocol.ItemAdded(item=body, previous_item_id=self._previous))
            await self.outbox.put(protocol.PartAdded(**self._place(), part=self._part()))

    async def _done(self, done: events.ReplyDone, waited_s: float) -> None:
        """The reply is complete, or what remained of a cancelled one has been dropped."""
        timings = _from_the_question(done.timings, waited_s, self.wish.commit_s)
        status: Status = "incomplete" if done.reason is events.EndReason.LENGTH else "completed"
        if self.live:
            await self._flush_tokens()
            if self.item is None:
                await self._open()
            if self.item is not None and not self.wish.text_only:
                await self._send_sound(np.zeros(0, np.float32), last=True)
        if self.live:
            await self._tell_timings(timings)
            await self._finish(status, "max_output_tokens" if status == "incomplete" else None)
        else:
            status = "cancelled"
            await self._tell_timings(timings)
        self.metrics.reply("realtime", status, timings)
        self.metrics.underruns.inc(self.playback.underruns)

    async def _fail(self, message: str, code: str, kind: str) -> None:
        if self.over.is_set():
            return
        self.metrics.reply("realtime", "failed", events.Timings())
        self.metrics.errors.labels(code).inc()
        await self._finish("failed", error=ErrorDetails(type=kind, code=code, message=message))

    async def _finish(
        self,
        status: Status,
        reason: Reason | None = None,
        error: ErrorDetails | None = None,
        heard_ms: float | None = None,
    ) -> None:
        """Sends what closes the response, once."""
        async with self._emitting:
            if self._finished:
                return
            self._finished, self.live = True, False
            output = []
            if self.item is not None:
                output = [await self._close_item(self.item, status == "completed")]
            response = self.wish.response.model_copy(
                update={
                    "status": status,
                    "status_details": StatusDetails(type=status, reason=reason, error=error),
                    "output": output,
                    "usage": self._usage() if self._prompt else None,
                }
            )
            await self.outbox.put(protocol.ResponseDone(response=response))
            if heard_ms is not None:
                await self._cut(heard_ms)
            self.over.set()

    def _settle(self, item: Item, completed: bool) -> Message:
        """The item's last form, with all of its ids and sound."""
        body = self._body("completed" if completed else "incomplete")
        modality = Modality.TEXT if self.wish.text_only else Modality.INTERLEAVED
        item.body = body
        item.turn = item.whole = Turn(Role.ASSISTANT, modality, tuple(self._ids), voice=self.wish.voice)
        if not self.wish.text_only:
            item.sound = Sound.of(self._sound, rates.SPEAK_SAMPLE_RATE)
            item.spoken_ms = 1000 * item.sound.seconds / self.wish.speed
            self.items.forget_sound()
        return body

    async def _close_item(self, item: Item, completed: bool) -> Message:
        put, place = self.outbox.put, self._place()
        body = self._settle(item, completed)
        if self.wish.text_only:
            await put(protocol.TextDone(**place, text=self._text))
        else:
            await put(protocol.AudioDone(**place))
            await put(protocol.TranscriptDone(**place, transcript=self._text))
        await put(protocol.PartDone(**place, part=self._part()))
        if self.wish.in_conversation:
            await put(protocol.ItemDone(item=body, previous_item_id=self._previous))
        await put(protocol.OutputItemDone(response_id=self.id, item=body))
        return body

    def _body(self, status: Literal["in_progress", "completed", "incomplete"]) -> Message:
        item_id = protocol.new_id("item") if self.item is None else self.item.id
        content = []
        if status != "in_progress":
            part = {"type": "output_text", "text": self._text}
            content = [
                Content.model_validate(
                    part if self.wish.text_only else {"type": "output_audio", "transcript": self._text}
                )
            ]
        return Message(type="message", id=item_id, role="assistant", status=status, content=content)

    def _part(self) -> protocol.Part:
        if self.wish.text_only:
            return protocol.Part(type="text", text=self._text)
        return protocol.Part(type="audio", transcript=self._text)

    def _place(self) -> _Place:
        assert self.item is not None
        return {"response_id": self.id, "item_id": self.item.id}

    def _usage(self) -> Usage:
        vocabulary = self.items.vocabulary
        heard = sum(vocabulary.kind(token) is Kind.SPEECH for token in self._prompt)
        spoken = sum(vocabulary.kind(token) is Kind.SPEECH for token in self._ids)
        return Usage(
            total_tokens=len(self._prompt) + len(self._ids),
            input_tokens=len(self._prompt),
            output_tokens=len(self._ids),
            input_token_details=InputTokens(
                text_tokens=len(self._prompt) - heard, audio_tokens=heard, cached_tokens=self._num_cached
            ),
            output_token_details=OutputTokens(text_tokens=len(self._ids) - spoken, audio_tokens=spoken),
        )

    async def _tell_tokens(self, kind: Literal["text", "speech"], ids: list[int]) -> None:
        if "duologue.tokens" not in self.wish.told:
            return
        if kind != self._tokens[0]:
            await self._flush_tokens()
        self._tokens = (kind, [*self._tokens[1], *ids])
        if len(self._tokens[1]) >= MAX_TOKENS_AT_ONCE:
            await self._flush_tokens()

    async def _flush_tokens(self) -> None:
        kind, ids = self._tokens
        self._tokens = (kind, [])
        if ids:
            await self._emit(protocol.Tokens(response_id=self.id, kind=kind, ids=ids, count=len(ids)))

    async def _tell_timings(self, timings: events.Timings) -> None:
        if "duologue.timings" in self.wish.told:
            await self.outbox.put(
                protocol.Timings(
                    response_id=self.id,
                    tokenize_ms=1000 * timings.tokenize_s,
                    prefill_ms=1000 * timings.prefill_s,
                    first_text_ms=_ms(timings.first_text_s),
                    first_audio_ms=_ms(timings.first_audio_s),
                    total_ms=1000 * timings.total_s,
                    audio_ms=1000 * timings.audio_s,
                    stages={name: 1000 * seconds for name, seconds in timings.stages.items()},
                )
            )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _from_the_question(timings: events.Timings, waited_s: float, commit_s: float) -> events.Timings:
    """The timings of a reply, counted from the end of the question instead of from the reply's own beginning."""

    def later(seconds: float | None) -> float | None:
        return None if seconds is None else seconds + waited_s

    return dataclasses.replace(
        timings,
        tokenize_s=timings.tokenize_s + commit_s,
        first_text_s=later(timings.first_text_s),
        first_audio_s=later(timings.first_audio_s),
        total_s=timings.total_s + waited_s,
        stages={**timings.stages, "tokenizer": timings.stages.get("tokenizer", 0.0) + commit_s},
    )
