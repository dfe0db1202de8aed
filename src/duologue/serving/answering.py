"""One response of a real-time session: translates the events of a reply into protocol events.

    response.created, output_item.added, conversation.item.added, content_part.added, deltas ...,
    output_audio.done, output_audio_transcript.done, content_part.done, conversation.item.done, output_item.done,
    response.done

The first event of the reply opens the item. Cancelling ends the response for the client at once; later output of the
model is dropped.
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
from duologue.conversation.block_policy import PlaybackClock
from duologue.conversation.history import reply_prompt
from duologue.conversation.mouth import Mouth
from duologue.conversation.worker import WorkerFull
from duologue.interleave import Kind
from duologue.language.requests import EngineFull
from duologue.language.sampling import Sampling
from duologue.language.tools import ToolCall, ToolUse
from duologue.serving import protocol
from duologue.serving.formats import WireEncoder
from duologue.serving.items import AudioClip, Item, Items, tool_turn
from duologue.serving.metrics import Metrics
from duologue.serving.objects import (
    AnyItem,
    Content,
    Format,
    FunctionCall,
    InputTokens,
    Message,
    OutputTokens,
    ProtocolError,
    Response,
    ResponseError,
    StatusDetails,
    Usage,
)
from duologue.serving.recording import SessionRecorder
from duologue.serving.send_queue import SendQueue
from duologue.turns import Conversation, Role, Turn

log = logging.getLogger(__name__)

MAX_TOKENS_PER_EVENT = 5  # in one `duologue.tokens`
ResponseStatus = Literal["completed", "cancelled", "incomplete", "failed"]
Reason = Literal["turn_detected", "client_cancelled", "max_output_tokens"]


class _PartIds(TypedDict):
    """Ids that locate a content part."""

    response_id: str
    item_id: str


class _CallIds(_PartIds):
    """Ids that locate a call."""

    output_index: int
    call_id: str


@dataclass(frozen=True)
class ResponseSpec:
    """A resolved request for one response.

    Attributes:
        context: the turns to answer.
        truncate: whether the oldest turns may be dropped to fit the context length.
        question_s: seconds spent on the last step of the question.
        in_conversation: whether the reply becomes an item of the conversation.
        notify: names of the `duologue.*` events that the client requested or promised.
        tools: of a model that calls tools; its calls become items.
    """

    response: Response
    context: Conversation
    voice: str
    wire: Format
    speed: float
    max_tokens: int | None
    truncate: bool
    question_s: float = 0.0
    in_conversation: bool = True
    notify: frozenset[str] = frozenset()
    tools: ToolUse | None = None

    @property
    def text_only(self) -> bool:
        return self.response.output_modalities == ["text"]


@dataclass(eq=False)
class ActiveResponse:
    """A response in progress or just finished. Runs on the event loop; audio is converted in threads.

    Attributes:
        live: whether the client still receives this response.
        cancelled: queued events of this response are dropped.
        over: set when `response.done` is queued.
        playback: the client's playback position, acknowledged or estimated.
    """

    spec: ResponseSpec
    mouth: Mouth
    items: Items
    queue: SendQueue
    metrics: Metrics
    recorder: SessionRecorder | None = None
    on_item: Callable[[Item], Awaitable[str | None]] | None = None
    live: bool = True
    cancelled: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)
    playback: PlaybackClock = field(default_factory=PlaybackClock)
    item: Item | None = None

    def __post_init__(self) -> None:
        if "duologue.playback" in self.spec.notify:
            self.playback.ack(0.0)  # until the first report, nothing has been played
        self._emitting = asyncio.Lock()
        self._finished = False
        self._ids: list[int] = []
        self._text = ""
        self._sound: list[NDArray[np.float32]] = []
        self._outgoing = WireEncoder(self.spec.wire, self.spec.speed)
        self._prompt: list[int] = []
        self._num_cached = 0  # prompt ids in the KV cache at the start
        self._previous: str | None = None
        self._tokens: tuple[Literal["text", "speech"], list[int]] = ("text", [])

    @property
    def id(self) -> str:
        return self.spec.response.id

    @property
    def _calls(self) -> list[ToolCall]:
        return [] if self.spec.tools is None else self.spec.tools.calls

    async def announce(self) -> None:
        """Sends `response.created`. Call it before `run`, so that no event can end the response earlier."""
        await self.queue.put(protocol.ResponseCreated(response=self.spec.response))

    async def run(self) -> None:
        """Generates the reply. Raises nothing except cancellation."""
        try:
            await self._reply()
        except ProtocolError as error:
            await self._fail(error.message, error.code, error.kind)
        except (ValueError, EngineFull, WorkerFull) as error:  # the message is one sentence for the client
            await self._fail(str(error), "response_failed", "invalid_request_error")
        except Exception:
            log.exception("a reply failed")
            await self._fail("the reply failed; see the server's log", "internal_error", "server_error")

    async def cancel(self, reason: Reason) -> None:
        """Ends the response at once and truncates its item to the audio already played."""
        if not self.live:
            return
        self.live, self.cancelled = False, True
        heard_ms = self._stop_playing()
        self.mouth.stop()
        await self._finish("cancelled", reason, heard_ms=heard_ms)

    def abandon(self) -> None:
        """Stops without sending events (the client is gone); truncates the item to the audio already played."""
        self.live, self.cancelled = False, True
        heard_ms = self._stop_playing()
        self.mouth.stop()
        if self.item is not None and not self._finished:
            self._finished = True
            self._settle(self.item, False)
            if not self.spec.text_only:
                self.item.cut(heard_ms, self.items.vocabulary)

    def stop_playing(self, played_ms: float) -> None:
        """Records the client's report that playback stopped after `played_ms`."""
        self.playback.stop(played_ms / 1000)
        if self.recorder is not None:
            self.recorder.cut(played_ms)

    def _stop_playing(self) -> float:
        """Stops the playback clock and returns the milliseconds played."""
        played_s = self.playback.played_s(asyncio.get_running_loop().time())
        self.playback.stop(played_s)
        return 1000 * played_s

    async def cut(self) -> None:
        """Truncates the item of a finished response to the audio already played."""
        if self.over.is_set():
            await self._cut(self._stop_playing())

    async def _cut(self, heard_ms: float) -> None:
        item = self.item
        if item is None or self.spec.text_only or not self.spec.in_conversation:
            return
        kept = item.cut(heard_ms, self.items.vocabulary)
        if self.recorder is not None:
            self.recorder.cut(kept)
        await self.queue.put(protocol.ItemTruncated(item_id=item.id, content_index=0, audio_end_ms=round(kept)))

    async def _reply(self) -> None:
        sampling = self._fit_prompt()
        if not self.live:
            return
        reply = self.mouth.speak(self._prompt, sampling, self.spec.question_s)
        async with contextlib.aclosing(reply):
            async for event in reply:
                if isinstance(event, events.ReplyDone):
                    await self._done(event)
                elif self.live:
                    await self._handle_event(event)

    def _fit_prompt(self) -> Sampling:
        """Builds the prompt and returns the sampling that fits behind it. Raises ValueError or ProtocolError if it does
        not fit."""
        spec, models = self.spec, self.mouth.models
        sampling = models.card.sampling
        if spec.max_tokens is not None:
            sampling = dataclasses.replace(sampling, max_tokens=min(sampling.max_tokens, spec.max_tokens))
        self._prompt, sampling = reply_prompt(models, spec.context, self.mouth.modality, sampling)
        self._num_cached = models.engine.cached_prefix(self._prompt)
        if not spec.truncate:
            full_turn = self.items.vocabulary.prompt_ids(spec.context, self.mouth.modality)
            if len(full_turn) > len(self._prompt):
                raise ProtocolError(
                    f"the conversation of {len(full_turn)} tokens does not fit the model, and session.truncation is "
                    "'disabled'",
                    "context_length_exceeded",
                )
        return sampling

    async def _handle_event(self, event: events.Event) -> None:
        if self.item is None:
            await self._open()
        if self.item is None:  # cancelled in the meantime
            return
        if isinstance(event, events.TextDelta):
            await self._notify_tokens("text", list(event.ids))
            self._ids += event.ids
            self._text += event.text
            if event.text:
                kind = protocol.OutputTextDelta if self.spec.text_only else protocol.TranscriptDelta
                await self._emit(kind(**self._place(), delta=event.text))
        elif isinstance(event, events.SpeechDelta):
            await self._notify_tokens("speech", list(event.tokens))
            self._ids += self.items.vocabulary.speech_ids(event.tokens)
        elif isinstance(event, events.AudioDelta):
            self._sound.append(event.wav)
            await self._send_sound(event.wav)

    async def _send_sound(self, wav: NDArray[np.float32], last: bool = False) -> None:
        if self.spec.speed == 1.0:  # 0.2 ms per second of audio: less than a thread switch
            pieces = self._outgoing.step(wav, last)
        else:
            pieces = await asyncio.to_thread(self._outgoing.step, wav, last)
        if self.live and self.recorder is not None and len(wav):
            self.recorder.spoke(wav, rates.SPEAK_SAMPLE_RATE)
        for audio, duration_ms in pieces:
            await self._emit(protocol.OutputAudioDelta(**self._place(), delta=audio), partial(self._sent, duration_ms))

    def _sent(self, duration_ms: float) -> None:
        if not self.cancelled:
            self.playback.sent(duration_ms / 1000, asyncio.get_running_loop().time())

    async def _emit(self, event: protocol.ServerEvent, when_sent: Callable[[], None] | None = None) -> None:
        """Sends an event unless the response is cancelled before the event leaves the queue."""
        async with self._emitting:
            if self.live:
                await self.queue.put(event, lambda: self.cancelled, when_sent)

    async def _open(self) -> None:
        """Opens the reply's item and its single content part."""
        async with self._emitting:
            if not self.live:
                return
            body = self._body("in_progress")
            self.item = Item(body, speed=self.spec.speed)
            await self.queue.put(protocol.OutputItemAdded(response_id=self.id, item=body))
            if self.spec.in_conversation:
                if self.recorder is not None:
                    self.recorder.begin_reply()
                if self.on_item is not None:
                    self._previous = await self.on_item(self.item)
                await self.queue.put(protocol.ItemAdded(item=body, previous_item_id=self._previous))
            await self.queue.put(protocol.PartAdded(**self._place(), part=self._part()))

    async def _done(self, done: events.ReplyDone) -> None:
        """Handles the end of generation, also of a cancelled response."""
        timings = done.timings
        # A reply of calls alone has no ids, and so no end.
        is_cut = done.reason is events.EndReason.LENGTH and not (self._calls and self.item is None)
        status: ResponseStatus = "incomplete" if is_cut else "completed"
        if self.live:
            await self._flush_tokens()
            if self.item is None and not self._calls:
                await self._open()
            if self.item is not None and not self.spec.text_only:
                await self._send_sound(np.zeros(0, np.float32), last=True)
        if self.live:
            await self._notify_timings(timings)
            await self._finish(status, "max_output_tokens" if status == "incomplete" else None)
        else:
            status = "cancelled"
            await self._notify_timings(timings)
        self.metrics.reply("realtime", status, timings)
        self.metrics.underruns.inc(self.playback.underruns)

    async def _fail(self, message: str, code: str, kind: str) -> None:
        if self.over.is_set():
            return
        self.metrics.reply("realtime", "failed", events.Timings())
        self.metrics.errors.labels(code).inc()
        await self._finish("failed", error=ResponseError(type=kind, code=code, message=message))

    async def _finish(
        self,
        status: ResponseStatus,
        reason: Reason | None = None,
        error: ResponseError | None = None,
        heard_ms: float | None = None,
    ) -> None:
        """Sends the closing events, once."""
        async with self._emitting:
            if self._finished:
                return
            self._finished, self.live = True, False
            output: list[AnyItem] = []
            if self.item is not None:
                output.append(await self._close_item(self.item, status == "completed"))
            if status in ("completed", "incomplete"):
                for call in self._calls:
                    output.append(await self._add_call(call, len(output)))
            response = self.spec.response.model_copy(
                update={
                    "status": status,
                    "status_details": StatusDetails(type=status, reason=reason, error=error),
                    "output": output,
                    "usage": self._usage() if self._prompt else None,
                }
            )
            await self.queue.put(protocol.ResponseDone(response=response))
            if heard_ms is not None:
                await self._cut(heard_ms)
            self.over.set()

    async def _add_call(self, call: ToolCall, index: int) -> FunctionCall:
        """Sends a call as an item of its own, while the speech before it is being played."""
        put = self.queue.put
        opened = FunctionCall(
            type="function_call",
            id=protocol.new_id("item"),
            status="in_progress",
            name=call.name,
            arguments="",
            call_id=call.call_id,
        )
        assert opened.id is not None
        item, previous = Item(opened), None
        await put(protocol.OutputItemAdded(response_id=self.id, output_index=index, item=opened))
        if self.spec.in_conversation:
            if self.on_item is not None:
                previous = await self.on_item(item)
            await put(protocol.ItemAdded(item=opened, previous_item_id=previous))
        place: _CallIds = {
            "response_id": self.id,
            "output_index": index,
            "item_id": opened.id,
            "call_id": call.call_id,
        }
        await put(protocol.FunctionCallArgumentsDelta(**place, delta=call.arguments))
        await put(protocol.FunctionCallArgumentsDone(**place, name=call.name, arguments=call.arguments))
        body = opened.model_copy(update={"status": "completed", "arguments": call.arguments})
        item.body, item.turn = body, tool_turn(body, self.items.vocabulary)
        if self.spec.in_conversation:
            await put(protocol.ItemDone(item=body, previous_item_id=previous))
        await put(protocol.OutputItemDone(response_id=self.id, output_index=index, item=body))
        return body

    def _settle(self, item: Item, completed: bool) -> Message:
        """Fills the item with its final ids and audio; returns its body."""
        body = self._body("completed" if completed else "incomplete")
        item.body = body
        item.turn = item.full_turn = Turn(Role.ASSISTANT, self.mouth.modality, tuple(self._ids), voice=self.spec.voice)
        if not self.spec.text_only:
            item.sound = AudioClip.of(self._sound, rates.SPEAK_SAMPLE_RATE)
            item.spoken_ms = 1000 * item.sound.seconds / self.spec.speed
            self.items.forget_sound()
        return body

    async def _close_item(self, item: Item, completed: bool) -> Message:
        put, place = self.queue.put, self._place()
        body = self._settle(item, completed)
        if self.spec.text_only:
            await put(protocol.TextDone(**place, text=self._text))
        else:
            await put(protocol.AudioDone(**place))
            await put(protocol.TranscriptDone(**place, transcript=self._text))
        await put(protocol.PartDone(**place, part=self._part()))
        if self.spec.in_conversation:
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
                    part if self.spec.text_only else {"type": "output_audio", "transcript": self._text}
                )
            ]
        return Message(type="message", id=item_id, role="assistant", status=status, content=content)

    def _part(self) -> protocol.ContentPart:
        if self.spec.text_only:
            return protocol.ContentPart(type="text", text=self._text)
        return protocol.ContentPart(type="audio", transcript=self._text)

    def _place(self) -> _PartIds:
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

    async def _notify_tokens(self, kind: Literal["text", "speech"], ids: list[int]) -> None:
        if "duologue.tokens" not in self.spec.notify:
            return
        if kind != self._tokens[0]:
            await self._flush_tokens()
        self._tokens = (kind, [*self._tokens[1], *ids])
        if len(self._tokens[1]) >= MAX_TOKENS_PER_EVENT:
            await self._flush_tokens()

    async def _flush_tokens(self) -> None:
        kind, ids = self._tokens
        self._tokens = (kind, [])
        if ids:
            await self._emit(protocol.Tokens(response_id=self.id, kind=kind, ids=ids, count=len(ids)))

    async def _notify_timings(self, timings: events.Timings) -> None:
        if "duologue.timings" in self.spec.notify:
            await self.queue.put(
                protocol.ResponseTimings(
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
