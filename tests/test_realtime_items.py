"""Conversations over a WebSocket: responses, items, refusals, and how they end."""

import base64
from pathlib import Path
from typing import Any

import pytest

from duologue import rates
from duologue.interleave import Kind
from tests.live_server import (
    LiveServer,
    Talk,
    kept,
    question,
    scripted_bot,
    serving,
    silence,
    sound,
    talking,
)

# Half of an emoji, as a client sends it that cuts strings.


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("session.update", {"session": {"type": "realtime", "instructions": "a\ud83d"}}),
        ("session.update", {"session": {"type": "realtime", "prompt": {"id": "\ud83d"}}}),
        ("session.update", {"session": {"type": "realtime", "audio": {"output": {"voice": "\ud83d"}}}}),
        ("session.update", {"session": {"type": "realtime", "\ud83d": 1}}),
        ("conversation.item.retrieve", {"item_id": "\ud83d"}),
        ("conversation.item.delete", {"item_id": "\ud83d", "event_id": "\ud83d"}),
        ("response.create", {"response": {"metadata": {"\ud83d": "\ud83d"}}}),
        ("response.create", {"response": {"instructions": "\ud83d"}}),
        ("response.cancel", {"response_id": "\ud83d"}),
        ("\ud83d", {"event_id": "\ud83d"}),
    ],
)
def test_half_an_emoji_never_ends_a_session(talk: Talk, kind: str, fields: dict[str, Any]) -> None:
    item = talk.write("cut \ud83d here")
    assert item["content"][0]["text"] == "cut \ufffd here"
    talk.send(kind, **fields)
    talk.send("response.create", response={"conversation": "none", "max_output_tokens": 5, "metadata": {"last": "yes"}})
    while (talk.until("response.done")[-1]["response"]["metadata"] or {}).get("last") != "yes":
        pass


# Responses.


def test_one_response_at_a_time_and_others_out_of_band(server: LiveServer, talk: Talk) -> None:
    server.engine.hold(20)
    talk.write("Hello.")
    talk.send("response.create")
    first = talk.until("response.output_audio_transcript.delta")[0]["response"]
    talk.send("response.create")
    assert talk.until("error")[-1]["error"]["code"] == "conversation_already_has_active_response"
    server.engine.hold_after = None  # the first one has seen it and waits on; later ones run
    asked: dict[str, Any] = {"conversation": "none", "metadata": {"topic": "sums"}, "output_modalities": ["text"]}
    asked["input"] = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Sums?"}]}]
    talk.send("response.create", response=asked)
    events = talk.until("response.done")
    while events[-1]["response"]["id"] == first["id"]:
        events = talk.until("response.done")
    done = events[-1]["response"]
    assert done["conversation_id"] is None
    assert done["metadata"] == {"topic": "sums"}
    own = [event for event in events if event.get("response_id") == done["id"] or event["type"].startswith("conv")]
    assert not any(event["type"].startswith("conversation.item") and event["item"]["id"] == done["output"][0]["id"]
                   for event in own)  # fmt: skip


def test_input_replaces_the_conversation(server: LiveServer, talk: Talk) -> None:
    item = talk.write("The capital of France is Paris.")
    talk.write("Hello.")
    talk.send("response.create", response={"input": [{"type": "item_reference", "id": item["id"]}]})
    talk.until("response.done")
    text = server.vocabulary.render(server.engine.prompts[-1])
    assert "France" in text
    assert "Hello" not in text


def test_max_output_tokens_makes_a_response_incomplete(talk: Talk) -> None:
    talk.write("Hello.")
    talk.send("response.create", response={"max_output_tokens": 30})
    response = talk.until("response.done")[-1]["response"]
    assert response["status"] == "incomplete"
    assert response["status_details"]["reason"] == "max_output_tokens"
    assert response["usage"]["output_tokens"] == 30


def test_a_failing_model_fails_its_response_alone(server: LiveServer, talk: Talk) -> None:
    talk.write("Hello.")
    server.engine.failure = RuntimeError("the device is on fire")
    talk.send("response.create")
    response = talk.until("response.done")[-1]["response"]
    assert response["status"] == "failed"
    assert response["status_details"]["error"]["type"] == "server_error"
    assert "fire" not in str(response)
    server.engine.failure = None
    talk.send("response.create")
    assert talk.until("response.done")[-1]["response"]["status"] == "completed"


def test_a_too_long_question_fails_its_response(talk: Talk) -> None:
    talk.update_input(turn_detection=None)
    talk.append(silence(60.0), chunk=480_000)
    talk.send("input_audio_buffer.commit")
    talk.until("conversation.item.done")
    talk.send("response.create")
    response = talk.until("response.done")[-1]["response"]
    assert response["status"] == "failed"
    assert "too long" in response["status_details"]["error"]["message"]


def test_a_response_without_a_question(server: LiveServer, talk: Talk) -> None:
    talk.send("response.create")
    assert talk.until("response.done")[-1]["response"]["status"] == "completed"


