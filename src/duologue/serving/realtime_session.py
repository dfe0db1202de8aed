"""One live conversation: handles the client's events and the user's speech.

Events are handled one at a time, in order. Replies run concurrently: at most one in the conversation, and a few out of
band.
"""

from __future__ import annotations

import asyncio
import logging

from duologue.conversation.block_policy import BlockPolicy
from duologue.conversation.chatbot import Chatbot
from duologue.conversation.ear import Ear
from duologue.conversation.mouth import Mouth
from duologue.conversation.worker import WorkerFull
from duologue.language.tools import ToolUse
from duologue.serving import protocol
from duologue.serving.admission import STOPPING, ClientConnection
from duologue.serving.answering import ActiveResponse, ResponseSpec
from duologue.serving.input_audio import InputAudioBuffer, UserTurn, to_ms
from duologue.serving.items import Item, SavedConversation, answerable, new_item
from duologue.serving.metrics import Metrics
from duologue.serving.objects import (
    LOGPROBS,
    Content,
    ItemReference,
    Message,
    ProtocolError,
    Response,
    ResponseAudio,
    ResponseFormat,
    ResponseParams,
    SessionConfig,
    find_voice,
)
from duologue.serving.protocol import ClientEvent, RealtimeError, new_id
from duologue.serving.send_queue import SendQueue
from duologue.serving.settings import Settings
from duologue.serving.tools import check_tools
from duologue.serving.turn_detection import Detection, IdleTimedOut, TurnStarted
from duologue.tokenizer.recognizer import joined
from duologue.turns import Conversation, Modality, Role, Turn

log = logging.getLogger(__name__)

MAX_OUT_OF_BAND = 4  # concurrent responses
WIRE_MARGIN_S = 0.2  # lead of generated audio over playback, against network jitter


