"""Events of OpenAI's Realtime protocol (general availability), from clients and from the server.

Names and fields match the types of the `openai` package (3.54.0). The server adds `duologue.tokens` and
`duologue.timings`, sent only to clients that request them in `session.include`, and takes `playback.ack`.
"""

from __future__ import annotations

import itertools
import json
import secrets
from typing import Any, Literal, TypeAlias

from pydantic import Field

from duologue.serving.objects import (
    AnyItem,
    NewItem,
    OmitUnset,
    ProtocolError,
    Response,
    ResponseParams,
    SessionConfig,
    Strict,
    read,
)
from duologue.text import valid_strings, valid_unicode

MAX_DEPTH = 32
_numbers = itertools.count()


def new_id(prefix: str) -> str:
    """Returns a unique id, such as `item_5f0c...`."""
    return f"{prefix}_{secrets.token_hex(10)}"


def _event_id() -> str:
    return f"event_{next(_numbers)}"


# Client events.


class _FromClient(Strict):
    event_id: str | None = None


class SessionUpdate(_FromClient):
    type: Literal["session.update"]
    session: dict[str, Any]


class AppendAudio(_FromClient):
    type: Literal["input_audio_buffer.append"]
    audio: str = Field(repr=False)


class CommitAudio(_FromClient):
    type: Literal["input_audio_buffer.commit"]


class ClearAudio(_FromClient):
    type: Literal["input_audio_buffer.clear"]


class CreateItem(_FromClient):
    type: Literal["conversation.item.create"]
    item: NewItem
    previous_item_id: str | None = None


class RetrieveItem(_FromClient):
    type: Literal["conversation.item.retrieve"]
    item_id: str


class DeleteItem(_FromClient):
    type: Literal["conversation.item.delete"]
    item_id: str


class TruncateItem(_FromClient):
    type: Literal["conversation.item.truncate"]
    item_id: str
    content_index: int = 0
    audio_end_ms: float = Field(ge=0, allow_inf_nan=False)


class AckPlayback(_FromClient):
    """A report that `played_ms` of an item's audio have been played. An extension of the protocol."""

    type: Literal["playback.ack"]
    item_id: str
    played_ms: float = Field(ge=0, allow_inf_nan=False)


class CreateResponse(_FromClient):
    type: Literal["response.create"]
    response: ResponseParams | None = None


class CancelResponse(_FromClient):
    type: Literal["response.cancel"]
    response_id: str | None = None


ClientEvent: TypeAlias = (
    SessionUpdate
    | AppendAudio
    | CommitAudio
    | ClearAudio
    | CreateItem
    | RetrieveItem
    | DeleteItem
    | TruncateItem
    | AckPlayback
    | CreateResponse
    | CancelResponse
)
CLIENT_EVENTS: dict[str, type[ClientEvent]] = {
    kind.model_fields["type"].annotation.__args__[0]: kind for kind in ClientEvent.__args__
}
_NOT_ON_WEBSOCKETS = ("output_audio_buffer.clear",)


def read_client_event(text: str | bytes) -> ClientEvent:
    """Parses one message.

    Raises:
        ProtocolError: names the faulty field and the client's event id.
    """
    if isinstance(text, bytes):
        raise ProtocolError("events are JSON in text messages; binary messages are not used", "invalid_message")
    try:
        data = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        raise ProtocolError("the message is not JSON", "invalid_json") from None
    if not isinstance(data, dict):
        raise ProtocolError("an event is a JSON object with a type", "invalid_json")
    try:
        return _read_event(data)
    except ProtocolError as error:
        event_id = data.get("event_id")
        error.event_id = valid_unicode(event_id) if isinstance(event_id, str) else None
        raise


