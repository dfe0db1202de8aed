"""Objects of the Realtime protocol: session configuration, conversation items, responses.

Parsing is strict: an unknown key or an unsupported value is an error that names its field. Fields without effect here
(foreign model names, tracing) are accepted and kept; `docs/protocol.md` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from duologue.text import valid_strings

if TYPE_CHECKING:
    from duologue.models import Card

Model = TypeVar("Model", bound=BaseModel)

Modality: TypeAlias = Literal["text", "audio"]
Status: TypeAlias = Literal["in_progress", "completed", "cancelled", "incomplete", "failed"]
ItemStatus: TypeAlias = Literal["in_progress", "completed", "incomplete"]
LOGPROBS = "item.input_audio_transcription.logprobs"
OwnEvents: TypeAlias = Literal["duologue.tokens", "duologue.timings", "duologue.playback"]

# OpenAI's voices; they map to the model's first voice.
FOREIGN_VOICES = (
    *("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable"),
    *("marin", "nova", "onyx", "sage", "shimmer", "verse"),
)

# Fields where null means "off"; elsewhere null keeps the value.
_MAY_BE_NULL = {"turn_detection", "transcription", "noise_reduction", "idle_timeout_ms", "include", "tracing", "prompt"}
_MERGED = {"audio", "input", "output", "format", "turn_detection", "transcription", "noise_reduction"}
# Clients that send a whole session back include the server's own fields. `extensions` is an offer of events beyond the
# protocol, which a server may leave out (speech-to-speech).
_LEFT_OUT = {"id", "object", "expires_at", "extensions"}


class ProtocolError(Exception):
    """A client request that cannot be fulfilled. It becomes an `error` event and the session continues.

    Attributes:
        code: error code.
        param: path of the faulty field.
        kind: "invalid_request_error" or "server_error".
        event_id: the client's id of the event.
    """

    def __init__(
        self, message: str, code: str = "invalid_value", param: str | None = None, kind: str = "invalid_request_error"
    ) -> None:
        super().__init__(message)
        self.message, self.code, self.param, self.kind = message, code, param, kind
        self.event_id: str | None = None


class Strict(BaseModel):
    """Rejects unknown keys and does not coerce types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Body(Strict):
    """The body of a request. Lone surrogates in its strings are replaced, and null means the default of a field."""

    _text = model_validator(mode="before")(valid_strings)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: given for name, given in value.items() if given is not None or name not in optional}


class OmitUnset(Strict):
    """Serialized without unset fields, because some clients reject unknown keys even when null."""

    @model_serializer(mode="wrap")
    def _without_none(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in plain(self).items() if value is not None}


class Pcm(Strict):
    """16-bit little-endian mono."""

    type: Literal["audio/pcm"] = "audio/pcm"
    rate: Literal[24000] = 24000


class Pcmu(Strict):
    """G.711 mu-law at 8 kHz."""

    type: Literal["audio/pcmu"]
    rate: Literal[8000] = 8000


class Pcma(Strict):
    """G.711 A-law at 8 kHz."""

    type: Literal["audio/pcma"]
    rate: Literal[8000] = 8000


Format: TypeAlias = Annotated[Pcm | Pcmu | Pcma, Field(discriminator="type")]


class ServerVad(Strict):
    """Turn detection by silence.

    Attributes:
        threshold: minimum speech probability of a speech window.
        idle_timeout_ms: silence after a reply until the model speaks again; None disables it.
        create_response: answer when the user stops.
        interrupt_response: end the reply on barge-in.
    """

    type: Literal["server_vad"] = "server_vad"
    threshold: float = Field(default=0.5, ge=0.0, le=1.0)
    prefix_padding_ms: int = Field(default=300, ge=0, le=5000)
    silence_duration_ms: int = Field(default=500, ge=32, le=60_000)
    idle_timeout_ms: int | None = Field(default=None, ge=1000, le=600_000)
    create_response: bool = True
    interrupt_response: bool = True


class SemanticVad(Strict):
    """`ServerVad` that waits longer the less eager it is."""

    type: Literal["semantic_vad"]
    eagerness: Literal["low", "medium", "high", "auto"] = "auto"
    create_response: bool = True
    interrupt_response: bool = True


TurnDetection: TypeAlias = Annotated[ServerVad | SemanticVad, Field(discriminator="type")]


class Transcription(OmitUnset):
    """Request for transcripts of the user's speech. The model's recognition head makes them, whatever the name."""

    model: str | None = None
    language: str | None = None
    languages: list[str] | None = None
    prompt: str | None = None
    keywords: list[str] | None = None
    delay: str | None = None


class NoiseReduction(OmitUnset):
    type: Literal["near_field", "far_field"] | None = None
    strength: float | None = None


class AudioInput(Strict):
    format: Format = Pcm()
    noise_reduction: NoiseReduction | None = None
    transcription: Transcription | None = None
    turn_detection: TurnDetection | None = ServerVad()


