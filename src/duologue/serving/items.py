"""Items of a real-time conversation, as clients see them, and the turns of token ids given to the model.

An item is one message; its turn holds its ids. A reply keeps all its ids, so that a client that knows the true playback
position can still truncate it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from duologue import rates
from duologue.conversation.chatbot import Chatbot
from duologue.conversation.ear import tokenize
from duologue.conversation.history import heard_part, turn_of
from duologue.interleave import Kind
from duologue.language.tools import ToolCall, ToolResult
from duologue.pcm import from_int16, to_int16
from duologue.serving.formats import encode_wav, unpack
from duologue.serving.objects import (
    AnyItem,
    Content,
    Format,
    FunctionCall,
    FunctionCallOutput,
    Message,
    ProtocolError,
    SessionConfig,
)
from duologue.serving.protocol import new_id
from duologue.turns import Conversation, Modality, Role, Turn
from duologue.vocabulary import Vocabulary

MAX_AUDIO_S = 300.0  # retrievable audio of a conversation; the oldest is dropped first
# Appended when the history does not end with a user turn, so that the prompt always asks for a reply.
EMPTY_USER_TURN = Turn(Role.USER, Modality.TEXT, ())


@dataclass(frozen=True, eq=False)
class AudioClip:
    """Audio of an item, int16 (S,)."""

    samples: NDArray[np.int16]
    sample_rate: int

    @classmethod
    def of(cls, parts: Sequence[NDArray[np.float32]], sample_rate: int) -> AudioClip:
        wav = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        return cls(to_int16(wav), sample_rate)

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sample_rate

    def beginning(self, ms: float) -> AudioClip:
        return AudioClip(self.samples[: int(ms * self.sample_rate / 1000)], self.sample_rate)

    def to_wire(self, wire: Format) -> str:
        """Returns the audio as base64 text."""
        return encode_wav(from_int16(self.samples), self.sample_rate, wire)


@dataclass(eq=False)
class Item:
    """One item of a conversation.

    Attributes:
        body: the item as clients see it, without audio.
        turn: the turn given to the model; None for replies that were not heard, and for tool calls and their results
            if the model knows none.
        full_turn: the complete turn of a reply.
        sound: the audio, while it is kept.
        spoken_ms: duration of a reply's audio as sent.
        heard_ms: milliseconds heard before an interruption, or None.
        speed: duration of a reply's generated audio divided by its duration as sent.
    """

    body: AnyItem
    turn: Turn | None = None
    full_turn: Turn | None = None
    sound: AudioClip | None = None
    spoken_ms: float = 0.0
    heard_ms: float | None = None
    speed: float = 1.0

    @property
    def id(self) -> str:
        assert self.body.id is not None
        return self.body.id

    def cut(self, heard_ms: float, vocabulary: Vocabulary) -> float:
        """Truncates a reply to the part that was heard; returns the milliseconds of audio kept."""
        assert self.full_turn is not None
        assert isinstance(self.body, Message)
        self.heard_ms = min(heard_ms, self.spoken_ms)
        num_samples = int(self.heard_ms * self.speed * rates.SPEAK_SAMPLE_RATE / 1000)
        heard = heard_part(self.full_turn, num_samples, vocabulary, finished=self.body.status == "completed")
        self.turn = heard.turn if heard.turn.ids else None
        text_ids = [token for token in self.full_turn.ids if vocabulary.kind(token) is Kind.TEXT]
        transcript = heard.text(vocabulary.decode_text(text_ids).lstrip())
        content = [part.model_copy(update={"transcript": transcript}) for part in self.body.content]
        self.body = self.body.model_copy(update={"content": content})
        return self.heard_ms

    def with_sound(self, heard: Format, spoken: Format) -> AnyItem:
        """Returns the body with its audio as base64 text, if it is kept. Call it in a thread.

        Args:
            heard: format of the user's audio.
            spoken: format of the model's audio.
        """
        if self.sound is None or not isinstance(self.body, Message):
            return self.body
        sound = self.sound if self.heard_ms is None else self.sound.beginning(self.heard_ms * self.speed)
        audio = sound.to_wire(heard if self.body.role == "user" else spoken)
        content = [
            part.model_copy(update={"audio": audio}) if part.type in ("input_audio", "output_audio") else part
            for part in self.body.content
        ]
        return self.body.model_copy(update={"content": content})


@dataclass(eq=False)
class Items:
    """The items of one conversation, in order. Resumed conversations keep them."""

    vocabulary: Vocabulary
    id: str
    order: list[Item] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.order)

    def turns(self, system: Turn | None = None) -> Conversation:
        """Returns the conversation given to the model; the instructions come first."""
        shown = [turn for turn in (system, *(item.turn for item in self.order)) if turn is not None]
        return Conversation(tuple(shown), self.vocabulary.hash)

    def get(self, item_id: str, action: str, param: str = "item_id") -> Item:
        """Returns the item with this id. Raises ProtocolError if there is none; `action` names the operation."""
        for item in self.order:
            if item.id == item_id:
                return item
        raise ProtocolError(
            f"there is no item {item_id[:70]!r} in the conversation to {action}",
            f"item_{action}_invalid_item_id",
            param,
        )

    def check_new(self, item_id: str | None, after: str | None = None) -> int:
        """Returns the position for a new item of this id. Raises ProtocolError as `add`."""
        if any(item.id == item_id for item in self.order):
            raise ProtocolError(
                f"there is an item {item_id!r} in the conversation already", "item_create_duplicate_item_id", "item.id"
            )
        if after is None:
            return len(self.order)
        return 0 if after == "root" else self.order.index(self.get(after, "create", "previous_item_id")) + 1

    def check_call(self, body: AnyItem) -> None:
        """Raises ProtocolError if the body is the result of a call that the conversation does not hold."""
        if not isinstance(body, FunctionCallOutput):
            return
        calls = (item.body for item in self.order if isinstance(item.body, FunctionCall))
        if not any(call.call_id == body.call_id for call in calls):
            raise ProtocolError(
                f"there is no function call {body.call_id[:70]!r} in the conversation",
                "item_create_invalid_call_id",
                "item.call_id",
            )

    def add(self, item: Item, after: str | None = None) -> str | None:
        """Inserts an item at the end, at the start (after "root") or after another one; returns the previous item's id.

        Raises:
            ProtocolError: the id exists already, or the item to insert after does not.
        """
        index = self.check_new(item.id, after)
        self.order.insert(index, item)
        self.forget_sound()
        return self.order[index - 1].id if index else None

    def forget_sound(self) -> None:
        """Drops the oldest audio beyond the limit."""
        seconds = 0.0
        for item in reversed(self.order):
            if item.sound is None:
                continue
            seconds += item.sound.seconds
            if seconds > MAX_AUDIO_S:
                item.sound = None


@dataclass(eq=False)
class SavedConversation:
    """The state of a conversation that a dropped client can resume.

    Attributes:
        config: the session configuration as clients see it.
        items: the items.
        revision: the last one of this server in the store of sessions; 0 if there is none.
    """

    config: SessionConfig
    items: Items
    revision: int = 0


def answerable(vocabulary: Vocabulary, turns: Sequence[Turn | None]) -> Conversation:
    """Returns a conversation of these turns that ends with a turn the model can answer."""
    shown = [turn for turn in turns if turn is not None]
    if not shown or shown[-1].role not in (Role.USER, Role.OBSERVATION):
        shown.append(EMPTY_USER_TURN)
    return Conversation(tuple(shown), vocabulary.hash)


def tool_turn(body: FunctionCall | FunctionCallOutput, vocabulary: Vocabulary) -> Turn:
    """Returns the turn of a tool call or of its result."""
    if isinstance(body, FunctionCall):
        text = ToolCall(body.call_id or "", body.name, body.arguments).to_text()
        return turn_of(Role.ASSISTANT, vocabulary.encode_text(text), vocabulary)
    text = ToolResult(body.call_id, body.output).to_text()
    return turn_of(Role.OBSERVATION, vocabulary.encode_text(text), vocabulary)


async def new_item(
    bot: Chatbot, body: AnyItem, wire: Format, max_chars: int, max_audio_s: float, where: str = "item"
) -> Item:
    """Creates the item that a client described. Tool calls and results are given to models that call tools.

    Args:
        wire: format of its audio.
        max_chars, max_audio_s: limits of one message.
        where: path of the item in the event.

    Raises:
        ProtocolError: a part has the wrong type for its role, has no value, exceeds a limit, or is not audio of this
            format.
    """
    item_id = body.id or new_id("item")
    if isinstance(body, FunctionCall | FunctionCallOutput):
        body = body.model_copy(update={"id": item_id, "status": "completed"})
        return Item(body, tool_turn(body, bot.models.vocabulary) if bot.models.calls_tools else None)
    if not body.content:
        raise ProtocolError(f"{where}.content must hold at least one part", param=f"{where}.content")
    ids: list[int] = []
    sounds: list[AudioClip] = []
    parts: list[Content] = []
    for index, part in enumerate(body.content):
        place = f"{where}.content.{index}"
        if part.type == "input_audio" and body.role == "user":
            wav = await _sound(part, wire, max_audio_s, place)
            codes = await tokenize(bot.models, bot.worker, wav, wire.rate)
            ids += bot.models.vocabulary.speech_ids(codes)
            sounds.append(AudioClip.of([wav], wire.rate))
        else:
            text = _part_text(part, body.role, place)
            if len(text) > max_chars:
                raise ProtocolError(
                    f"{place}.text has {len(text)} characters; at most {max_chars} are taken", param=f"{place}.text"
                )
            ids += bot.models.vocabulary.encode_text(text)
        parts.append(part.model_copy(update={"audio": None}))
    message = Message(type="message", id=item_id, status="completed", role=body.role, content=parts)
    # An item keeps the audio of a single part only.
    return Item(
        message, turn_of(Role(body.role), ids, bot.models.vocabulary), sound=sounds[0] if len(sounds) == 1 else None
    )


async def _sound(part: Content, wire: Format, max_audio_s: float, place: str) -> NDArray[np.float32]:
    if not part.audio:
        raise ProtocolError(f"{place}.audio is missing", "missing_required_parameter", f"{place}.audio")
    wav = await asyncio.to_thread(unpack, part.audio, wire, f"{place}.audio")
    if len(wav) > max_audio_s * wire.rate:
        raise ProtocolError(
            f"{place}.audio lasts {len(wav) / wire.rate:.0f} s; at most {max_audio_s:g} s are taken",
            param=f"{place}.audio",
        )
    return wav


def _part_text(part: Content, role: str, where: str) -> str:
    """Returns the text of a part. Raises ProtocolError for a part that the role cannot have."""
    wanted = "output_text" if role == "assistant" else "input_text"
    if part.type != wanted:
        also = " or input_audio" if role == "user" else ""
        raise ProtocolError(
            f"{where}.type must be {wanted}{also} in a message of the {role}, not {part.type!r}",
            param=f"{where}.type",
        )
    if part.text is None:
        raise ProtocolError(f"{where}.text is missing", "missing_required_parameter", f"{where}.text")
    return part.text