# Items.


def test_items_are_made_found_and_deleted(talk: Talk) -> None:
    talk.write("Two.", id="two")
    message = {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "One."}], "id": "one"}
    added = talk.ask("conversation.item.create", "conversation.item.added", item=message, previous_item_id="root")
    assert added["previous_item_id"] is None
    talk.until("conversation.item.done")
    found = talk.ask("conversation.item.retrieve", "conversation.item.retrieved", item_id="two")["item"]
    assert found["content"][0]["text"] == "Two."
    twice = talk.ask("conversation.item.create", "error", item=message)["error"]
    assert twice["param"] == "item.id"
    nowhere = {**message, "id": "three"}
    lost = talk.ask("conversation.item.create", "error", item=nowhere, previous_item_id="gone")["error"]
    assert lost["param"] == "previous_item_id"
    assert talk.ask("conversation.item.delete", "conversation.item.deleted", item_id="one")["item_id"] == "one"
    for action in ("retrieve", "delete", "truncate"):
        fields = {"content_index": 0, "audio_end_ms": 0} if action == "truncate" else {}
        missing = talk.ask(f"conversation.item.{action}", "error", item_id="one", **fields)["error"]
        assert missing["code"] == f"item_{action}_invalid_item_id"


def test_retrieve_returns_audio(talk: Talk) -> None:
    talk.append(question())
    events = talk.until("response.done")
    asked, answered = events[2]["item_id"], events[-1]["response"]["output"][0]["id"]
    found = talk.ask("conversation.item.retrieve", "conversation.item.retrieved", item_id=asked)["item"]
    heard_ms = events[1]["audio_end_ms"] - events[0]["audio_start_ms"]
    assert len(base64.b64decode(found["content"][0]["audio"])) / 48 == pytest.approx(heard_ms, abs=2)
    found = talk.ask("conversation.item.retrieve", "conversation.item.retrieved", item_id=answered)["item"]
    assert len(base64.b64decode(found["content"][0]["audio"])) == pytest.approx(len(sound(events)), abs=100)


