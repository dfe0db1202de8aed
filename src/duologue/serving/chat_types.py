"""Request and response types of `/v1/chat/completions`, as OpenAI's clients know them.

Unsupported fields that would change the answer are errors that name the field, unless their value is neutral (null, 0,
an empty list). Fields without effect (`user`, `metadata`, `store` ...) are accepted.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from duologue.language.sampling import Sampling
from duologue.serving.encoders import FileFormat
from duologue.serving.objects import Body, Strict, ToolChoice, Tools, VoiceId

Empty: TypeAlias = Annotated[list[Any], Field(max_length=0)] | None
"""A list that clients send without content."""


class TextPart(Strict):
    type: Literal["text"]
    text: str


class InputAudio(Strict):
    """An audio file in base64. Its own header determines the format."""

    data: str = Field(repr=False)
    format: Literal["wav", "mp3", "flac", "opus"] = "wav"


Neutral: TypeAlias = Annotated[float, Field(ge=0, le=0)]


class AudioPart(Strict):
    type: Literal["input_audio"]
    input_audio: InputAudio


UserPart: TypeAlias = Annotated[TextPart | AudioPart, Field(discriminator="type")]


class SystemMessage(Strict):
    """Instructions, given only to a model that was trained to follow them."""

    role: Literal["system", "developer"]
    content: str | list[TextPart]
    name: str | None = None


class UserMessage(Strict):
    role: Literal["user"]
    content: str | list[UserPart]
    name: str | None = None


class AudioReference(Strict):
    id: str


class AssistantMessage(Strict):
    """An earlier answer: its text, or the id of its audio. A received message may be sent back unchanged."""

    role: Literal["assistant"]
    content: str | list[TextPart] | None = None
    audio: AudioReference | None = None
    name: str | None = None
    refusal: None = None
    annotations: Empty = None
    tool_calls: Empty = None
    function_call: None = None

    @model_validator(mode="before")
    @classmethod
    def _as_received(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("audio"), dict) and "id" in value["audio"]:
            return {**value, "audio": {"id": value["audio"]["id"]}}
        return value

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and self.audio is None:
            raise ValueError("an assistant message needs content or audio")
        return self


Message: TypeAlias = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class AudioOptions(Strict):
    voice: str | VoiceId | None = None
    format: Literal["wav", "flac", "mp3", "opus", "aac", "pcm16"] = "wav"


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(Strict):
    type: Literal["text"]


class ChatRequest(Body):
    """A conversation that ends with a user message."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    model: str | None = Field(None, description="Ignored: the server has one model.")
    modalities: list[Literal["text", "audio"]] = Field(default=["text"], min_length=1, max_length=2)
    audio: AudioOptions | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(None, ge=1, le=100_000, description="Counts text and speech tokens.")
    max_tokens: int | None = Field(None, ge=1, le=100_000, description="Deprecated name of max_completion_tokens.")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: Literal[1] | None = None
    response_format: TextFormat | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    frequency_penalty: Neutral | None = None
    presence_penalty: Neutral | None = None
    stop: Empty = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    tools: Tools = Field(default=[])
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool | None = None
    functions: Tools = Field(default=[], description="Deprecated name of tools.")
    function_call: ToolChoice = Field(default="auto", description="Deprecated name of tool_choice.")
    prediction: None = None
    web_search_options: None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _known_roles(cls, value: Any) -> Any:
        for message in value if isinstance(value, list) else []:
            if isinstance(message, dict) and message.get("role") in ("tool", "function"):
                raise ValueError("tool messages are not supported yet")
        return value

    @property
    def token_limit(self) -> int | None:
        """Maximum number of answer ids, or None."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def file_format(self) -> FileFormat:
        """Format of the answer's audio."""
        audio_format = "wav" if self.audio is None else self.audio.format
        return "pcm" if audio_format == "pcm16" else audio_format

    def sampling(self, default: Sampling) -> Sampling:
        """Returns the model's default sampling with the client's changes."""
        changes: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        return dataclasses.replace(default, **{name: value for name, value in changes.items() if value is not None})


class AssistantAudio(Strict):
    """Audio of an answer; `data` is a base64 audio file."""

    id: str
    data: str = Field(repr=False)
    transcript: str
    expires_at: int


class CompletionMessage(Strict):
    role: Literal["assistant"]
    content: str | None = None
    audio: AssistantAudio | None = None
    refusal: None = None


class Choice(Strict):
    index: int = 0
    message: CompletionMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class PromptDetails(Strict):
    audio_tokens: int = 0
    cached_tokens: int = 0


class CompletionDetails(Strict):
    audio_tokens: int = 0
    text_tokens: int = 0
    reasoning_tokens: int = 0


class CompletionUsage(Strict):
    """Token counts; control ids of the prompt are included."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptDetails = Field(default_factory=PromptDetails)
    completion_tokens_details: CompletionDetails = Field(default_factory=CompletionDetails)


class ChatCompletion(Strict):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: CompletionUsage
