"""`/v1/audio/transcriptions`: transcribes an audio file with the model's own recognition head.

The server's voice activity detector splits the file into utterances. Each is tokenized and transcribed by itself, so
long files stream, and silence or noise gives no text.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from fastapi import APIRouter, File, Form, Request, Response, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse
from numpy.typing import NDArray
from pydantic import BaseModel

from duologue import rates
from duologue.serving.errors import ApiError, documented, sse, sse_with_errors
from duologue.serving.objects import ServerVad
from duologue.serving.service import Service, cancel_on_disconnect, read_audio, stream_response
from duologue.serving.turn_detection import SileroStream, TurnDetector, TurnEnded, TurnSettings, TurnStarted

TranscriptFormat: TypeAlias = Literal["json", "text", "verbose_json", "srt", "vtt"]
MAX_UTTERANCE_S = 15.0  # one utterance is transcribed without interruption
_VAD_CHUNK = 10 * rates.LISTEN_SAMPLE_RATE


@dataclass(frozen=True)
class TranscribedUtterance:
    """The text spoken from `start` to `end`, in seconds."""

    start: float
    end: float
    text: str


class DurationUsage(BaseModel):
    """Seconds of transcribed audio."""

    type: Literal["duration"] = "duration"
    seconds: float


class Transcript(BaseModel):
    """The response in `json`."""

    text: str
    usage: DurationUsage


class Segment(BaseModel):
    """One utterance, times in seconds. Fields that only Whisper computes hold constants."""

    id: int
    start: float
    end: float
    text: str
    seek: int = 0
    tokens: list[int] = []
    temperature: float = 0.0
    avg_logprob: float = 0.0
    compression_ratio: float = 1.0
    no_speech_prob: float = 0.0


class VerboseTranscript(Transcript):
    """The response in `verbose_json`."""

    task: Literal["transcribe"] = "transcribe"
    language: str
    duration: float
    segments: list[Segment]


def utterances(wav: NDArray[np.float32]) -> list[tuple[int, int]]:
    """Returns the (start, stop) samples of speech in wav (S,) at 16 kHz. Call it in a thread."""
    stream = SileroStream()
    detector = TurnDetector(TurnSettings.of(ServerVad(), MAX_UTTERANCE_S))
    found: list[tuple[int, int]] = []
    start: int | None = None
    for at in range(0, len(wav), _VAD_CHUNK):
        for probability in stream.step(wav[at : at + _VAD_CHUNK]):
            detection = detector.step(probability)
            if isinstance(detection, TurnStarted):
                start = detection.sample
            elif isinstance(detection, TurnEnded) and start is not None:
                found.append((start, detection.sample))
                start = None
    if start is not None:
        found.append((start, len(wav)))
    return found


async def transcribe(service: Service, wav: NDArray[np.float32]) -> AsyncGenerator[TranscribedUtterance, None]:
    """Yields the utterances of wav (S,) at 16 kHz."""
    bot, rate = service.bot, rates.LISTEN_SAMPLE_RATE
    for start, stop in await asyncio.to_thread(utterances, wav):
        codes = await service.tokenize(wav[start:stop])
        text, _ = await bot.worker.submit(lambda codes=codes: bot.models.transcribe(codes))  # type: ignore[misc]
        if text:
            yield TranscribedUtterance(start / rate, stop / rate, text)
    service.metrics.audio_seconds.labels("in").inc(len(wav) / rate)


async def _events(service: Service, wav: NDArray[np.float32]) -> AsyncGenerator[bytes, None]:
    """Yields the transcript as server-sent events."""
    texts: list[str] = []
    async with aclosing(transcribe(service, wav)) as spoken:
        async for utterance in spoken:
            delta = f" {utterance.text}" if texts else utterance.text
            texts.append(utterance.text)
            yield sse({"type": "transcript.text.delta", "delta": delta})
    usage = {"type": "duration", "seconds": len(wav) / rates.LISTEN_SAMPLE_RATE}
    yield sse({"type": "transcript.text.done", "text": " ".join(texts), "usage": usage})


def _clock(seconds: float, comma: str) -> str:
    ms = round(seconds * 1000)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{comma}{ms % 1000:03}"


def subtitles(spoken: list[TranscribedUtterance], kind: Literal["srt", "vtt"]) -> str:
    """Formats utterances as SubRip or WebVTT."""
    comma = "," if kind == "srt" else "."
    cues = [f"{_clock(one.start, comma)} --> {_clock(one.end, comma)}\n{one.text}\n" for one in spoken]
    if kind == "vtt":
        return "\n".join(["WEBVTT\n", *cues])
    return "\n".join(f"{number}\n{cue}" for number, cue in enumerate(cues, 1))


def _answer(
    service: Service, spoken: list[TranscribedUtterance], seconds: float, response_format: TranscriptFormat
) -> Response:
    text, usage = " ".join(one.text for one in spoken), DurationUsage(seconds=seconds)
    if response_format == "text":
        return PlainTextResponse(f"{text}\n")
    if response_format in ("srt", "vtt"):
        return PlainTextResponse(subtitles(spoken, response_format))
    if response_format == "json":
        return JSONResponse(Transcript(text=text, usage=usage).model_dump())
    segments = [Segment(id=i, start=one.start, end=one.end, text=one.text) for i, one in enumerate(spoken)]
    language = service.bot.models.card.languages[0]
    verbose = VerboseTranscript(text=text, usage=usage, language=language, duration=seconds, segments=segments)
    return JSONResponse(verbose.model_dump())


def transcription_routes(service: Service) -> APIRouter:
    router = APIRouter()
    content = {
        "application/json": {"schema": {"anyOf": [_schema(Transcript), _schema(VerboseTranscript)]}},
        "text/plain": {"schema": {"type": "string"}},
        "text/event-stream": {},
    }

    @router.post(
        "/v1/audio/transcriptions",
        tags=["audio"],
        summary="Transcribe an audio file",
        response_class=Response,
        responses={200: {"description": "The transcript.", "content": content}, **documented(400, 404, 413, 429, 503)},
    )
    async def transcriptions(
        request: Request,
        file: Annotated[UploadFile, File(description="WAV, FLAC, OGG, MP3, WebM, MP4, M4A, AAC or AMR.")],
        model: Annotated[str | None, Form(description="Ignored: the server has one model.")] = None,
        language: Annotated[str | None, Form(description="A language of the model.")] = None,
        prompt: Annotated[str | None, Form(description="Accepted and ignored.")] = None,
        temperature: Annotated[float | None, Form(description="Accepted and ignored.", ge=0, le=1)] = None,
        response_format: Annotated[TranscriptFormat, Form()] = "json",
        stream: Annotated[bool, Form(description="Server-sent events, as `json` or `text` only.")] = False,
    ) -> Response:
        await _refuse_unsupported(request, service, language)
        if stream and response_format not in ("json", "text"):
            raise ApiError(
                f"response_format {response_format} cannot be streamed; use json or text", param="response_format"
            )
        data = await file.read()
        with service.admission.request():
            wav = await asyncio.to_thread(read_audio, data, service.settings.max_request_audio_s, "file")
        if stream:
            events = sse_with_errors(_events(service, wav), service.metrics, type="error")
            return await stream_response(service.admitted(events), "text/event-stream")

        async def whole() -> list[TranscribedUtterance]:
            with service.admission.request():
                return [one async for one in transcribe(service, wav)]

        spoken = await cancel_on_disconnect(request, whole())
        return _answer(service, spoken, len(wav) / rates.LISTEN_SAMPLE_RATE, response_format)

    return router


# Parameters of OpenAI's route that would change the result are refused.
_UNSUPPORTED = ("keywords", "known_speaker_names", "known_speaker_references", "include")
_ACCEPTED = ("file", "model", "language", "prompt", "temperature", "response_format", "stream", "chunking_strategy")
_LONG_CODES = {"eng": "en", "zho": "zh", "chi": "zh", "cmn": "zh"}  # ISO 639-2 and 639-3, for the models' languages
_GRANULARITY = ("timestamp_granularities", "timestamp_granularities[]")


async def _refuse_unsupported(request: Request, service: Service, language: str | None) -> None:
    card = service.bot.models.card
    if service.bot.models.recognizer is None:
        raise ApiError(f"{card.name} has no recognizer and cannot transcribe", "no_recognizer", status=404)
    form = await request.form()
    for name in form:
        if name.removesuffix("[]") in _UNSUPPORTED:
            raise ApiError(f"{name} is not supported by this server", "unsupported_parameter", name)
        if name in _GRANULARITY:
            if set(form.getlist(name)) - {"segment"}:
                raise ApiError(f"{name}: only segment is supported", param=name)
        elif name not in _ACCEPTED:
            raise ApiError(f"{name} is not a parameter of this route", "unknown_parameter", name)
    if language and language.lower() != "auto" and language_code(language) not in card.languages:
        raise ApiError(
            f"{card.name} does not know {language!r}; it knows {', '.join(card.languages)}", param="language"
        )


def language_code(name: str) -> str:
    """Returns the ISO 639-1 code of a language: `en` for `en_US`, `English` and `eng`. Other names stay as they are."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    first = name.strip().lower().replace("_", "-").partition("-")[0]
    return _LONG_CODES.get(first) or TO_LANGUAGE_CODE.get(first, first)


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """Returns a model's JSON schema with its references inlined."""
    schema = model.model_json_schema(mode="serialization")
    definitions = schema.pop("$defs", {})

    def resolved(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolved(definitions[node["$ref"].rpartition("/")[2]])
            return {name: resolved(value) for name, value in node.items()}
        return [resolved(value) for value in node] if isinstance(node, list) else node

    inlined: dict[str, Any] = resolved(schema)
    return inlined
