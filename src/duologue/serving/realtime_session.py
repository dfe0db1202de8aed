"""One live conversation: what each event of the client does, and what the user's voice does.

Events are handled one after the other, in the order in which they came. Replies run beside that: at most one in the
conversation, and some out of band.
"""

from __future__ import annotations

import asyncio
import logging

from duologue.conversation.block_policy import BlockPolicy
from duologue.conversation.chatbot import Chatbot
from duologue.conversation.ear import Ear
from duologue.conversation.mouth import Mouth
from duologue.conversation.worker import WorkerFull
from duologue.serving import protocol
from duologue.serving.admission import STOPPING, ClientConnection
from duologue.serving.answering import Answer, ResponseSpec
from duologue.serving.input_audio import Listener, UserTurn, to_ms
from duologue.serving.items import Item, SavedConversation, answerable, new_item
from duologue.serving.metrics import Metrics
from duologue.serving.objects import (
    FOREIGN_VOICES,
    Content,
    ItemReference,
    Message,
    ProtocolError,
    Response,
    ResponseAudio,
    ResponseFormat,
    ResponseParams,
    SessionConfig,
    VoiceId,
)
from duologue.serving.protocol import ClientEvent, RealtimeError, new_id
from duologue.serving.send_queue import SendQueue
from duologue.serving.settings import Settings
from duologue.serving.turn_detection import Detection, Started, TimedOut
from duologue.turns import Conversation, Modality, Role, Turn

log = logging.getLogger(__name__)

MAX_OUT_OF_BAND = 4  # responses at a time
WIRE_MARGIN_S = 0.2  # sound is ready so long before the client needs it: what is on the line may be late


