"""Two ways to ask a benchmark's questions: a chatbot in this process, or any server of OpenAI's Realtime protocol."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
from numpy.typing import NDArray

from duologue.audio import resample
from duologue.client.connection import WIRE_RATE, Connection, ConnectionLost, decode_pcm, open_connection, realtime_url
from duologue.conversation.chatbot import Chatbot
from duologue.conversation.events import AudioDelta, Event, ReplyDone
from duologue.conversation.mouth import Mouth
from duologue.evaluation.benchmarks.items import BenchmarkItem, BenchmarkQuestion, Scoring
from duologue.language.reading import prepare_reading
from duologue.language.sampling import Sampling
from duologue.language.scripts import TEXT_LANGUAGES
from duologue.pcm import from_int16, to_int16
from duologue.sound_files import load_audio

ANSWER_S = 300.0  # of one reply
_APPEND = WIRE_RATE // 10


class AskingFailed(Exception):
    """One question has no answer; the text says why. The others go on."""


@dataclass(frozen=True, eq=False)
class SpokenReply:
    """A reply as it arrived: wav (S,) float32 in [-1, 1], times in seconds after the end of the question."""

    text: str
    wav: NDArray[np.float32]
    sample_rate: int
    first_audio_s: float | None
    total_s: float


class Asker(Protocol):
    """What answers questions."""

    def about(self) -> dict[str, Any]:
        """Name and settings, for the report and to recognize the same run."""
        ...

    def ask(self, item: BenchmarkItem) -> AsyncIterator[SpokenReply]:
        """Yields the reply to each turn. Raises AskingFailed."""
        ...


class ChatbotAsker:
    """Asks a chatbot in this process. Conversations at the same time share the steps of its engine.

    Args:
        model: name and hashes, for the report.
        seed: of every reply.
        keep_language: restricts the text of a reply to the language of its item, if the model has several. Without
            this a bilingual model sometimes answers in its other language, which every matcher counts as wrong.
    """

    def __init__(self, bot: Chatbot, model: dict[str, Any], seed: int = 0, keep_language: bool = True) -> None:
        self.bot, self._model, self._seed = bot, model, seed
        self._restricts = keep_language and len(bot.models.card.languages) > 1

    def about(self) -> dict[str, Any]:
        return {**self._model, "seed": self._seed, "text_language": "of the item" if self._restricts else "any"}

    async def ask(self, item: BenchmarkItem) -> AsyncIterator[SpokenReply]:
        sampling = self._sampling(item.language)
        session = self.bot.session(language=item.language, sampling=sampling)
        for question in item.questions:
            try:
                if item.scoring is Scoring.READ:
                    yield await _collect(self._read_aloud(question.text, sampling))
                    continue
                if question.sound is None:
                    session.write(question.text)
                else:
                    await session.hear(*await asyncio.to_thread(load_question, question))
                yield await _collect(session.reply())
            except (ValueError, RuntimeError) as error:
                raise AskingFailed(str(error)) from error

    def _sampling(self, language: str) -> Sampling:
        sampling = dataclasses.replace(self.bot.models.card.sampling, seed=self._seed)
        if self._restricts and language in TEXT_LANGUAGES:
            sampling = dataclasses.replace(sampling, text_language=language)  # type: ignore[arg-type]
        return sampling

    async def _read_aloud(self, text: str, sampling: Sampling) -> AsyncIterator[Event]:
        """The reply to "say ..." whose text is given (`language/reading.py`)."""
        models = self.bot.models
        engine, prompt, limited = prepare_reading(models.engine, models.vocabulary, text, sampling)
        mouth = Mouth(dataclasses.replace(models, engine=engine), self.bot.worker)
        async with aclosing(mouth.speak(prompt, limited)) as events:
            async for event in events:
                yield event


class ServerAsker:
    """Asks a server of OpenAI's Realtime protocol in manual turns; texts to be read go to its `/v1/audio/speech`.

    The protocol has no seed and no language of the reply, so both are the server's own.

    Args:
        server: see `realtime_url`.
        key: API key, or empty.
        instructions: sent with the session; empty keeps the server's.
    """

    def __init__(self, server: str, model: str, key: str = "", instructions: str = "") -> None:
        self.url = realtime_url(server, model)
        self._server, self._model, self._key, self._instructions = server, model, key, instructions

    def about(self) -> dict[str, Any]:
        return {"name": self._model, "server": self.url, "instructions": self._instructions, "seed": "of the server"}

    async def ask(self, item: BenchmarkItem) -> AsyncIterator[SpokenReply]:
        try:
            if item.scoring is Scoring.READ:
                for question in item.questions:
                    yield await asyncio.to_thread(self._read_aloud, question.text)
                return
            async with open_connection(self._server, self._model, self._key) as connection:
                async with asyncio.timeout(ANSWER_S):
                    await self._configure(connection)
                for question in item.questions:
                    async with asyncio.timeout(ANSWER_S):
                        yield await _ask_server(connection, question)
        except TimeoutError:
            raise AskingFailed(f"{self.url} gave no answer within {ANSWER_S:.0f} s") from None
        except (ValueError, ConnectionLost) as error:
            raise AskingFailed(str(error)) from error

    async def _configure(self, connection: Connection) -> None:
        wire = {"type": "audio/pcm", "rate": WIRE_RATE}
        audio = {"input": {"format": wire, "turn_detection": None}, "output": {"format": wire}}
        session: dict[str, Any] = {"type": "realtime", "output_modalities": ["audio"], "audio": audio}
        if self._instructions:
            session["instructions"] = self._instructions
        await connection.send({"type": "session.update", "session": session})
        _raise_error(await connection.receive_until("session.updated", "error"))

    def _read_aloud(self, text: str) -> SpokenReply:
        url = speech_url(self.url)
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        body = {"model": self._model, "input": text, "voice": "alloy", "response_format": "wav"}
        start = time.monotonic()
        try:
            request = Request(url, json.dumps(body).encode(), headers)
            with urlopen(request, timeout=ANSWER_S) as response:
                data = response.read()
        except HTTPError as error:
            raise AskingFailed(f"{url}: {error.code} {error.read().decode('utf-8', 'replace')[:300]}") from None
        except (URLError, OSError) as error:
            raise AskingFailed(f"{url}: {error}") from None
        wav, rate = load_audio(data)
        return SpokenReply(text, wav, rate, None, time.monotonic() - start)


def speech_url(url: str) -> str:
    """`ws://host/v1/realtime?model=x` -> `http://host/v1/audio/speech`."""
    parts = urlsplit(url)
    scheme = {"ws": "http", "wss": "https"}[parts.scheme]
    return f"{scheme}://{parts.netloc}{parts.path.removesuffix('/realtime')}/audio/speech"


def load_question(question: BenchmarkQuestion) -> tuple[NDArray[np.float32], int]:
    """The sound of a question: wav (S,) float32 and its sample rate. Raises ValueError if it cannot be read."""
    assert question.sound is not None
    place = question.sound.read()
    return load_audio(place, name=os.fspath(question.sound.path))


async def _collect(events: AsyncIterator[Event]) -> SpokenReply:
    parts: list[NDArray[np.float32]] = []
    rate, done = 0, None
    async for event in events:
        if isinstance(event, AudioDelta):
            parts.append(event.wav)
            rate = event.sample_rate
        elif isinstance(event, ReplyDone):
            done = event
    assert done is not None
    wav = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return SpokenReply(done.text, wav, rate, done.timings.first_audio_s, done.timings.total_s)


async def _ask_server(connection: Connection, question: BenchmarkQuestion) -> SpokenReply:
    if question.sound is None:
        content = [{"type": "input_text", "text": question.text}]
        message = {"type": "message", "role": "user", "content": content}
        await connection.send({"type": "conversation.item.create", "item": message})
    else:
        wav, rate = await asyncio.to_thread(load_question, question)
        pcm = to_int16(resample(wav, rate, WIRE_RATE))
        for at in range(0, len(pcm), _APPEND):
            await connection.append(pcm[at : at + _APPEND])
        await connection.send({"type": "input_audio_buffer.commit"})
    await connection.send({"type": "response.create"})
    start, first, text, parts = time.monotonic(), None, "", [np.zeros(0, np.int16)]
    while True:
        event = await connection.receive()
        match event["type"]:
            case "error":
                _raise_error([event])
            case "response.output_audio.delta":
                first = time.monotonic() if first is None else first
                parts.append(decode_pcm(event["delta"]))
            case "response.output_audio_transcript.delta" | "response.output_text.delta":
                text += event["delta"]
            case "response.done":
                break
    if event["response"]["status"] not in ("completed", "incomplete"):
        details = (event["response"].get("status_details") or {}).get("error") or {}
        raise AskingFailed(
            f"the response is {event['response']['status']}: {details.get('message', 'without a reason')}"
        )
    wav = from_int16(np.concatenate(parts))
    return SpokenReply(text.strip(), wav, WIRE_RATE, None if first is None else first - start, time.monotonic() - start)


def _raise_error(events: list[dict[str, Any]]) -> None:
    if events[-1]["type"] == "error":
        raise AskingFailed(str(events[-1].get("error", {}).get("message", "the server sent an error")))