def test_audio_in_a_message(server: LiveServer, talk: Talk) -> None:
    part = {"type": "input_audio", "audio": base64.b64encode(question().tobytes()).decode(), "transcript": "a sum"}
    talk.send("conversation.item.create", item={"type": "message", "role": "user", "content": [part]})
    added = talk.until("conversation.item.done")[0]["item"]
    assert added["content"][0] == {"type": "input_audio", "transcript": "a sum"}
    talk.send("response.create")
    talk.until("response.done")
    heard = sum(server.vocabulary.kind(token) is Kind.SPEECH for token in server.engine.prompts[-1])
    assert heard == rates.tokens_for_samples(len(question()) * 2 // 3)


@pytest.mark.parametrize(
    ("content", "role", "param"),
    [
        ({"type": "input_text"}, "user", "item.content.0.text"),
        ({"type": "input_audio"}, "user", "item.content.0.audio"),
        ({"type": "input_audio", "audio": "!!!!"}, "user", "item.content.0.audio"),
        ({"type": "output_text", "text": "x"}, "user", "item.content.0.type"),
        ({"type": "input_text", "text": "x"}, "assistant", "item.content.0.type"),
        ({"type": "input_audio", "audio": "AAAA"}, "system", "item.content.0.type"),
        ({"type": "input_text", "text": "x" * 5000}, "user", "item.content.0.text"),
    ],
)
def test_a_bad_message_is_refused(talk: Talk, content: dict[str, Any], role: str, param: str) -> None:
    item = {"type": "message", "role": role, "content": [content]}
    assert talk.ask("conversation.item.create", "error", item=item)["error"]["param"] == param


def test_tool_calls_are_kept_but_not_prompted(server: LiveServer, talk: Talk) -> None:
    call = {"type": "function_call", "name": "sum", "arguments": "{}", "call_id": "call_1", "id": "call"}
    talk.send("conversation.item.create", item=call)
    assert talk.until("conversation.item.done")[-1]["item"]["name"] == "sum"
    found = talk.ask("conversation.item.retrieve", "conversation.item.retrieved", item_id="call")["item"]
    assert found["call_id"] == "call_1"


# What is refused, and what goes on.


def test_a_refused_update_changes_nothing(talk: Talk) -> None:
    talk.update(instructions="Be brief.")
    bad = {"type": "realtime", "instructions": "Be long.", "audio": {"output": {"voice": "nobody"}}}
    error = talk.ask("session.update", "error", session=bad, event_id="mine")["error"]
    assert (error["param"], error["event_id"]) == ("session.audio.output.voice", "mine")
    assert "default" in error["message"]  # the voice that there is
    session = talk.update(tracing="auto", model="gpt-realtime", audio={"output": {"voice": "marin"}})
    assert session["instructions"] == "Be brief."
    assert session["audio"]["output"]["voice"] == "marin"


def test_invalid_messages_do_not_end_the_session(talk: Talk) -> None:
    for message in (b"\x00\x01", "{", "[]", '{"type": "dance"}', '{"type": "input_audio_buffer.append", "audio": "$"}'):
        talk.socket.send(message)
        assert talk.receive()["type"] == "error"
    talk.write("Hello.")


def test_instructions_reach_a_model_trained_for_them(tiny_folder: Path) -> None:
    bot, engine = scripted_bot(tiny_folder)
    object.__setattr__(bot.models.card, "follows_instructions", True)
    with serving(bot, engine) as server, talking(server) as talk:
        talk.update(instructions="Be brief.")
        talk.write("Hello.")
        talk.send("response.create", response={"output_modalities": ["text"]})
        talk.until("response.done")
        talk.send("response.create", response={"output_modalities": ["text"], "instructions": "Be long."})
        talk.until("response.done")
        first, second = (server.vocabulary.render(prompt) for prompt in engine.prompts)
        assert "<|system|>Be brief.<|user|>Hello." in first
        assert "<|system|>Be long.<|user|>Hello." in second


def test_instructions_do_not_reach_other_models(server: LiveServer, talk: Talk) -> None:
    talk.update(instructions="Be brief.")
    talk.write("Hello.")
    talk.send("response.create")
    talk.until("response.done")
    assert "brief" not in server.vocabulary.render(server.engine.prompts[-1])


def test_without_a_recognizer_transcripts_fail(tiny_folder: Path) -> None:
    with serving(*scripted_bot(tiny_folder, recognizer=None)) as server, talking(server) as talk:
        talk.update_input(transcription={"model": "whisper-1"}, turn_detection=None)
        talk.append(question())
        talk.send("input_audio_buffer.commit")
        failed = talk.until("conversation.item.input_audio_transcription.failed")[-1]
        assert "no recognizer" in failed["error"]["message"]


def test_no_turn_is_longer_than_the_buffer(tiny_folder: Path) -> None:
    with serving(*scripted_bot(tiny_folder), audio_buffer_s=1.0) as server, talking(server) as talk:
        talk.update_input(turn_detection=None)
        talk.append(silence(1.5), chunk=24_000)  # the last third is too much
        assert talk.receive()["error"]["code"] == "input_audio_buffer_full"
        talk.ask("input_audio_buffer.commit", "input_audio_buffer.committed")


def test_the_oldest_items_are_dropped(tiny_folder: Path) -> None:
    with serving(*scripted_bot(tiny_folder), max_items=2) as server, talking(server) as talk:
        for name in ("a", "b"):
            talk.write("Hello.", id=name)
        message = {"type": "message", "role": "user", "id": "c", "content": [{"type": "input_text", "text": "x"}]}
        assert talk.ask("conversation.item.create", "conversation.item.deleted", item=message)["item_id"] == "a"


# The end.


def test_a_dropped_client_resumes(server: LiveServer) -> None:
    with talking(server) as talk:
        talk.write("Hello.", id="hello")
        talk.update(instructions="Be brief.")
    kept(server, talk.session["id"])
    with talking(server, f"model=tiny&session_id={talk.session['id']}") as again:
        assert again.session["id"] == talk.session["id"]
        assert again.session["instructions"] == "Be brief."
        assert again.until("conversation.item.done")[-1]["item"]["id"] == "hello"


def test_a_disconnect_truncates_the_reply(server: LiveServer) -> None:
    server.engine.hold(35)
    with talking(server) as talk:
        talk.write("Hello.")
        talk.send("response.create")
        talk.until("response.output_audio.delta")
    item = kept(server, talk.session["id"]).items.order[-1]
    server.engine.release()
    assert item.body.status == "incomplete"
    assert item.turn is None or item.turn.interrupted


def test_idle_clients_are_closed_with_a_reason(tiny_folder: Path) -> None:
    with serving(*scripted_bot(tiny_folder), idle_s=0.2) as server, talking(server) as talk:
        with pytest.raises(Exception, match="sent nothing"):
            talk.receive()
        assert talk.socket.close_code == 1000


def test_a_stopping_server_finishes_the_answer(tiny_folder: Path) -> None:
    bot, engine = scripted_bot(tiny_folder)
    with serving(bot, engine) as server, talking(server) as talk, talking(server) as idle:
        engine.hold(20)
        talk.write("Hello.")
        talk.send("response.create")
        talk.until("response.output_audio_transcript.delta")
        server.loop.call_soon_threadsafe(server.server.drain)
        with pytest.raises(Exception, match="stopping"):
            idle.receive()
        assert idle.socket.close_code == 1012
        talk.send("response.create", response={"conversation": "none"})
        assert talk.until("error")[-1]["error"]["code"] == "server_stopping"
        engine.release()
        assert talk.until("response.done")[-1]["response"]["status"] == "completed"
        with pytest.raises(Exception, match="stopping"):
            talk.receive()
        assert talk.socket.close_code == 1012
