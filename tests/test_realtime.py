"""Conversations over a WebSocket: order of events, turns, interruption."""

import gc
import itertools
import time

import numpy as np
import pytest

from duologue import rates
from duologue.audio import resample
from duologue.conversation.block_policy import PlaybackClock
from duologue.conversation.ear import TurnTokenizer
from duologue.interleave import INTERLEAVED, Kind
from duologue.serving.formats import pack
from duologue.serving.objects import Pcma, Pcmu
from duologue.serving.realtime_session import RealtimeSession
from tests.live_server import (
    NUM_SPEECH,
    TEXT,
    TIMEOUT_S,
    LiveServer,
    Talk,
    kept,
    question,
    silence,
    sound,
    talking,
    types,
)

BEGIN = [
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
]
DELTAS = ["response.output_audio_transcript.delta", "response.output_audio.delta"]
END = [
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "conversation.item.done",
    "response.output_item.done",
    "response.done",
]
WRITTEN = [name.replace("audio_transcript", "text") for name in [*BEGIN, DELTAS[0], *END[1:]]]


# A whole exchange.


def test_order_of_events(server: LiveServer, talk: Talk) -> None:
    talk.append(question())
    events = talk.until("response.done")
    assert types(events) == [
        "input_audio_buffer.speech_started",
        "input_audio_buffer.speech_stopped",
        "input_audio_buffer.committed",
        "conversation.item.added",
        "conversation.item.done",
        *BEGIN,
        *DELTAS,
        *END,
    ]
    ids = [event["event_id"] for event in events]
    assert len(set(ids)) == len(ids)
    by_type = {event["type"]: event for event in events}
    started, stopped, committed = events[:3]
    assert started["audio_start_ms"] == pytest.approx(500 - 300 + 100, abs=200)
    spoken_ms = len(question(0, 0)) / 24
    assert stopped["audio_end_ms"] == pytest.approx(500 + spoken_ms + 500, abs=250)
    assert started["item_id"] == stopped["item_id"] == committed["item_id"] == events[3]["item"]["id"]
    assert events[3]["item"]["content"][0]["type"] == "input_audio"
    response = by_type["response.done"]["response"]
    item = response["output"][0]
    assert response["status"] == "completed"
    assert response["conversation_id"].startswith("conv_")
    assert item["status"] == "completed"
    assert by_type["conversation.item.done"]["previous_item_id"] == committed["item_id"]
    assert item["content"][0] == {"type": "output_audio", "transcript": TEXT}
    assert by_type["response.output_audio_transcript.done"]["transcript"] == TEXT
    transcript = [event["delta"] for event in events if event["type"] == DELTAS[0]]
    assert "".join(transcript) == TEXT
    num_samples = rates.speak_samples_for_tokens(NUM_SPEECH) * 24_000 / rates.SPEAK_SAMPLE_RATE
    assert len(sound(events)) / 2 == pytest.approx(num_samples, abs=24_000 * 0.02)


def test_usage_counts_the_ids(server: LiveServer, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine, "num_prefilled", 9)
    talk.append(question())
    usage = talk.until("response.done")[-1]["response"]["usage"]
    prompt = server.engine.prompts[-1]
    heard = sum(server.vocabulary.kind(token) is Kind.SPEECH for token in prompt)
    said = server.engine.reply(INTERLEAVED)
    assert usage["input_tokens"] == len(prompt)
    assert usage["input_token_details"]["audio_tokens"] == heard > 10
    assert usage["input_token_details"]["cached_tokens"] == 9
    assert usage["output_tokens"] == len(said)
    assert usage["output_token_details"] == {"audio_tokens": NUM_SPEECH, "text_tokens": len(said) - NUM_SPEECH}
    assert usage["total_tokens"] == len(prompt) + len(said)


def test_text_question_and_text_answer(server: LiveServer, talk: Talk) -> None:
    talk.write("What is seven plus five?")
    talk.send("response.create", response={"output_modalities": ["text"]})
    events = talk.until("response.done")
    assert types(events) == WRITTEN
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == TEXT
    assert events[3]["part"]["type"] == "text"


def test_the_next_prompt_extends_the_last(server: LiveServer, talk: Talk) -> None:
    talk.write("Hello.")
    talk.send("response.create")
    talk.until("response.done")
    talk.write("And now?")
    talk.send("response.create")
    talk.until("response.done")
    first, second = server.engine.prompts[-2:]
    assert second[: len(first)] == first
    assert second[len(first) :][: len(server.engine.reply(INTERLEAVED))] == server.engine.reply(INTERLEAVED)