def _read_event(data: dict[str, Any]) -> ClientEvent:
    name = data.get("type")
    if name in _NOT_ON_WEBSOCKETS:
        raise ProtocolError(
            f"{name} belongs to WebRTC; here the client plays the audio: stop playing and send "
            "conversation.item.truncate",
            "unsupported_event",
            "type",
        )
    if not isinstance(name, str) or name not in CLIENT_EVENTS:
        shown = repr(name)[:60]
        raise ProtocolError(
            f"there is no event {shown}; the choices are {', '.join(CLIENT_EVENTS)}", "unknown_event", "type"
        )
    if _depth(data) > MAX_DEPTH:
        raise ProtocolError(f"an event may be nested at most {MAX_DEPTH} deep", "invalid_value")
    return read(CLIENT_EVENTS[name], valid_strings(data))


def _depth(value: Any, limit: int = MAX_DEPTH) -> int:
    """Returns the nesting depth of plain values, at most one beyond the limit."""
    if limit < 0 or not isinstance(value, dict | list):
        return 0
    children = value.values() if isinstance(value, dict) else value
    return 1 + max((_depth(child, limit - 1) for child in children), default=0)


# Server events.


class ServerEvent(Strict):
    """An event of the server, with a unique id."""

    event_id: str = Field(default_factory=_event_id)
    type: str

    def to_json(self) -> str:
        return self.model_dump_json()


class RealtimeError(Strict):
    type: str
    message: str
    code: str | None = None
    param: str | None = None
    event_id: str | None = None


class Error(ServerEvent):
    type: Literal["error"] = "error"
    error: RealtimeError

    @classmethod
    def of(cls, error: ProtocolError) -> Error:
        body = RealtimeError(
            type=error.kind, message=error.message, code=error.code, param=error.param, event_id=error.event_id
        )
        return cls(error=body)


class SessionCreated(ServerEvent):
    type: Literal["session.created"] = "session.created"
    session: SessionConfig


class SessionUpdated(ServerEvent):
    type: Literal["session.updated"] = "session.updated"
    session: SessionConfig


class AudioCommitted(ServerEvent):
    type: Literal["input_audio_buffer.committed"] = "input_audio_buffer.committed"
    item_id: str
    previous_item_id: str | None


class AudioCleared(ServerEvent):
    type: Literal["input_audio_buffer.cleared"] = "input_audio_buffer.cleared"


class SpeechStarted(ServerEvent):
    type: Literal["input_audio_buffer.speech_started"] = "input_audio_buffer.speech_started"
    item_id: str
    audio_start_ms: int


class SpeechStopped(ServerEvent):
    type: Literal["input_audio_buffer.speech_stopped"] = "input_audio_buffer.speech_stopped"
    item_id: str
    audio_end_ms: int


class TimeoutTriggered(ServerEvent):
    type: Literal["input_audio_buffer.timeout_triggered"] = "input_audio_buffer.timeout_triggered"
    item_id: str
    audio_start_ms: int
    audio_end_ms: int


class _OfItem(ServerEvent):
    item: AnyItem


class ItemAdded(_OfItem):
    type: Literal["conversation.item.added"] = "conversation.item.added"
    previous_item_id: str | None


class ItemDone(_OfItem):
    type: Literal["conversation.item.done"] = "conversation.item.done"
    previous_item_id: str | None


class ItemRetrieved(_OfItem):
    type: Literal["conversation.item.retrieved"] = "conversation.item.retrieved"


class ItemDeleted(ServerEvent):
    type: Literal["conversation.item.deleted"] = "conversation.item.deleted"
    item_id: str


class ItemTruncated(ServerEvent):
    type: Literal["conversation.item.truncated"] = "conversation.item.truncated"
    item_id: str
    content_index: int
    audio_end_ms: int


class Duration(Strict):
    type: Literal["duration"] = "duration"
    seconds: float


class TokenLogprob(Strict):
    """One token of a transcript.

    Attributes:
        bytes: of the token in UTF-8.
    """

    token: str
    logprob: float
    bytes: list[int]

    @classmethod
    def of(cls, token: str, logprob: float) -> TokenLogprob:
        return cls(token=token, logprob=round(logprob, 4), bytes=list(token.encode()))


