"""Real clients of the OpenAI Realtime protocol, unmodified, against the real server."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import connect

from duologue import rates
from tests.live_server import NUM_SPEECH, TEXT, LiveServer, Talk, question, scripted_bot, serving

KEY = "a-key-of-enough-length"
TIMEOUT_S = 300.0  # a busy machine is not a failing test


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[LiveServer]:
    with serving(*scripted_bot(tiny_folder), api_keys=(KEY,)) as running:
        yield running


@pytest.fixture(autouse=True)
def _released(server: LiveServer) -> None:
    server.engine.release()


def chunks(pcm: bytes) -> Iterator[bytes]:
    for start in range(0, len(pcm), 9600):
        yield pcm[start : start + 9600]


def expected_seconds() -> float:
    return rates.speak_samples_for_tokens(NUM_SPEECH) / rates.SPEAK_SAMPLE_RATE


# The SDK.


def test_the_openai_sdk_asks_and_hears(server: LiveServer) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(api_key=KEY, base_url=server.url.replace("ws://", "http://"))
    with client.realtime.connect(model="gpt-realtime") as connection:
        connection.session.update(session={"type": "realtime", "instructions": "Be brief."})
        for chunk in chunks(question().tobytes()):
            connection.input_audio_buffer.append(audio=base64.b64encode(chunk).decode())
        heard, transcript, seen = b"", "", []
        for event in connection:
            assert type(event).__name__ != "UnknownEvent"
            seen.append(event.type)
            if event.type == "response.output_audio.delta":
                heard += base64.b64decode(event.delta)
            elif event.type == "response.output_audio_transcript.done":
                transcript = event.transcript
            elif event.type == "response.done":
                break
    assert seen[:2] == ["session.created", "session.updated"]
    assert "error" not in seen
    assert transcript == TEXT
    assert len(heard) / 48_000 == pytest.approx(expected_seconds(), abs=0.02)
    assert event.response.status == "completed"
    assert event.response.usage.output_token_details.audio_tokens == NUM_SPEECH


def test_the_openai_sdk_by_its_websocket_address(server: LiveServer) -> None:
    openai = pytest.importorskip("openai")

    async def talk() -> str:
        client = openai.AsyncOpenAI(api_key=KEY, websocket_base_url=server.url)
        async with client.realtime.connect(model="anything") as connection:
            message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello."}]}
            await connection.conversation.item.create(item=message)
            await connection.response.create(response={"output_modalities": ["text"]})
            async for event in connection:
                if event.type == "response.output_text.done":
                    return str(event.text)
        raise AssertionError("the connection ended before the answer")

    assert asyncio.run(asyncio.wait_for(talk(), TIMEOUT_S)) == TEXT


# The agents' runner.


def test_openai_agents_talk_are_interrupted_and_keep_the_history(server: LiveServer) -> None:
    realtime = pytest.importorskip("agents.realtime")
    agent = realtime.RealtimeAgent(name="Assistant", instructions="You are brief.")
    runner = realtime.RealtimeRunner(agent)
    config = {"api_key": KEY, "url": f"{server.url}/realtime?model=gpt-realtime"}

    async def listen(session: Any, events: asyncio.Queue[Any]) -> None:
        async for event in session:
            await events.put(event)

    async def until(events: asyncio.Queue[Any], kind: str) -> list[Any]:
        seen = [await events.get()]
        while seen[-1].type != kind:
            assert seen[-1].type != "error", seen[-1]
            seen.append(await events.get())
        return seen

    async def talk() -> None:
        events: asyncio.Queue[Any] = asyncio.Queue()
        async with await runner.run(model_config=config) as session:
            listening = asyncio.create_task(listen(session, events))
            for chunk in chunks(question(after_s=1.5).tobytes()):  # its turn detection waits longer
                await session.send_audio(chunk)
            answer = await until(events, "agent_end")
            heard = b"".join(event.audio.data for event in answer if event.type == "audio")
            assert len(heard) / 48_000 == pytest.approx(expected_seconds(), abs=0.02)

            server.engine.hold(35)
            await session.send_message("And seven plus six?")
            await until(events, "audio")
            for chunk in chunks(question(before_s=0.0, after_s=1.5).tobytes()):
                await session.send_audio(chunk)
            await until(events, "audio_interrupted")
            await until(events, "agent_end")
            server.engine.release()
            await until(events, "agent_end")
            messages = [item for item in session._history if item.type == "message"]
            assert [item.role for item in messages] == ["user", "assistant"] * 3
            assert messages[1].content[0].transcript == TEXT
            assert messages[3].status == "incomplete"
            listening.cancel()

    asyncio.run(asyncio.wait_for(talk(), TIMEOUT_S))


# pipecat, where it is installed: pip install "pipecat-ai[openai]".


def test_pipecat_speaks_and_hears(server: LiveServer) -> None:
    pytest.importorskip("pipecat")
    from tests.pipecat_client import ask

    heard = asyncio.run(
        asyncio.wait_for(ask(server.url, KEY, question().tobytes(), expected_seconds() - 0.1), TIMEOUT_S)
    )
    assert heard.errors == []
    assert heard.text == TEXT
    assert len(heard.audio) / 48_000 == pytest.approx(expected_seconds(), abs=0.1)


# LiveKit Agents, where it is installed: pip install "livekit-agents[openai]".


def test_livekit_speaks_hears_writes_and_truncates(server: LiveServer) -> None:
    pytest.importorskip("livekit.plugins.openai")
    from tests.livekit_client import talk

    heard = asyncio.run(asyncio.wait_for(talk(server.url, KEY, question(after_s=1.5).tobytes()), TIMEOUT_S))
    assert heard.errors == []
    assert heard.texts == [TEXT, TEXT]
    assert [len(pcm) / 48_000 for pcm in heard.sounds] == pytest.approx([expected_seconds()] * 2, abs=0.02)


# speech-to-speech of Hugging Face, where it is installed: pip install speech-to-speech.


def test_speech_to_speech_speaks_and_hears(server: LiveServer) -> None:
    pytest.importorskip("speech_to_speech")
    from tests.speech_to_speech_client import talk

    heard = asyncio.run(asyncio.wait_for(talk(server.url, KEY, question(after_s=1.0).tobytes()), TIMEOUT_S))
    assert heard.errors == []
    assert heard.texts == [TEXT]
    assert len(heard.sound) / 48_000 == pytest.approx(expected_seconds(), abs=0.3)


# What the three send, where they are not installed; recorded by `python -m tests.record_sessions`.

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "client_sessions.json").read_text())


@pytest.mark.parametrize("client", RECORDED)
def test_recorded_events_are_taken_and_answered(server: LiveServer, client: str) -> None:
    seen: list[dict[str, Any]] = []
    headers = {"Authorization": f"Bearer {KEY}"}
    with connect(f"{server.url}/realtime?model=any", max_size=None, additional_headers=headers) as socket:
        talk = Talk(socket)
        for event in RECORDED[client]["events"]:
            if "num_samples" in event:
                talk.append(np.resize(question(after_s=1.5), event["num_samples"]))
            else:
                items = [one["item"]["id"] for one in seen if one["type"] == "conversation.item.added"]
                number = lambda found, items=items: f'"{items[int(found[1])]}"'  # noqa: E731
                socket.send(re.sub(r'"item:(\d+)"', number, json.dumps(event)))
            if "num_samples" in event or event["type"] == "response.create":
                seen += talk.until("response.done")
        talk.send("conversation.item.delete", item_id="probe", event_id="probe")
        while seen[-1].get("error", {}).get("event_id") != "probe":
            seen.append(talk.receive())
    assert [event["error"]["message"] for event in seen[:-1] if event["type"] == "error"] == []
    answers = [event["transcript"] for event in seen if event["type"] == "response.output_audio_transcript.done"]
    assert answers
    assert set(answers) == {TEXT}
