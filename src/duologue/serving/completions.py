"""`/v1/chat/completions`: one answer to a conversation held by the client, text and audio in and out.

Clients refer to spoken answers by `audio.id`, as in OpenAI's API. The server keeps the ids of those turns for an hour,
so that the model sees its own speech tokens and not a transcript.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from duologue.conversation.events import AudioDelta, EndReason, ReplyDone, TextDelta
from duologue.conversation.history import reply_prompt, turn_of
from duologue.conversation.mouth import Mouth
from duologue.interleave import Kind
from duologue.serving.chat_types import (
    AssistantAudio,
    AssistantMessage,
    AudioPart,
    ChatCompletion,
    ChatRequest,
    Choice,
    CompletionDetails,
    CompletionUsage,
    Message,
    PromptDetails,
    TextPart,
    UserMessage,
)
from duologue.serving.encoders import FileEncoder, encode
from duologue.serving.errors import ApiError, documented, sse, sse_with_errors
from duologue.serving.objects import find_voice
from duologue.serving.service import Service, cancel_on_disconnect, read_audio, stream_response
from duologue.turns import Conversation, Modality, Role, Turn

AUDIO_TTL_S = 3600
MAX_CACHED_TURNS = 1000


@dataclass(eq=False)
class SpokenReplyCache:
    """Spoken turns by audio id and key name. Entries expire."""

    _turns: OrderedDict[str, tuple[float, str, Turn]] = field(default_factory=OrderedDict)

    def put(self, audio_id: str, key: str, turn: Turn) -> int:
        """Stores a turn; returns its Unix expiry time."""
        expires = time.time() + AUDIO_TTL_S
        self._turns[audio_id] = expires, key, turn
        while len(self._turns) > MAX_CACHED_TURNS or next(iter(self._turns.values()))[0] < time.time():
            self._turns.popitem(last=False)
        return int(expires)

    def get(self, audio_id: str, key: str) -> Turn | None:
        """Returns the turn, or None if it expired or belongs to another key."""
        expires, owner, turn = self._turns.get(audio_id, (0.0, "", None))
        return turn if expires >= time.time() and owner == key else None


class Completion:
    """One chat completion in progress."""

    def __init__(self, service: Service, body: ChatRequest, spoken: SpokenReplyCache, key: str) -> None:
        self._service, self._body, self._spoken, self._key = service, body, spoken, key
        self.text_only = "audio" not in body.modalities
        card = service.bot.models.card
        voice = find_voice(card, None if body.audio is None else body.audio.voice, "audio.voice")
        sampling = body.sampling(card.sampling)
        if body.token_limit is not None:
            sampling = dataclasses.replace(sampling, max_tokens=min(sampling.max_tokens, body.token_limit))
        self._voice, self._sampling = voice, sampling
        self._prompt: list[int] = []
        self.id, self.audio_id = f"chatcmpl-{secrets.token_hex(12)}", f"audio_{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.usage = CompletionUsage()
        self.finish_reason = "stop"
        self.expires_at = 0

    async def prepare(self) -> None:
        """Builds the prompt from the messages. Raises ApiError naming the faulty message."""
        turns: list[Turn] = []
        follows = self._service.bot.models.card.follows_instructions
        for index, message in enumerate(self._body.messages):
            turn = await self._turn(message, f"messages.{index}")
            # A model trained without system turns would take the text for a question.
            if turn.role is not Role.SYSTEM or follows:
                turns.append(turn)
        if not turns or turns[-1].role is not Role.USER:
            raise ApiError("the last message must be a user message", param="messages")
        vocabulary = self._service.bot.models.vocabulary
        conversation = Conversation(tuple(turns), vocabulary.hash)
        modality = Modality.TEXT if self.text_only else Modality.INTERLEAVED
        models = self._service.bot.models
        try:
            prompt, self._sampling = await asyncio.to_thread(
                reply_prompt, models, conversation, modality, self._sampling
            )
        except ValueError as error:
            raise ApiError(str(error), "context_length_exceeded", "messages") from None
        self._prompt = prompt
        audio = sum(vocabulary.kind(token) is Kind.SPEECH for token in prompt)
        self.usage = CompletionUsage(prompt_tokens=len(prompt), prompt_tokens_details=PromptDetails(audio_tokens=audio))

    async def _turn(self, message: Message, param: str) -> Turn:
        vocabulary, role = self._service.bot.models.vocabulary, Role(message.role.replace("developer", "system"))
        if isinstance(message, AssistantMessage) and message.audio is not None:
            turn = self._spoken.get(message.audio.id, self._key)
            if turn is None:
                text = f"audio {message.audio.id!r} is unknown or expired; send the message's text instead"
                raise ApiError(text, "audio_not_found", f"{param}.audio.id")
            return turn
        ids: list[int] = []
        content = message.content
        parts: list[TextPart | AudioPart] = []
        if isinstance(content, str):
            parts = [TextPart(type="text", text=content)]
        elif content is not None:
            parts = list(content)
        for index, part in enumerate(parts):
            if isinstance(part, AudioPart):
                ids += await self._speech_ids(part, f"{param}.content.{index}.input_audio.data")
            else:
                ids += self._text_ids(part.text, param)
        if not ids and isinstance(message, UserMessage):
            raise ApiError(f"{param} is empty", param=f"{param}.content")
        return turn_of(role, ids, vocabulary)

    def _text_ids(self, text: str, param: str) -> list[int]:
        most = self._service.settings.max_input_chars
        if len(text) > most:
            raise ApiError(
                f"{param}: a text may have at most {most} characters, got {len(text)}", "input_too_long", param
            )
        return self._service.bot.models.vocabulary.encode_text(text)

    async def _speech_ids(self, part: AudioPart, param: str) -> list[int]:
        try:
            data = base64.b64decode(part.input_audio.data, validate=True)
        except ValueError:
            raise ApiError(f"{param} is not base64", "invalid_audio", param) from None
        wav = await asyncio.to_thread(read_audio, data, self._service.settings.audio_buffer_s, param)
        return self._service.bot.models.vocabulary.speech_ids(await self._service.tokenize(wav))

    async def events(self) -> AsyncGenerator[TextDelta | AudioDelta, None]:
        """Yields text and audio as they are generated. Afterwards `usage` and `finish_reason` are set."""
        bot = self._service.bot
        mouth = Mouth(bot.models, bot.worker, text_only=self.text_only)
        reply = self._service.generate_reply("chat", mouth, self._prompt, self._sampling)
        async with aclosing(reply) as events:
            async for event in events:
                if (isinstance(event, TextDelta) and event.text) or isinstance(event, AudioDelta):
                    yield event
                elif isinstance(event, ReplyDone):
                    self._finish(event, mouth.turn)

    def _finish(self, done: ReplyDone, turn: Turn) -> None:
        text, speech = done.timings.num_text_tokens, done.timings.num_speech_tokens
        self.finish_reason = "length" if done.reason is EndReason.LENGTH else "stop"
        details = CompletionDetails(audio_tokens=speech, text_tokens=text)
        self.usage = self.usage.model_copy(
            update={
                "completion_tokens": text + speech,
                "total_tokens": self.usage.prompt_tokens + text + speech,
                "completion_tokens_details": details,
            }
        )
        if not self.text_only:
            turn = dataclasses.replace(turn, voice=self._voice)
            self.expires_at = self._spoken.put(self.audio_id, self._key, turn)

    async def create(self) -> ChatCompletion:
        """Returns the complete answer."""
        with self._service.admission.request():
            await self.prepare()
            texts: list[str] = []
            sound: list[Any] = [np.zeros(0, np.float32)]
            async with aclosing(self.events()) as events:
                async for event in events:
                    if isinstance(event, TextDelta):
                        texts.append(event.text)
                    else:
                        sound.append(event.wav)
            text = "".join(texts)
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if not self.text_only:
                file = await asyncio.to_thread(encode, np.concatenate(sound), self._body.file_format)
                data = base64.b64encode(file).decode("ascii")
                audio = AssistantAudio(id=self.audio_id, data=data, transcript=text, expires_at=self.expires_at)
                message |= {"content": None, "audio": audio}
        choice = Choice.model_validate({"message": message, "finish_reason": self.finish_reason})
        return ChatCompletion(
            id=self.id, created=self.created, model=self._service.model, choices=[choice], usage=self.usage
        )

    async def events_json(self) -> AsyncGenerator[bytes, None]:
        """Yields the answer as server-sent events."""
        await self.prepare()
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                yield sse(chunk)
        yield b"data: [DONE]\n\n"

    async def _chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        encoder = FileEncoder(self._body.file_format)
        first: dict[str, Any] = {"role": "assistant", "content": "" if self.text_only else None}
        if not self.text_only:
            first["audio"] = {"id": self.audio_id}
        async with aclosing(self.events()) as events:
            async for event in events:
                if first:
                    yield self._chunk(first)
                    first = {}
                if isinstance(event, AudioDelta):
                    if data := await asyncio.to_thread(encoder.step, event.wav):
                        yield self._sound(data)
                else:
                    yield self._chunk(
                        {"content": event.text} if self.text_only else {"audio": {"transcript": event.text}}
                    )
        if not self.text_only:
            if data := await asyncio.to_thread(encoder.step, np.zeros(0, np.float32), True):
                yield self._sound(data)
            yield self._chunk({"audio": {"expires_at": self.expires_at}})
        yield self._chunk({}, self.finish_reason)
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            yield {**self._chunk({}), "choices": [], "usage": self.usage.model_dump()}

    def _sound(self, data: bytes) -> dict[str, Any]:
        return self._chunk({"audio": {"data": base64.b64encode(data).decode("ascii")}})

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created}
        return {**head, "model": self._service.model, "choices": [choice]}


def completion_routes(service: Service) -> APIRouter:
    router = APIRouter()
    spoken = SpokenReplyCache()

    @router.post(
        "/v1/chat/completions",
        tags=["chat"],
        summary="Answer a conversation",
        response_model=ChatCompletion,
        responses={
            200: {"description": "The answer.", "content": {"text/event-stream": {}}},
            **documented(400, 413, 429, 503),
        },
    )
    async def completions(body: ChatRequest, request: Request, key: str = Depends(service.key)) -> Response:
        completion = Completion(service, body, spoken, key)
        if body.stream:
            events = sse_with_errors(completion.events_json(), service.metrics)
            return await stream_response(service.admitted(events), "text/event-stream")
        answer = await cancel_on_disconnect(request, completion.create())
        return JSONResponse(answer.model_dump(exclude_none=False))

    return router
