"""The session of LiveKit Agents' `openai` plug-in, without a room: it is spoken to, written to and interrupted."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from livekit import rtc
from livekit.agents import llm
from livekit.plugins.openai.realtime import RealtimeModel

SAMPLE_RATE = 24_000
CHUNK = 2400  # samples: 100 ms


@dataclass
class Heard:
    """What the session gave: each answer's text and 16-bit sound, errors, and the events that it sent."""

    texts: list[str] = field(default_factory=list)
    sounds: list[bytes] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    sent: list[dict[str, Any]] = field(default_factory=list)


async def _answer(generation: llm.GenerationCreatedEvent, heard: Heard) -> str:
    """Reads one answer; returns its message id."""
    message_id = ""
    async for message in generation.message_stream:
        message_id = message.message_id
        texts: list[Any] = []
        frames: list[Any] = []

        async def read(stream: Any, into: list[Any]) -> None:
            async for piece in stream:
                into.append(piece)

        await asyncio.gather(read(message.text_stream, texts), read(message.audio_stream, frames))
        heard.texts.append("".join(map(str, texts)))
        heard.sounds.append(b"".join(bytes(frame.data) for frame in frames))
    return message_id


async def talk(url: str, key: str, pcm: bytes) -> Heard:
    """Asks aloud, then in writing, and truncates the second answer.

    Args:
        url: base URL, such as ws://127.0.0.1:8000/v1.
        pcm: a question with silence after it, 16 bit at 24 kHz.
    """
    heard = Heard()
    async with aiohttp.ClientSession() as http:
        session = RealtimeModel(base_url=url, api_key=key, http_session=http).session()
        spoken: asyncio.Queue[llm.GenerationCreatedEvent] = asyncio.Queue()
        session.on("openai_client_event_queued", heard.sent.append)
        session.on("error", lambda error: heard.errors.append(str(error.error)))
        session.on("generation_created", spoken.put_nowait)
        await session.update_instructions("You are brief.")
        for start in range(0, len(pcm), 2 * CHUNK):
            data = pcm[start : start + 2 * CHUNK]
            session.push_audio(rtc.AudioFrame(data, SAMPLE_RATE, 1, len(data) // 2))
        await _answer(await spoken.get(), heard)

        written = session.chat_ctx.copy()
        written.add_message(role="user", content="And seven plus six?")
        await session.update_chat_ctx(written)
        message_id = await _answer(await session.generate_reply(), heard)
        session.truncate(message_id=message_id, modalities=["audio"], audio_end_ms=200)
        await asyncio.sleep(0.5)  # for the error, if there were one
        await session.aclose()
    return heard