class RealtimeSession:
    """The state of one live conversation: one ear, and a mouth for each response. Runs on the event loop.

    Attributes:
        conversation: the session configuration and items; outlives the connection.
        current: the current or last response of the conversation; the last one may still be playing.
    """

    def __init__(
        self,
        bot: Chatbot,
        settings: Settings,
        metrics: Metrics,
        client: ClientConnection,
        queue: SendQueue,
        tasks: asyncio.TaskGroup,
        conversation: SavedConversation,
    ) -> None:
        self.bot, self.settings, self.metrics, self.client = bot, settings, metrics, client
        self.queue, self.tasks, self.conversation, self.items = queue, tasks, conversation, conversation.items
        self.current: ActiveResponse | None = None
        self._others: dict[str, ActiveResponse] = {}
        self._speech_item = new_id("item")  # id of the user's next item
        self._idle_timer_runs = False
        self._appended_at = 0.0  # end of the work on the last audio, on the event loop's clock
        self._instructions = ""
        self._instructions_turn: Turn | None = None
        on_sound = None if client.recorder is None else client.recorder.heard
        ear = Ear(bot.models, bot.worker, self._context)
        self.input_buffer = InputAudioBuffer(ear, self.config.audio.input, settings.audio_buffer_s, on_sound)

    @property
    def config(self) -> SessionConfig:
        return self.conversation.config

    async def begin(self) -> None:
        """Sends `session.created`, followed by the items of a resumed conversation."""
        await self.queue.put(protocol.SessionCreated(session=self.config))
        previous = None
        for item in self.items:
            await self.queue.put(protocol.ItemAdded(item=item.body, previous_item_id=previous))
            await self.queue.put(protocol.ItemDone(item=item.body, previous_item_id=previous))
            previous = item.id

    async def take(self, message: str | bytes) -> None:
        """Handles one message. Errors are sent to the client."""
        event_id: str | None = None
        try:
            event = protocol.read_client_event(message)
            event_id = event.event_id
            await self._handle(event)
        except ProtocolError as error:
            error.event_id = error.event_id or event_id
            await self._send_error(error)
        except (ValueError, WorkerFull) as error:  # the message is one sentence for the client
            refused = ProtocolError(str(error), "request_failed")
            refused.event_id = event_id
            await self._send_error(refused)

    async def finish_answers(self) -> None:
        """Waits until every response is over."""
        for answer in self._answers():
            await answer.over.wait()

    def end(self) -> None:
        """Stops all responses; their items keep only the audio already played."""
        self.input_buffer.close()
        for answer in self._answers():
            answer.abandon()
        self.current, self._others = None, {}  # breaks reference cycles

    def _answers(self) -> list[ActiveResponse]:
        """Returns the responses in progress."""
        current = [] if self.current is None else [self.current]
        return [answer for answer in [*current, *self._others.values()] if not answer.over.is_set()]

    async def _send_error(self, error: ProtocolError) -> None:
        self.metrics.errors.labels(error.code).inc()
        await self.queue.put(protocol.Error.of(error))

    async def _handle(self, event: ClientEvent) -> None:
        match event:
            case protocol.AppendAudio():
                await self._append(event.audio)
            case protocol.CommitAudio():
                heard = await self.input_buffer.commit()
                item = await self._add_heard(heard)
                self._transcribe(item, heard)
            case protocol.ClearAudio():
                self.input_buffer.clear()
                self._speech_item = new_id("item")
                await self.queue.put(protocol.AudioCleared())
            case protocol.SessionUpdate():
                await self._update(event)
            case protocol.CreateItem():
                await self._create_item(event)
            case protocol.RetrieveItem():
                item = self.items.get(event.item_id, "retrieve")
                wires = self.config.audio.input.format, self.config.audio.output.format
                await self.queue.put(protocol.ItemRetrieved(item=await asyncio.to_thread(item.with_sound, *wires)))
            case protocol.DeleteItem():
                await self._delete_item(event.item_id)
            case protocol.TruncateItem():
                await self._truncate_item(event)
            case protocol.AckPlayback():
                # An item may be deleted while its report is on the way: other ids are no error.
                for answer in (self.current, *self._others.values()):
                    if answer is not None and answer.item is not None and answer.item.id == event.item_id:
                        answer.playback.ack(event.played_ms / 1000)
            case protocol.CreateResponse():
                requested_at = asyncio.get_running_loop().time()
                await self._respond(event.response or ResponseParams(), requested_at)
            case protocol.CancelResponse():
                await self._cancel_response(event.response_id)

    async def _update(self, event: protocol.SessionUpdate) -> None:
        updated = self.config.updated(event.session)
        find_voice(self.bot.models.card, updated.audio.output.voice, "session.audio.output.voice")
        check_tools(self.bot.models.calls_tools, updated.tools, updated.tool_choice, "session")
        if updated.audio.input != self.config.audio.input:
            self.input_buffer.configure(updated.audio.input)
        self.conversation.config = updated
        await self.queue.put(protocol.SessionUpdated(session=updated))

    # User audio.

    def _context(self) -> Conversation | None:
        """Returns the beginning of the next prompt, or None while a response is in progress."""
        if self.current is not None and not self.current.over.is_set():
            return None
        return self.items.turns(self._system())

    async def _append(self, audio: str) -> None:
        self._start_idle_timer()
        try:
            async for detection in self.input_buffer.append(audio):
                await self._detected(detection)
        finally:
            self._appended_at = asyncio.get_running_loop().time()

    @property
    def turn_stalls_at(self) -> float | None:
        """Time at which the open turn is to be ended because no audio arrives; None without an open turn."""
        detector = self.input_buffer.detector
        return self._appended_at + self.settings.stalled_turn_s if detector is not None and detector.speaking else None

    async def end_stalled_turn(self) -> None:
        """Ends the open turn of a client that sends no more audio."""
        if (detection := self.input_buffer.end_turn()) is not None:
            try:
                await self._detected(detection)
            except (ProtocolError, ValueError, WorkerFull) as error:
                refused = error if isinstance(error, ProtocolError) else ProtocolError(str(error), "request_failed")
                await self._send_error(refused)

    def _start_idle_timer(self) -> None:
        """Starts the idle timeout once the last response has been played."""
        answer, detector = self.current, self.input_buffer.detector
        if self._idle_timer_runs or answer is None or detector is None or not answer.over.is_set():
            return
        if answer.playback.is_over(asyncio.get_running_loop().time()):
            self._idle_timer_runs = True
            detector.start_idle_timer()

    async def _detected(self, detection: Detection) -> None:
        vad = self.config.audio.input.turn_detection
        assert vad is not None  # without it there are no detections
        now = asyncio.get_running_loop().time()
        sample_ms = to_ms(detection.sample)
        if isinstance(detection, TurnStarted):
            await self.queue.put(protocol.SpeechStarted(item_id=self._speech_item, audio_start_ms=sample_ms))
            if vad.interrupt_response:
                await self._interrupt(now)
            return
        if isinstance(detection, IdleTimedOut):
            start_ms = to_ms(detection.start)
            await self.queue.put(
                protocol.TimeoutTriggered(item_id=self._speech_item, audio_start_ms=start_ms, audio_end_ms=sample_ms)
            )
        else:
            await self.queue.put(protocol.SpeechStopped(item_id=self._speech_item, audio_end_ms=sample_ms))
        heard = await self.input_buffer.commit(detection)
        item = await self._add_heard(heard)
        try:
            if vad.create_response:
                await self._respond(ResponseParams(), now, heard.commit_s)
        except ProtocolError as error:
            await self._send_error(error)
        self._transcribe(item, heard)

    async def _interrupt(self, detected_at: float) -> None:
        """Handles barge-in: ends the reply and truncates its item to the audio already played."""
        answer, clock = self.current, asyncio.get_running_loop().time
        if answer is None:
            return
        if answer.live:
            await answer.cancel("turn_detected")
            self.metrics.barge_in.observe(clock() - detected_at)
        elif not answer.playback.is_over(detected_at):
            await answer.cut()

    async def _add_heard(self, heard: UserTurn) -> Item:
        item_id, self._speech_item = self._speech_item, new_id("item")
        self.metrics.audio_seconds.labels("in").inc(heard.sound.seconds)
        body = Message(
            type="message", id=item_id, role="user", status="completed", content=[Content(type="input_audio")]
        )
        item = Item(body, heard.turn, sound=heard.sound)
        previous = await self._add(item)
        await self.queue.put(protocol.AudioCommitted(item_id=item_id, previous_item_id=previous))
        await self._announce(item, previous)
        return item

    def _transcribe(self, item: Item, heard: UserTurn) -> None:
        if self.config.audio.input.transcription is not None:
            self.tasks.create_task(self._transcribe_item(item, heard))

    async def _transcribe_item(self, item: Item, heard: UserTurn) -> None:
        """Sends the transcript that the recognition head reads from the user's speech tokens."""
        models = self.bot.models
        codes = models.vocabulary.speech_codes(heard.turn.ids)
        try:
            tokens, _ = await self.bot.worker.submit(lambda: models.transcribe_tokens(codes))
        except (ValueError, WorkerFull) as error:
            body = RealtimeError(type="transcription_error", code="transcription_failed", message=str(error))
            await self.queue.put(protocol.TranscriptionFailed(item_id=item.id, error=body))
            return
        text, logprobs = joined(tokens), None
        if LOGPROBS in (self.config.include or ()):
            logprobs = [protocol.TokenLogprob.of(token.text, token.logprob) for token in tokens]
        part = Content(type="input_audio", transcript=text)
        item.body = item.body.model_copy(update={"content": [part]})
        if text:
            await self.queue.put(protocol.TranscriptionDelta(item_id=item.id, delta=text, logprobs=logprobs))
        usage = protocol.Duration(seconds=round(heard.sound.seconds, 3))
        await self.queue.put(
            protocol.TranscriptionCompleted(item_id=item.id, transcript=text, usage=usage, logprobs=logprobs)
        )

    # Items.

    async def _add(self, item: Item, after: str | None = None) -> str | None:
        previous = self.items.add(item, after)
        while len(self.items) > self.settings.max_items:
            oldest = self.items.order.pop(0)
            await self.queue.put(protocol.ItemDeleted(item_id=oldest.id))
        return previous

    async def _announce(self, item: Item, previous: str | None) -> None:
        await self.queue.put(protocol.ItemAdded(item=item.body, previous_item_id=previous))
        await self.queue.put(protocol.ItemDone(item=item.body, previous_item_id=previous))

    async def _create_item(self, event: protocol.CreateItem) -> None:
        settings = self.settings
        self.items.check_new(event.item.id, event.previous_item_id)  # before its audio is tokenized
        self.items.check_call(event.item)
        wire = self.config.audio.input.format
        item = await new_item(self.bot, event.item, wire, settings.max_input_chars, settings.audio_buffer_s)
        await self._announce(item, await self._add(item, event.previous_item_id))

    async def _delete_item(self, item_id: str) -> None:
        item = self.items.get(item_id, "delete")
        if self.current is not None and self.current.live and self.current.item is item:
            raise ProtocolError(
                f"item {item_id!r} is in progress; cancel the response first", "item_delete_in_progress", "item_id"
            )
        self.items.order.remove(item)
        await self.queue.put(protocol.ItemDeleted(item_id=item_id))

    async def _truncate_item(self, event: protocol.TruncateItem) -> None:
        item = self.items.get(event.item_id, "truncate")
        answer = self.current if self.current is not None and self.current.item is item else None
        if answer is not None and answer.live:
            await answer.cancel("client_cancelled")
        if item.full_turn is None or item.full_turn.modality is Modality.TEXT:
            raise ProtocolError(
                f"item {item.id!r} is not a spoken assistant message; only those can be truncated",
                "item_truncate_not_audio",
                "item_id",
            )
        if event.content_index != 0:
            raise ProtocolError(
                f"content_index must be 0: a spoken message has one part, not {event.content_index + 1}",
                param="content_index",
            )
        kept = item.cut(event.audio_end_ms, self.items.vocabulary)
        if answer is not None:
            answer.stop_playing(kept)
        await self.queue.put(protocol.ItemTruncated(item_id=item.id, content_index=0, audio_end_ms=round(kept)))

    # Responses.

    async def _respond(self, params: ResponseParams, requested_at: float, question_s: float = 0.0) -> None:
        """Starts a response to a question that ended at `requested_at`, on the event loop's clock."""
        in_conversation = params.conversation != "none"
        if self.client.draining.is_set():
            raise ProtocolError(STOPPING, "server_stopping", kind="server_error")
        if in_conversation and self.current is not None and not self.current.over.is_set():
            raise ProtocolError(
                f"the conversation has an active response, {self.current.id}; wait until it is done or cancel it",
                "conversation_already_has_active_response",
            )
        self._others = {key: other for key, other in self._others.items() if not other.over.is_set()}
        if not in_conversation and len(self._others) >= MAX_OUT_OF_BAND:
            raise ProtocolError(
                f"{MAX_OUT_OF_BAND} out-of-band responses are already active; wait until one is done",
                "too_many_active_responses",
            )
        spec = await self._spec(params, question_s, in_conversation)
        mouth = Mouth(
            self.bot.models if spec.tools is None else self.bot.models.with_tools(spec.tools),
            self.bot.worker,
            text_only=spec.text_only,
            policy=BlockPolicy(
                asyncio.get_running_loop().time, margin_s=WIRE_MARGIN_S, max_ahead_s=self.settings.ahead_s
            ),
            asked_at=requested_at,
        )
        recorder = self.client.recorder if in_conversation else None
        answer = ActiveResponse(spec, mouth, self.items, self.queue, self.metrics, recorder)
        if in_conversation:
            answer.on_item = self._add
            self.current, self._idle_timer_runs = answer, False
            if self.input_buffer.detector is not None:
                self.input_buffer.detector.stop_idle_timer()
        else:
            self._others[answer.id] = answer
        await answer.announce()
        self.tasks.create_task(answer.run())

    async def _spec(self, params: ResponseParams, question_s: float, in_conversation: bool) -> ResponseSpec:
        config, output = self.config, self.config.audio.output
        given = params.audio.output if params.audio is not None else ResponseFormat()
        requested_voice = output.voice if given.voice is None else given.voice
        voice = find_voice(self.bot.models.card, requested_voice, "response.audio.output.voice")
        wire = given.format or output.format
        max_tokens = params.max_output_tokens or config.max_output_tokens
        tools = self._tools(params)
        system = self._system(params.instructions)
        context = answerable(self.items.vocabulary, [system, *await self._turns(params)])
        response = Response(
            id=new_id("resp"),
            conversation_id=self.items.id if in_conversation else None,
            output_modalities=params.output_modalities or config.output_modalities,
            audio=ResponseAudio(output=ResponseFormat(format=wire, voice=requested_voice)),
            max_output_tokens=max_tokens,
            metadata=params.metadata,
        )
        return ResponseSpec(
            response,
            context,
            voice,
            wire,
            output.speed,
            None if max_tokens == "inf" else max_tokens,
            config.truncation == "auto",
            question_s,
            in_conversation,
            frozenset(config.include or ()),
            tools,
        )

    def _tools(self, params: ResponseParams) -> ToolUse | None:
        """Returns the tools of a response; None if the models call none. Raises ProtocolError for unusable ones."""
        config = self.config
        given = config.tools if params.tools is None else params.tools
        choice = config.tool_choice if params.tool_choice is None else params.tool_choice
        check_tools(self.bot.models.calls_tools, given, choice, "response")
        if not self.bot.models.calls_tools:
            return None
        parallel = params.parallel_tool_calls
        return ToolUse(tuple(given), choice, config.parallel_tool_calls if parallel is None else parallel)

    async def _turns(self, params: ResponseParams) -> list[Turn | None]:
        """Returns the turns to answer: those of the conversation, or the client's input."""
        if params.input is None:
            return [item.turn for item in self.items]
        turns, settings, wire = [], self.settings, self.config.audio.input.format
        for index, item in enumerate(params.input):
            where = f"response.input.{index}"
            if isinstance(item, ItemReference):
                turns.append(self.items.get(item.id, "retrieve", f"{where}.id").turn)
            else:
                made = await new_item(self.bot, item, wire, settings.max_input_chars, settings.audio_buffer_s, where)
                turns.append(made.turn)
        return turns

    def _system(self, instructions: str | None = None) -> Turn | None:
        """Returns the instructions as a turn, if there are any and the model was trained to follow them."""
        text = self.config.instructions if instructions is None else instructions
        if not text or not self.bot.models.card.follows_instructions:
            return None
        if text != self._instructions:
            self._instructions, ids = text, tuple(self.items.vocabulary.encode_text(text))
            self._instructions_turn = Turn(Role.SYSTEM, Modality.TEXT, ids)
        return self._instructions_turn

    async def _cancel_response(self, response_id: str | None) -> None:
        for answer in self._answers():
            if answer.live and (answer.id == response_id or (response_id is None and answer is self.current)):
                await answer.cancel("client_cancelled")
                return
        named = "" if response_id is None else f" {response_id[:70]!r}"
        raise ProtocolError(
            f"there is no active response{named} to cancel",
            "response_cancel_not_active",
            None if response_id is None else "response_id",
        )
