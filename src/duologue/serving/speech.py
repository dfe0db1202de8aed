"""`/v1/audio/speech`: a given text, said by the model.

The model is a chatbot and no synthesizer: it speaks what it writes. So the text is given to it as the text of a reply
(`language/reading.py`) to the request "say ...", and the speech is what it makes of it, in its own voice. How well a
text is said depends on what the model has learned to say.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import Field

from duologue.conversation.events import AudioDelta, Event, ReplyDone
from duologue.conversation.history import reply_prompt, turn_of
from duologue.conversation.mouth import Mouth
from duologue.language.reading import ReadingEngine
from duologue.serving.encoders import MEDIA_TYPES, FileEncoder, FileFormat
from duologue.serving.errors import ApiError, documented, error_json, told
from duologue.serving.objects import Strict, VoiceId
from duologue.serving.service import Service, streamed
from duologue.turns import Conversation, Modality, Role

MAX_CHUNK_IDS = 60  # text that is said in one breath: one reply of the model
SPEECH_PER_TEXT = 8  # ids of speech that one id of text may take at most
SPARE_IDS = 64
_SENTENCE_END = re.compile(r"(?<=[.!?;:。！？；])\s*")


class SpeechRequest(Strict):
    """What is to be said, and how."""

    input: str = Field(min_length=1, description="The text to be said.")
    model: str | None = Field(None, description="Any name: the server has one model.")
    voice: str | VoiceId | None = Field(None, description="A voice of the model; a voice of OpenAI's is its own voice.")
    instructions: str | None = Field(
        None, max_length=1000, description="Added to the request `say ...`, such as `slowly`; understood if learned."
    )
    response_format: FileFormat = "mp3"
    speed: float = Field(1.0, ge=0.25, le=4.0)
    stream_format: Literal["audio", "sse"] = "audio"


def chunks(text: str, count: Any, limit: int) -> list[str]:
    """A text in pieces of at most `limit` ids where that is possible: sentences, and words of long sentences.

    Args:
        count: text -> number of its ids.
    """
    pieces: list[str] = []
    for sentence in (part.strip() for part in _SENTENCE_END.split(text)):
        if not sentence:
            continue
        words = [sentence] if count(sentence) <= limit else sentence.split()
        for word in words:
            if pieces and count(f"{pieces[-1]} {word}") <= limit:
                pieces[-1] += f" {word}"
            else:
                pieces.append(word)
    return pieces


class Narrator:
    """One text on its way to sound.

    Raises:
        ApiError: nothing to say, a text with a word that is too long, an unknown voice.
    """

    def __init__(self, service: Service, asked: SpeechRequest) -> None:
        if len(asked.input) > service.settings.max_input_chars:
            most = service.settings.max_input_chars
            raise ApiError(f"input may have {most} characters, got {len(asked.input)}", "input_too_long", "input")
        self._service, self._asked = service, asked
        self._models = service.bot.models
        service.voice(asked.voice, "voice")  # an unknown one is refused
        self._instructions = " ".join((asked.instructions or "").split())
        self.num_text = self.num_speech = 0
        encode = self._models.vocabulary.encode_text
        room = self._models.engine.max_positions - SPARE_IDS - 2 * len(encode(self._instructions))
        limit = min(MAX_CHUNK_IDS, room // (SPEECH_PER_TEXT + 2))
        self._chunks = chunks(asked.input, lambda text: len(encode(text)), limit)
        if not self._chunks:
            raise ApiError("input holds nothing that can be said", param="input")
        if max(len(encode(chunk)) for chunk in self._chunks) > limit:
            raise ApiError("input holds a word that is too long to be said", "input_too_long", "input")

    async def sound(self) -> AsyncGenerator[bytes, None]:
        """The bytes of the file as they are made."""
        encoder = FileEncoder(self._asked.response_format, self._asked.speed)
        for chunk in self._chunks:
            async with aclosing(self._reply(chunk)) as events:
                async for event in events:
                    if isinstance(event, AudioDelta):
                        if data := await asyncio.to_thread(encoder.step, event.wav):
                            yield data
                    elif isinstance(event, ReplyDone):
                        self.num_text += event.timings.num_text_tokens
                        self.num_speech += event.timings.num_speech_tokens
        yield await asyncio.to_thread(encoder.step, np.zeros(0, np.float32), True)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The same as server-sent events."""
        async with aclosing(self.sound()) as sound:
            async for data in sound:
                yield _event({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode("ascii")})
        total = self.num_text + self.num_speech
        usage = {"input_tokens": self.num_text, "output_tokens": self.num_speech, "total_tokens": total}
        yield _event({"type": "speech.audio.done", "usage": usage})

    def _reply(self, chunk: str) -> AsyncGenerator[Event, None]:
        """The reply to "say ...", whose text is the chunk."""
        bot, vocabulary = self._service.bot, self._models.vocabulary
        ids = tuple(vocabulary.encode_text(chunk))
        models = dataclasses.replace(self._models, engine=ReadingEngine(self._models.engine, vocabulary, ids))
        most = len(ids) * (1 + SPEECH_PER_TEXT) + SPARE_IDS
        asked = turn_of(Role.USER, vocabulary.encode_text(f"say {chunk} {self._instructions}".strip()), vocabulary)
        prompt, sampling = reply_prompt(
            models,
            Conversation((asked,), vocabulary.hash),
            Modality.INTERLEAVED,
            dataclasses.replace(models.card.sampling, max_tokens=most),
        )
        return self._service.replying("speech", Mouth(models, bot.worker), prompt, sampling)


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


async def _ending_in_an_event(parts: AsyncGenerator[bytes, None], service: Service) -> AsyncGenerator[bytes, None]:
    """Events whose failure is the last event: the status was sent long ago."""
    begun = False
    async with aclosing(parts):
        try:
            async for part in parts:
                yield part
                begun = True
        except Exception as error:
            if not begun:
                raise
            message, status, code, param = told(error)
            service.metrics.errors.labels(code or "other").inc()
            yield _event({"type": "error", **error_json(message, status, code, param)})


async def _admitted(parts: AsyncGenerator[bytes, None], service: Service) -> AsyncGenerator[bytes, None]:
    with service.admission.request():
        async with aclosing(parts):
            async for part in parts:
                yield part


def speech_routes(service: Service) -> APIRouter:
    """`/v1/audio/speech`."""
    router = APIRouter()
    content = {media: {"schema": {"type": "string", "format": "binary"}} for media in MEDIA_TYPES.values()}
    content["text/event-stream"] = {}

    @router.post(
        "/v1/audio/speech",
        tags=["audio"],
        summary="Say a text",
        response_class=Response,
        responses={
            200: {"description": "The sound, as it is made.", "content": content},
            **documented(400, 413, 429, 503),
        },
    )
    async def speech(asked: SpeechRequest, request: Request) -> Response:
        narrator = Narrator(service, asked)
        if asked.stream_format == "sse":
            events = _ending_in_an_event(narrator.events(), service)
            return await streamed(_admitted(events, service), "text/event-stream")
        return await streamed(_admitted(narrator.sound(), service), MEDIA_TYPES[asked.response_format])

    return router