class _OfTranscription(ServerEvent):
    item_id: str
    content_index: int = 0


class _OfTranscript(OmitUnset, _OfTranscription):
    """`logprobs` is set if `include` of the session asks for it."""

    logprobs: list[TokenLogprob] | None = None


class TranscriptionDelta(_OfTranscript):
    type: Literal["conversation.item.input_audio_transcription.delta"] = (
        "conversation.item.input_audio_transcription.delta"
    )
    delta: str


class TranscriptionCompleted(_OfTranscript):
    type: Literal["conversation.item.input_audio_transcription.completed"] = (
        "conversation.item.input_audio_transcription.completed"
    )
    transcript: str
    usage: Duration


class TranscriptionFailed(_OfTranscription):
    type: Literal["conversation.item.input_audio_transcription.failed"] = (
        "conversation.item.input_audio_transcription.failed"
    )
    error: RealtimeError


class ResponseCreated(ServerEvent):
    type: Literal["response.created"] = "response.created"
    response: Response


class ResponseDone(ServerEvent):
    type: Literal["response.done"] = "response.done"
    response: Response


class _OfOutput(ServerEvent):
    response_id: str
    output_index: int = 0


class OutputItemAdded(_OfOutput):
    type: Literal["response.output_item.added"] = "response.output_item.added"
    item: AnyItem


class OutputItemDone(_OfOutput):
    type: Literal["response.output_item.done"] = "response.output_item.done"
    item: AnyItem


class ContentPart(OmitUnset):
    type: Literal["text", "audio"]
    text: str | None = None
    transcript: str | None = None


class _OfPart(_OfOutput):
    item_id: str
    content_index: int = 0


class PartAdded(_OfPart):
    type: Literal["response.content_part.added"] = "response.content_part.added"
    part: ContentPart


class PartDone(_OfPart):
    type: Literal["response.content_part.done"] = "response.content_part.done"
    part: ContentPart


class OutputTextDelta(_OfPart):
    type: Literal["response.output_text.delta"] = "response.output_text.delta"
    delta: str


class TextDone(_OfPart):
    type: Literal["response.output_text.done"] = "response.output_text.done"
    text: str


class TranscriptDelta(_OfPart):
    type: Literal["response.output_audio_transcript.delta"] = "response.output_audio_transcript.delta"
    delta: str


class TranscriptDone(_OfPart):
    type: Literal["response.output_audio_transcript.done"] = "response.output_audio_transcript.done"
    transcript: str


class OutputAudioDelta(_OfPart):
    type: Literal["response.output_audio.delta"] = "response.output_audio.delta"
    delta: str = Field(repr=False)


class AudioDone(_OfPart):
    type: Literal["response.output_audio.done"] = "response.output_audio.done"


class FunctionCallArgumentsDelta(_OfOutput):
    type: Literal["response.function_call_arguments.delta"] = "response.function_call_arguments.delta"
    item_id: str
    call_id: str
    delta: str


class FunctionCallArgumentsDone(_OfOutput):
    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"
    item_id: str
    call_id: str
    name: str
    arguments: str


class Tokens(ServerEvent):
    """Generated tokens of one kind, in interleaved order; `count` equals `len(ids)`."""

    type: Literal["duologue.tokens"] = "duologue.tokens"
    response_id: str
    kind: Literal["text", "speech"]
    ids: list[int]
    count: int


class ResponseTimings(ServerEvent):
    """Timings of a reply in milliseconds since the end of the question; null for stages not reached.

    Attributes:
        stages: compute time by stage.
    """

    type: Literal["duologue.timings"] = "duologue.timings"
    response_id: str
    tokenize_ms: float
    prefill_ms: float
    first_text_ms: float | None
    first_audio_ms: float | None
    total_ms: float
    audio_ms: float
    stages: dict[str, float]
