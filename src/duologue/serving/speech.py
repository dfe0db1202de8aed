"""`/v1/audio/speech`: reads a text aloud.

The model is a chatbot, not a synthesizer. The text is forced as the text of a reply to "say ..."
(`language/reading.py`), and the model generates the speech tokens. Quality depends on the model's training.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import Field

from duologue.conversation.events import AudioDelta, Event, ReplyDone
from duologue.conversation.mouth import Mouth
from duologue.language.reading import MAX_CHUNK_IDS, SPARE_IDS, SPEECH_PER_TEXT, prepare_reading
from duologue.serving.encoders import MEDIA_TYPES, FileEncoder, FileFormat
from duologue.serving.errors import ApiError, documented, sse, sse_with_errors
from duologue.serving.objects import Body, VoiceId, find_voice
from duologue.serving.service import Service, stream_response
from duologue.spoken_text import chunks, speakable, write_out_numbers


class SpeechRequest(Body):
    """The body of a speech request."""

    input: str = Field(min_length=1, description="The text to speak.")
    model: str | None = Field(None, description="Ignored: the server has one model.")
    voice: str | VoiceId | None = Field(
        None, description="A voice of the model; OpenAI's voices map to its default voice."
    )
    instructions: str | None = Field(
        None, max_length=1000, description="Appended to the prompt `say ...`, such as `slowly`; depends on training."
    )
    response_format: FileFormat = "mp3"
    speed: float = Field(1.0, ge=0.25, le=4.0)
    stream_format: Literal["audio", "sse"] = "audio"


class Narrator:
    """Synthesizes one text.

    Raises:
        ApiError: the text is too long or holds nothing that can be spoken.
        ProtocolError: the voice is unknown.
    """

    def __init__(self, service: Service, body: SpeechRequest) -> None:
        if len(body.input) > service.settings.max_input_chars:
            most = service.settings.max_input_chars
            raise ApiError(f"input may have {most} characters, got {len(body.input)}", "input_too_long", "input")
        self._service, self._body = service, body
        self._models = service.bot.models
        find_voice(self._models.card, body.voice, "voice")  # raises for an unknown voice
        self._instructions = " ".join((body.instructions or "").split())
        self.num_text = self.num_speech = 0
        encode = self._models.vocabulary.encode_text
        room = self._models.engine.max_positions - SPARE_IDS - 2 * len(encode(self._instructions))
        limit = min(MAX_CHUNK_IDS, room // (SPEECH_PER_TEXT + 2))
        text = speakable(body.input)
        if service.settings.write_out_numbers and self._models.card.languages == ("en",):
            text = write_out_numbers(text)
        self._chunks = chunks(text, lambda span: len(encode(span)), limit)
        if not self._chunks:
            raise ApiError("input holds no speakable text", param="input")

    async def sound(self) -> AsyncGenerator[bytes, None]:
        """Yields the bytes of the audio file as they are generated."""
        encoder = FileEncoder(self._body.response_format, self._body.speed)
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
        """Yields the audio as server-sent events."""
        async with aclosing(self.sound()) as sound:
            async for data in sound:
                yield sse({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode("ascii")})
        total = self.num_text + self.num_speech
        usage = {"input_tokens": self.num_text, "output_tokens": self.num_speech, "total_tokens": total}
        yield sse({"type": "speech.audio.done", "usage": usage})

    def _reply(self, chunk: str) -> AsyncGenerator[Event, None]:
        """Generates the reply to "say ..." with the chunk as its text."""
        models = self._models
        engine, prompt, sampling = prepare_reading(
            models.engine, models.vocabulary, chunk, models.card.sampling, self._instructions
        )
        mouth = Mouth(dataclasses.replace(models, engine=engine), self._service.bot.worker)
        return self._service.generate_reply("speech", mouth, prompt, sampling)


def speech_routes(service: Service) -> APIRouter:
    router = APIRouter()
    content = {media: {"schema": {"type": "string", "format": "binary"}} for media in MEDIA_TYPES.values()}
    content["text/event-stream"] = {}

    @router.post(
        "/v1/audio/speech",
        tags=["audio"],
        summary="Speak a text",
        response_class=Response,
        responses={
            200: {"description": "The audio, streamed.", "content": content},
            **documented(400, 413, 429, 503),
        },
    )
    async def speech(body: SpeechRequest, request: Request) -> Response:
        narrator = await asyncio.to_thread(Narrator, service, body)  # a long text takes seconds to cut
        if body.stream_format == "sse":
            events = sse_with_errors(narrator.events(), service.metrics, type="error")
            return await stream_response(service.admitted(events), "text/event-stream")
        return await stream_response(service.admitted(narrator.sound()), MEDIA_TYPES[body.response_format])

    return router