class RealtimeSession:
    """State of one live conversation: one ear, and a mouth for each response. Its methods run on the event loop.

    Attributes:
        conversation: the session as clients see it, and its items; it outlives the connection.
        current: the response in the conversation, or the last one: it may still be heard.
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
        self.current: Answer | None = None
        self._others: dict[str, Answer] = {}
        self._speech_item = new_id("item")  # the turn that is being spoken
        self._waits_for_user = False
        self._instructions = ""
        self._instructions_turn: Turn | None = None
        on_sound = None if client.recorder is None else client.recorder.heard
        ear = Ear(bot.models, bot.worker, self._context)
        self.listener = Listener(ear, self.config.audio.input, settings.audio_buffer_s, on_sound)

    @property
    def config(self) -> SessionConfig:
        """The session as clients see it."""
        return self.conversation.config

    async def begin(self) -> None:
        """Greets the client; one that comes back is told what was said before."""
        await self.queue.put(protocol.SessionCreated(session=self.config))
        previous = None
        for item in self.items:
            await self.queue.put(protocol.ItemAdded(item=item.body, previous_item_id=previous))
            await self.queue.put(protocol.ItemDone(item=item.body, previous_item_id=previous))
            previous = item.id

    async def take(self, message: str | bytes) -> None:
        """Handles one message; what is wrong with it is told to the client."""
        event_id: str | None = None
        try:
            event = protocol.read_client_event(message)
            event_id = event.event_id
            await self._handle(event)
        except ProtocolError as error:
            error.event_id = error.event_id or event_id
            await self._tell(error)
        except (ValueError, WorkerFull) as error:  # one sentence in the user's words
            refused = ProtocolError(str(error), "request_failed")
            refused.event_id = event_id
            await self._tell(refused)

    async def finish_answers(self) -> None:
        """Waits until every response is over."""
        for answer in self._answers():
            await answer.over.wait()

    def end(self) -> None:
        """The client is gone: what was not heard is forgotten."""
        self.listener.close()
        for answer in self._answers():
            answer.abandon()
        self.current, self._others = None, {}  # each answer refers to this session

    def _answers(self) -> list[Answer]:
        """Responses that are not over."""
        current = [] if self.current is None else [self.current]
        return [answer for answer in [*current, *self._others.values()] if not answer.over.is_set()]

    async def _tell(self, error: ProtocolError) -> None:
        self.metrics.errors.labels(error.code).inc()
        await self.queue.put(protocol.Error.of(error))

    async def _handle(self, event: ClientEvent) -> None:
        match event:
            case protocol.AppendAudio():
                await self._append(event.audio)
            case protocol.CommitAudio():
                heard = await self.listener.commit()
                item = await self._add_heard(heard)
                self._transcribe(item, heard)
            case protocol.ClearAudio():
                self.listener.clear()
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
            case protocol.CreateResponse():
                asked_at = asyncio.get_running_loop().time()
                await self._respond(event.response or ResponseParams(), asked_at)
            case protocol.CancelResponse():
                await self._cancel_response(event.response_id)

    async def _update(self, event: protocol.SessionUpdate) -> None:
        updated = self.config.updated(event.session)
        self._voice(updated.audio.output.voice, "session.audio.output.voice")
        if updated.audio.input != self.config.audio.input:
            self.listener.configure(updated.audio.input)
        self.conversation.config = updated
        await self.queue.put(protocol.SessionUpdated(session=updated))

    def _voice(self, asked: str | VoiceId, param: str) -> str:
        """The model's name of a voice; those of OpenAI's server are the first one. Raises ProtocolError for others."""
        name, card = asked if isinstance(asked, str) else asked.id, self.bot.models.card
        if name in card.voices:
            return name
        if name and name not in FOREIGN_VOICES:
            raise ProtocolError(f"{card.name} has no voice {name[:60]!r}; it has {', '.join(card.voices)}", param=param)
        return card.voices[0]

    # What the user says.

    def _context(self) -> Conversation | None:
        """What the next prompt begins with, for the ear; unknown while a response is made."""
        if self.current is not None and not self.current.over.is_set():
            return None
        return self.items.turns(self._system())

    async def _append(self, audio: str) -> None:
        self._await_user()
        async for detection in self.listener.append(audio):
            await self._detected(detection)

    def _await_user(self) -> None:
        """Silence of the user counts from when the last response has been played."""
        answer, detector = self.current, self.listener.detector
        if self._waits_for_user or answer is None or detector is None or not answer.over.is_set():
            return
        if answer.playback.is_over(asyncio.get_running_loop().time()):
            self._waits_for_user = True
            detector.wait_for_user()

    async def _detected(self, detection: Detection) -> None:
        vad = self.config.audio.input.turn_detection
        assert vad is not None  # nothing is detected without
        now = asyncio.get_running_loop().time()
        sample_ms = to_ms(detection.sample)
        if isinstance(detection, Started):
            await self.queue.put(protocol.SpeechStarted(item_id=self._speech_item, audio_start_ms=sample_ms))
            if vad.interrupt_response:
                await self._interrupt(now)
            return
        if isinstance(detection, TimedOut):
            start_ms = to_ms(detection.start)
            await self.queue.put(
                protocol.TimeoutTriggered(item_id=self._speech_item, audio_start_ms=start_ms, audio_end_ms=sample_ms)
            )
        else:
            await self.queue.put(protocol.SpeechStopped(item_id=self._speech_item, audio_end_ms=sample_ms))
        heard = await self.listener.commit(detection)
        item = await self._add_heard(heard)
        try:
            if vad.create_response:
                await self._respond(ResponseParams(), now, heard.commit_s)
        except ProtocolError as error:
            await self._tell(error)
        self._transcribe(item, heard)

    async def _interrupt(self, detected_at: float) -> None:
        """The user speaks: the reply ends, and the history with what was heard of it."""
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
            self.tasks.create_task(self._write_down(item, heard))

    async def _write_down(self, item: Item, heard: UserTurn) -> None:
        """Tells what the model's recognition head reads in the user's speech tokens."""
        models = self.bot.models
        codes = models.vocabulary.speech_codes(heard.turn.ids)
        try:
            text, _ = await self.bot.worker.submit(lambda: models.transcribe(codes))
        except (ValueError, WorkerFull) as error:
            body = RealtimeError(type="transcription_error", code="transcription_failed", message=str(error))
            await self.queue.put(protocol.TranscriptionFailed(item_id=item.id, error=body))
            return
        part = Content(type="input_audio", transcript=text)
        item.body = item.body.model_copy(update={"content": [part]})
        if text:
            await self.queue.put(protocol.TranscriptionDelta(item_id=item.id, delta=text))
        usage = protocol.Duration(seconds=round(heard.sound.seconds, 3))
        await self.queue.put(protocol.TranscriptionCompleted(item_id=item.id, transcript=text, usage=usage))

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
        self.items.check_new(event.item.id, event.previous_item_id)  # before the work on its sound
        wire = self.config.audio.input.format
        item = await new_item(self.bot, event.item, wire, settings.max_input_chars, settings.audio_buffer_s)
        await self._announce(item, await self._add(item, event.previous_item_id))

    async def _delete_item(self, item_id: str) -> None:
        item = self.items.get(item_id, "delete")
        if self._is_made(item):
            raise ProtocolError(
                f"item {item_id!r} is being made; cancel the response first", "item_delete_in_progress", "item_id"
            )
        self.items.order.remove(item)
        await self.queue.put(protocol.ItemDeleted(item_id=item_id))

    async def _truncate_item(self, event: protocol.TruncateItem) -> None:
        item = self.items.get(event.item_id, "truncate")
        answer = self.current if self.current is not None and self.current.item is item else None
        if answer is not None and answer.live:
            await answer.cancel("client_cancelled")
        if item.whole is None or item.whole.modality is Modality.TEXT:
            raise ProtocolError(
                f"item {item.id!r} is no spoken message of the assistant; only those can be truncated",
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

    def _is_made(self, item: Item) -> bool:
        return self.current is not None and self.current.live and self.current.item is item

    # Responses.

    async def _respond(self, params: ResponseParams, asked_at: float, question_s: float = 0.0) -> None:
        """Starts a response to a question that was over at `asked_at`, on the event loop's clock."""
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
                f"{MAX_OUT_OF_BAND} responses run out of band already; wait until one is done",
                "too_many_active_responses",
            )
        spec = await self._spec(params, question_s, in_conversation)
        mouth = Mouth(
            self.bot.models,
            self.bot.worker,
            text_only=spec.text_only,
            policy=BlockPolicy(margin_s=WIRE_MARGIN_S),
            asked_at=asked_at,
        )
        recorder = self.client.recorder if in_conversation else None
        answer = Answer(spec, mouth, self.items, self.queue, self.metrics, recorder)
        if in_conversation:
            answer.on_item = self._add
            self.current, self._waits_for_user = answer, False
            if self.listener.detector is not None:
                self.listener.detector.stop_waiting()
        else:
            self._others[answer.id] = answer
        await answer.announce()
        self.tasks.create_task(answer.run())

    async def _spec(self, params: ResponseParams, question_s: float, in_conversation: bool) -> ResponseSpec:
        config, output = self.config, self.config.audio.output
        given = params.audio.output if params.audio is not None else ResponseFormat()
        asked_voice = output.voice if given.voice is None else given.voice
        voice = self._voice(asked_voice, "response.audio.output.voice")
        wire = given.format or output.format
        max_tokens = params.max_output_tokens or config.max_output_tokens
        system = self._system(params.instructions)
        context = answerable(self.items.vocabulary, [system, *await self._turns(params)])
        response = Response(
            id=new_id("resp"),
            conversation_id=self.items.id if in_conversation else None,
            output_modalities=params.output_modalities or config.output_modalities,
            audio=ResponseAudio(output=ResponseFormat(format=wire, voice=asked_voice)),
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
        )

    async def _turns(self, params: ResponseParams) -> list[Turn | None]:
        """What is answered: the conversation, or what the client gave instead."""
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
        """The instructions as a turn, if there are any and the model was trained to follow them."""
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