def no_tools(value: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns an empty list of tools. Raises ValueError for others."""
    if value:
        functions = (tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in value)
        names = ", ".join(str(function.get("name") or function.get("type"))[:60] for function in functions)
        raise ValueError(f"this server calls no tools; leave out {names[:300]}")
    return value


def no_tool_choice(value: str | dict[str, Any]) -> str | dict[str, Any]:
    """Returns a choice that asks for no call. Raises ValueError for others."""
    if value not in ("auto", "none"):
        raise ValueError("this server calls no tools; only 'auto' and 'none' are possible")
    return value


# Clients send an empty list and "auto" by default. Anything else asks for a call, which no answer may ignore.
# Requests without real-time sessions take no tools.
Tools: TypeAlias = Annotated[list[dict[str, Any]], AfterValidator(no_tools)]
ToolChoice: TypeAlias = Annotated[str | dict[str, Any], AfterValidator(no_tool_choice)]


class VoiceId(Strict):
    id: str


def find_voice(card: Card, requested: str | VoiceId | None, param: str) -> str:
    """Returns the model's voice for a client's choice; none and OpenAI's voices map to the first one.

    Raises:
        ProtocolError: there is no such voice.
    """
    name = requested.id if isinstance(requested, VoiceId) else requested
    if name in card.voices:
        return name
    if name and name not in FOREIGN_VOICES:
        raise ProtocolError(f"{card.name} has no voice {name[:60]!r}; it has {', '.join(card.voices)}", param=param)
    return card.voices[0]


class AudioOutput(Strict):
    format: Format = Pcm()
    voice: str | VoiceId = ""
    speed: float = Field(default=1.0, ge=0.25, le=1.5)


class Audio(Strict):
    input: AudioInput = AudioInput()
    output: AudioOutput = AudioOutput()


MaxTokens: TypeAlias = Annotated[int, Field(ge=1, le=4096)] | Literal["inf"]


def _one_modality(value: list[Modality]) -> list[Modality]:
    """Reduces the modalities to one: audio always comes with its transcript."""
    if not value:
        raise ValueError("should be ['audio'] or ['text']")
    return ["audio"] if "audio" in value else ["text"]


class SessionConfig(Strict):
    """The complete configuration of a session; `updated` applies a client's changes."""

    type: Literal["realtime"] = "realtime"
    object: Literal["realtime.session"] = "realtime.session"
    id: str = ""
    expires_at: int = 0
    model: str = ""
    instructions: str = ""
    output_modalities: list[Modality] = ["audio"]
    audio: Audio = Audio()
    max_output_tokens: MaxTokens = "inf"
    truncation: Literal["auto", "disabled"] = "auto"
    include: list[Literal["item.input_audio_transcription.logprobs"] | OwnEvents] | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    tracing: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None

    _modalities = field_validator("output_modalities")(_one_modality)

    def updated(self, changes: Mapping[str, Any]) -> SessionConfig:
        """Returns this configuration with the client's changes applied.

        Raises:
            ProtocolError: a field is unknown or has an unsupported value; names the first one.
        """
        changes = {name: value for name, value in changes.items() if name not in _LEFT_OUT}
        merged = _merge(self.model_dump(), changes)
        return read(SessionConfig, merged, "session")


def _merge(old: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for name, value in new.items():
        before = merged.get(name)
        if value is None and name not in _MAY_BE_NULL:
            continue
        another_type = (
            isinstance(value, dict)
            and isinstance(before, dict)
            and value.get("type")
            not in (
                None,
                before.get("type"),
            )
        )
        if name in _MERGED and isinstance(value, dict) and isinstance(before, dict) and not another_type:
            merged[name] = _merge(before, value)
        else:
            merged[name] = value
    return merged


class Content(OmitUnset):
    """One part of a message."""

    type: Literal["input_text", "input_audio", "output_text", "output_audio"]
    text: str | None = None
    audio: str | None = Field(default=None, repr=False)
    transcript: str | None = None

    @model_serializer(mode="wrap")
    def _without_none(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        given = super()._without_none(plain)
        # @openai/agents for Node requires a null transcript for user audio.
        return {**given, "transcript": self.transcript} if self.type == "input_audio" else given


ItemId: TypeAlias = Annotated[str, Field(min_length=1, max_length=64)]


class _Item(Strict):
    id: ItemId | None = None
    object: Literal["realtime.item"] = "realtime.item"
    status: ItemStatus | None = None


class Message(_Item):
    """A message of one role."""

    type: Literal["message"]
    role: Literal["system", "user", "assistant"]
    content: list[Content]


class FunctionCall(_Item):
    type: Literal["function_call"]
    name: str
    arguments: str
    call_id: str | None = None


class FunctionCallOutput(_Item):
    type: Literal["function_call_output"]
    call_id: str
    output: str


class ItemReference(Strict):
    """A reference to a conversation item, in the input of a response."""

    type: Literal["item_reference"]
    id: ItemId


AnyItem: TypeAlias = Message | FunctionCall | FunctionCallOutput
NewItem: TypeAlias = Annotated[AnyItem, Field(discriminator="type")]
InputItem: TypeAlias = Annotated[AnyItem | ItemReference, Field(discriminator="type")]


class ResponseFormat(Strict):
    format: Format | None = None
    voice: str | VoiceId | None = None


class ResponseAudio(Strict):
    output: ResponseFormat = ResponseFormat()


MetadataKey: TypeAlias = Annotated[str, Field(max_length=64)]
MetadataValue: TypeAlias = Annotated[str, Field(max_length=512)]


class ResponseParams(Strict):
    """Parameters of `response.create`. None means the session's value."""

    conversation: Literal["auto", "none"] | None = None
    input: list[InputItem] | None = None
    instructions: str | None = None
    output_modalities: list[Modality] | None = None
    audio: ResponseAudio | None = None
    max_output_tokens: MaxTokens | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    prompt: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None

    @field_validator("output_modalities")
    @classmethod
    def _modalities(cls, value: list[Modality] | None) -> list[Modality] | None:
        return None if value is None else _one_modality(value)


class InputTokens(Strict):
    text_tokens: int
    audio_tokens: int
    image_tokens: int = 0
    cached_tokens: int = 0


class OutputTokens(Strict):
    text_tokens: int
    audio_tokens: int


class Usage(Strict):
    """Token counts of a prompt and its reply; control ids count as text."""

    total_tokens: int
    input_tokens: int
    output_tokens: int
    input_token_details: InputTokens
    output_token_details: OutputTokens


class ResponseError(Strict):
    type: str
    code: str | None = None
    message: str | None = None


class StatusDetails(Strict):
    type: Literal["completed", "cancelled", "incomplete", "failed"]
    reason: Literal["turn_detected", "client_cancelled", "max_output_tokens"] | None = None
    error: ResponseError | None = None


class Response(Strict):
    """A response as clients see it."""

    id: str
    object: Literal["realtime.response"] = "realtime.response"
    status: Status = "in_progress"
    status_details: StatusDetails | None = None
    output: list[AnyItem] = []
    conversation_id: str | None
    output_modalities: list[Modality]
    audio: ResponseAudio
    max_output_tokens: MaxTokens
    metadata: dict[str, str] | None = None
    usage: Usage | None = None


def read(model: type[Model], data: Any, where: str = "") -> Model:
    """Parses plain values as `model`.

    Raises:
        ProtocolError: names the path of the first faulty field.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ProtocolError(
            *explain_faults(error.errors(include_url=False), data, "field of this protocol", where)
        ) from None


def explain_faults(faults: Sequence[Mapping[str, Any]], data: Any, noun: str, where: str = "") -> tuple[str, str, str]:
    """Explains pydantic's faults of a client's data.

    Args:
        faults: of one value; the first one counts, and others at its path.
        data: what the client sent, None if unknown.
        noun: names a key in the sentence about an unknown one.
        where: path of the data.

    Returns:
        message, error code, and path of the faulty field as the client wrote it.
    """
    first, (param, value) = faults[0], _place(faults[0], data, where)
    if first["type"] in ("missing", "union_tag_not_found"):
        return f"{param} is missing", "missing_required_parameter", param
    if first["type"] == "extra_forbidden":
        return f"{param} is not a {noun}", "unknown_parameter", param
    if first["type"] == "union_tag_invalid":
        return f"{param} must be one of {first['ctx']['expected_tags']}, not {_short(value)}", "invalid_value", param
    # Each branch of a union reports its own fault at the same path.
    texts = [fault["msg"] for fault in faults if _place(fault, data, where)[0] == param]
    wanted = " or ".join(dict.fromkeys(text.removeprefix("Value error, ").removeprefix("Input ") for text in texts))
    if wanted.startswith("should be"):
        return f"{param} {wanted.replace('should be', 'must be')}, not {_short(value)}", "invalid_value", param
    return f"{param or 'the body'}: {wanted[:1].lower()}{wanted[1:]}", "invalid_value", param


def _place(fault: Mapping[str, Any], data: Any, where: str) -> tuple[str, Any]:
    """Returns the path of a fault's field, as the client wrote it, and the value there."""
    path, value, loc = [where] if where else [], data, fault["loc"]
    for index, part in enumerate(loc):
        # pydantic's location also names union branches, which are not part of the client's path.
        if (isinstance(value, Mapping) and part in value) or (isinstance(value, list) and isinstance(part, int)):
            path.append(str(part))
            value = value[part]
        elif (fault["type"] == "missing" or data is None) and index == len(loc) - 1:
            path.append(str(part))
    if fault["type"].startswith("union_tag"):
        path.append(fault["ctx"]["discriminator"].strip("'"))
        value = value.get(path[-1]) if isinstance(value, Mapping) else value
    return ".".join(path), value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
