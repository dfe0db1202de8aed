"""Real-time sessions of OpenAI's clients: tools, large and short audio, clients that fall silent."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from duologue.serving.settings import Settings
from tests.live_server import LiveServer, Talk, question, scripted_bot, serving, silence, talking, types

TOOL = {"type": "function", "name": "get_weather", "description": "x", "parameters": {}}


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[LiveServer]:
    with serving(*scripted_bot(tiny_folder), stalled_turn_s=0.5) as running:
        yield running


@pytest.fixture
def talk(server: LiveServer) -> Iterator[Talk]:
    server.engine.release()
    with talking(server) as it:
        yield it


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL]}, "response.tools"),
        ({"tool_choice": "required"}, "response.tool_choice"),
        ({"tool_choice": {"type": "function", "name": "get_weather"}}, "response.tool_choice"),
    ],
)
def test_a_response_with_tools_is_refused(talk: Talk, fields: dict[str, Any], param: str) -> None:
    talk.write("Hello")
    error = talk.ask("response.create", "error", response=fields, event_id="mine")["error"]
    assert (error["param"], error["event_id"]) == (param, "mine")
    talk.send("response.create", response={"tools": [], "tool_choice": "auto"})
    assert talk.until("response.done")[-1]["response"]["status"] == "completed"


def test_a_session_with_tools_is_refused_by_their_names(talk: Talk) -> None:
    session = {"type": "realtime", "instructions": "x", "tools": [TOOL]}
    error = talk.ask("session.update", "error", session=session)["error"]
    assert error["param"] == "session.tools"
    assert "get_weather" in error["message"]
    assert talk.update(tools=[], tool_choice="none")["instructions"] == ""


def test_the_result_of_an_unknown_call_is_refused(talk: Talk) -> None:
    result = {"type": "function_call_output", "call_id": "call_1", "output": "7"}
    error = talk.ask("conversation.item.create", "error", item=result)["error"]
    assert (error["code"], error["param"]) == ("item_create_invalid_call_id", "item.call_id")
    call = {"type": "function_call", "name": "sum", "arguments": "{}", "call_id": "call_1"}
    for item in (call, result):
        talk.send("conversation.item.create", item=item)
        assert talk.until("conversation.item.done")[-1]["item"]["call_id"] == "call_1"


def test_an_event_may_begin_with_a_byte_order_mark(talk: Talk) -> None:
    talk.socket.send("\ufeff" + json.dumps({"type": "session.update", "session": {"type": "realtime"}}))
    assert talk.receive()["type"] == "session.updated"


# Limits that fit each other.


def test_the_default_message_holds_a_turn_and_what_openai_allows() -> None:
    settings = Settings()
    base64_of_a_turn = settings.audio_buffer_s * 24_000 * 2 * 4 / 3
    assert settings.max_message_bytes > max(base64_of_a_turn, 15 * 2**20) + 1000


def test_100_s_in_one_event_are_taken(talk: Talk) -> None:
    talk.update_input(turn_detection=None)
    audio = base64.b64encode(silence(100).tobytes()).decode()
    talk.send("input_audio_buffer.append", audio=audio)
    assert talk.update(instructions="x")["instructions"] == "x"
    error = talk.ask("input_audio_buffer.append", "error", audio=audio)["error"]  # 200 s in one turn
    assert error["code"] == "input_audio_buffer_full"


@pytest.mark.parametrize("detection", [None, {"type": "server_vad"}], ids=["manual", "detected"])
def test_a_refused_short_commit_keeps_its_audio(talk: Talk, detection: dict[str, Any] | None) -> None:
    talk.update_input(turn_detection=detection)
    talk.append(silence(0.05))
    error = talk.ask("input_audio_buffer.commit", "error")["error"]
    assert error["code"] == "input_audio_buffer_commit_empty"
    assert "50 ms" in error["message"]
    talk.append(silence(0.075))
    talk.send("input_audio_buffer.commit")
    item = talk.until("conversation.item.done")[-1]["item"]
    talk.send("conversation.item.retrieve", item_id=item["id"])
    audio = talk.until("conversation.item.retrieved")[-1]["item"]["content"][0]["audio"]
    assert len(base64.b64decode(audio)) / 48 == pytest.approx(125, abs=1)


def test_a_commit_of_exactly_100_ms_is_taken(talk: Talk) -> None:
    talk.update_input(turn_detection=None)
    talk.append(silence(0.1))
    talk.ask("input_audio_buffer.commit", "input_audio_buffer.committed")


# A client that falls silent.


def test_a_turn_ends_when_its_client_sends_no_more_audio(talk: Talk) -> None:
    talk.append(question(after_s=0.0))
    events = talk.until("response.done")
    assert types(events)[:3] == [
        "input_audio_buffer.speech_started",
        "input_audio_buffer.speech_stopped",
        "input_audio_buffer.committed",
    ]
    assert events[1]["audio_end_ms"] == pytest.approx(len(question(after_s=0.0)) / 24, abs=32 + 41)  # window, resampler
    assert events[-1]["response"]["status"] == "completed"


def test_other_events_do_not_keep_a_stalled_turn_open(talk: Talk) -> None:
    talk.append(question(after_s=0.0))
    talk.until("input_audio_buffer.speech_started")
    seen = []
    while "input_audio_buffer.speech_stopped" not in seen:
        talk.send("session.update", session={"type": "realtime"})
        seen.append(talk.receive()["type"])
        assert len(seen) < 100_000