# Turns.


def test_manual_turns(server: LiveServer, talk: Talk) -> None:
    talk.update_input(turn_detection=None)
    talk.append(question())
    talk.send("input_audio_buffer.commit")
    events = talk.until("conversation.item.done")
    assert types(events) == ["input_audio_buffer.committed", "conversation.item.added", "conversation.item.done"]
    talk.send("response.create")
    assert types(talk.until("response.done")) == [*BEGIN, *DELTAS, *END]
    heard = sum(server.vocabulary.kind(token) is Kind.SPEECH for token in server.engine.prompts[-1])
    assert heard == rates.tokens_for_samples(len(question()) * 2 // 3)


def test_commit_needs_audio(talk: Talk) -> None:
    talk.update_input(turn_detection=None)
    empty = talk.ask("input_audio_buffer.commit", "error", event_id="mine")["error"]
    assert (empty["code"], empty["event_id"]) == ("input_audio_buffer_commit_empty", "mine")
    talk.append(question())
    talk.ask("input_audio_buffer.clear", "input_audio_buffer.cleared")
    talk.ask("input_audio_buffer.commit", "error")


def test_a_client_may_commit_undetected_audio(server: LiveServer, talk: Talk) -> None:
    talk.append(silence(0.5))
    talk.ask("input_audio_buffer.commit", "input_audio_buffer.committed")


def test_without_create_response_there_is_no_answer(talk: Talk) -> None:
    talk.update_input(turn_detection={"type": "server_vad", "create_response": False})
    talk.append(question())
    talk.until("conversation.item.done")
    talk.update(instructions="x")  # its answer is the next event


def test_a_pause_ends_the_turn_by_silence_duration(talk: Talk) -> None:
    vad = {"type": "server_vad", "silence_duration_ms": 1500, "create_response": False, "prefix_padding_ms": 0}
    talk.update_input(turn_detection=vad)
    talk.append(question(after_s=2.0))
    started, stopped = talk.until("input_audio_buffer.speech_stopped")
    spoken_ms = len(question(0, 0)) / 24
    assert started["audio_start_ms"] == pytest.approx(600, abs=150)
    assert stopped["audio_end_ms"] == pytest.approx(500 + spoken_ms + 1500, abs=250)


def test_milliseconds_count_from_the_first_sound(talk: Talk) -> None:
    vad = {"type": "server_vad", "create_response": False}
    talk.update_input(turn_detection=vad)
    talk.append(question())
    first = talk.until("conversation.item.done")
    talk.append(question())
    second = talk.until("conversation.item.done")
    assert second[0]["audio_start_ms"] - first[0]["audio_start_ms"] == pytest.approx(len(question()) / 24, abs=64)
    assert second[0]["item_id"] != first[0]["item_id"]


def test_semantic_vad(talk: Talk) -> None:
    talk.update_input(turn_detection={"type": "semantic_vad", "eagerness": "high"})
    talk.append(question())
    assert types(talk.until("response.done"))[-1] == "response.done"


def test_silence_after_a_reply_times_out(talk: Talk) -> None:
    talk.update(
        output_modalities=["text"],
        audio={"input": {"turn_detection": {"type": "server_vad", "idle_timeout_ms": 1000}}},
    )
    talk.append(question())
    talk.until("response.done")
    talk.append(silence(1.5))
    events = talk.until("response.done")
    assert types(events)[:2] == ["input_audio_buffer.timeout_triggered", "input_audio_buffer.committed"]
    assert events[0]["audio_end_ms"] - events[0]["audio_start_ms"] == pytest.approx(1000, abs=40)


@pytest.mark.parametrize("kind", ["audio/pcmu", "audio/pcma"])
def test_g711_audio(talk: Talk, kind: str) -> None:
    talk.update(audio={"input": {"format": {"type": kind}}, "output": {"format": {"type": kind}}})
    wire = Pcmu(type="audio/pcmu") if kind == "audio/pcmu" else Pcma(type="audio/pcma")
    talk.append(pack(resample((question() / 32768).astype(np.float32), 24_000, 8000), wire))
    events = talk.until("response.done")
    assert events[0]["type"] == "input_audio_buffer.speech_started"
    num_samples = rates.speak_samples_for_tokens(NUM_SPEECH) * 8000 / rates.SPEAK_SAMPLE_RATE
    assert len(sound(events)) == pytest.approx(num_samples, abs=8000 * 0.02)


def test_fast_speech_is_shorter(talk: Talk) -> None:
    talk.update(audio={"output": {"speed": 1.5}})
    talk.write("Hello.")
    talk.send("response.create")
    num_samples = rates.speak_samples_for_tokens(NUM_SPEECH) * 24_000 / rates.SPEAK_SAMPLE_RATE / 1.5
    assert len(sound(talk.until("response.done"))) / 2 == pytest.approx(num_samples, abs=24_000 * 0.02)


def test_transcripts_of_the_user(talk: Talk) -> None:
    talk.update_input(transcription={"model": "whisper-1"}, turn_detection=None)
    talk.append(question())
    talk.send("input_audio_buffer.commit")
    item_id = talk.until("conversation.item.done")[-1]["item"]["id"]
    event = talk.until("conversation.item.input_audio_transcription.completed")[-1]
    assert event["item_id"] == item_id
    assert event["usage"] == {"type": "duration", "seconds": pytest.approx(len(question()) / 24_000, abs=0.01)}
    item = talk.ask("conversation.item.retrieve", "conversation.item.retrieved", item_id=item_id)["item"]
    assert item["content"][0]["transcript"] == event["transcript"]
    assert "logprobs" not in event
    talk.update(include=["item.input_audio_transcription.logprobs"])
    talk.append(question())
    talk.send("input_audio_buffer.commit")
    event = talk.until("conversation.item.input_audio_transcription.completed")[-1]
    tokens = [one["token"] for one in event["logprobs"]]
    assert " ".join("".join(tokens).split()) == event["transcript"]
    assert all(one["logprob"] <= 0 and bytes(one["bytes"]).decode() == one["token"] for one in event["logprobs"])


def test_duologue_events_on_request(talk: Talk) -> None:
    talk.update(include=["duologue.tokens", "duologue.timings"])
    talk.write("Hello.")
    talk.send("response.create")
    events = talk.until("response.done")
    runs = [event for event in events if event["type"] == "duologue.tokens"]
    kinds = [kind for kind, _ in itertools.groupby(runs, lambda run: run["kind"])]
    assert kinds[:2] == ["text", "speech"]
    assert sum(run["count"] for run in runs if run["kind"] == "speech") == NUM_SPEECH
    timings = next(event for event in events if event["type"] == "duologue.timings")
    assert 0 < timings["first_text_ms"] < timings["first_audio_ms"] <= timings["total_ms"]
    assert timings["audio_ms"] == pytest.approx(len(sound(events)) / 48, abs=20)


# Interruption.


def test_barge_in_ends_the_reply_and_truncates_the_history(server: LiveServer, talk: Talk) -> None:
    server.engine.hold(35)
    talk.write("Hello.")
    talk.send("response.create")
    talk.until("response.output_audio.delta")
    talk.append(question(before_s=0.0))
    before = talk.until("input_audio_buffer.speech_started")
    events = talk.until("conversation.item.truncated")  # while the model still holds its breath
    assert types(events) == [*END, "conversation.item.truncated"]
    response = events[-2]["response"]
    assert response["status"] == "cancelled"
    assert response["status_details"] == {"type": "cancelled", "reason": "turn_detected", "error": None}
    assert response["output"][0]["status"] == "incomplete"
    assert 0 <= events[-1]["audio_end_ms"] <= len(sound(before)) / 48 + 500
    server.engine.release()
    talk.until("response.done")
    # The next prompt holds of the reply what was heard of it.
    heard = rates.tokens_heard(int(events[-1]["audio_end_ms"] * 22.05))
    speech = [token for token in server.engine.prompts[-1] if server.vocabulary.kind(token) is Kind.SPEECH]
    spoken = server.vocabulary.speech_ids(range(heard))
    assert speech[: len(spoken)] == spoken
    talk.socket.close()
    item = kept(server, talk.session["id"]).items.order[1]
    assert item.body.id == response["output"][0]["id"]
    assert item.turn is None or item.turn.interrupted


def test_barge_in_truncates_a_finished_reply_that_still_plays(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """One second of the reply has been played when the user speaks, however long the machine took."""
    monkeypatch.setattr(PlaybackClock, "played_s", lambda clock, now: min(1.0, clock.sent_s))
    monkeypatch.setattr(PlaybackClock, "is_over", lambda clock, now: clock.sent_s <= 1.0)
    talk.write("Hello.")
    talk.send("response.create")
    item_id = talk.until("response.done")[-1]["response"]["output"][0]["id"]
    talk.append(question(before_s=0.0, after_s=0.0))
    started, truncated = talk.until("conversation.item.truncated")
    assert started["type"] == "input_audio_buffer.speech_started"
    assert truncated["item_id"] == item_id
    assert truncated["audio_end_ms"] == 1000 < NUM_SPEECH * 80


def test_without_interrupt_response_a_reply_goes_on(server: LiveServer, talk: Talk) -> None:
    vad = {"type": "server_vad", "interrupt_response": False, "create_response": False}
    talk.update_input(turn_detection=vad)
    server.engine.hold(35)
    talk.write("Hello.")
    talk.send("response.create")
    talk.until("response.output_audio.delta")
    talk.append(question(before_s=0.0))
    talk.until("input_audio_buffer.committed")
    server.engine.release()
    assert talk.until("response.done")[-1]["response"]["status"] == "completed"


def test_cancelled_before_the_first_sound(server: LiveServer, talk: Talk) -> None:
    server.engine.hold(3)
    talk.write("Hello.")
    talk.send("response.create")
    talk.until("response.output_audio_transcript.delta")
    talk.send("response.cancel")
    response = talk.until("response.done")[-1]["response"]
    assert response["status_details"]["reason"] == "client_cancelled"
    assert talk.until("conversation.item.truncated")[-1]["audio_end_ms"] == 0
    refused = talk.ask("response.cancel", "error")["error"]
    assert refused["code"] == "response_cancel_not_active"
    server.engine.release()
    talk.send("response.create")
    assert talk.until("response.done")[-1]["response"]["status"] == "completed"


def test_cancelled_before_the_first_token(server: LiveServer, talk: Talk) -> None:
    server.engine.hold(0)
    talk.write("Hello.")
    talk.send("response.create")
    created = talk.until("response.created")[-1]["response"]
    talk.send("response.cancel", response_id=created["id"])
    done = talk.receive()
    assert done["type"] == "response.done"
    assert done["response"]["status"] == "cancelled"
    assert done["response"]["output"] == []


def test_two_barge_ins_in_a_row(server: LiveServer, talk: Talk) -> None:
    server.engine.hold(35)
    talk.append(question())
    talk.until("response.output_audio.delta")
    for _ in range(2):
        talk.append(question())
        done = talk.until("response.done")[-1]["response"]
        assert done["status"] == "cancelled"
        talk.until("response.output_audio.delta")
    server.engine.release()
    assert talk.until("response.done")[-1]["response"]["status"] == "completed"


def test_the_clients_truncation_overrides_the_servers(server: LiveServer, talk: Talk) -> None:
    talk.write("Hello.")
    talk.send("response.create")
    item_id = talk.until("response.done")[-1]["response"]["output"][0]["id"]
    place = {"item_id": item_id, "content_index": 0}
    for asked_ms, kept_tokens in ((1000, 12), (1600, 20), (90_000, NUM_SPEECH)):
        event = talk.ask("conversation.item.truncate", "conversation.item.truncated", **place, audio_end_ms=asked_ms)
        assert event["audio_end_ms"] == min(asked_ms, event["audio_end_ms"])
        talk.write("Go on.", id=f"go_{asked_ms}")
        talk.send("response.create", response={"conversation": "none", "output_modalities": ["text"]})
        talk.until("response.done")
        spoken = [token for token in server.engine.prompts[-1] if server.vocabulary.kind(token) is Kind.SPEECH]
        assert len(spoken) == pytest.approx(kept_tokens, abs=1)


# What remains.


def test_a_conversation_is_freed_without_the_garbage_collector(server: LiveServer) -> None:
    """A garbage collection would pause every conversation."""
    gc.collect()
    gc.disable()
    try:
        with talking(server) as talk:
            talk.write("Hello.")
            talk.send("response.create")
            talk.until("response.done")
            talk.update_input(turn_detection=None)
            talk.append(question()[:24_000])
            talk.ask("conversation.item.retrieve", "error", item_id="nothing")  # all of it was heard
        deadline = time.monotonic() + TIMEOUT_S
        while num_left := sum(type(each) in (RealtimeSession, TurnTokenizer) for each in gc.get_objects()):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
    finally:
        gc.enable()
    assert not num_left
