"""`playback.ack`: the history keeps what was played, not an estimate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from duologue import rates
from duologue.conversation.block_policy import PlaybackClock
from tests.live_server import LiveServer, Talk, kept, question, scripted_bot, serving, silence, talking

PROMISE = {"include": ["duologue.playback"]}


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[LiveServer]:
    with serving(*scripted_bot(tiny_folder)) as running:
        yield running


@pytest.fixture
def talk(server: LiveServer) -> Iterator[Talk]:
    server.engine.release()
    with talking(server) as it:
        yield it


def answer(talk: Talk) -> str:
    """The id of a spoken answer that is done on the server and plays on the client."""
    talk.write("Hello.")
    talk.send("response.create")
    item_id: str = talk.until("response.done")[-1]["response"]["output"][0]["id"]
    return item_id


def test_the_clock_follows_reports() -> None:
    clock = PlaybackClock()
    clock.sent(2.0, now=10.0)
    assert clock.played_s(11.0) == 1.0
    clock.ack(0.5)
    assert clock.played_s(11.0) == clock.played_s(100.0) == 0.5
    clock.ack(0.4)  # overtaken on the way
    assert clock.played_s(100.0) == 0.5
    assert not clock.is_over(100.0)
    clock.ack(1.96)
    assert clock.is_over(11.0)
    clock.ack(7.0)
    assert clock.played_s(11.0) == 2.0
    clock.stop(1.0)
    clock.ack(1.5)  # late
    assert clock.played_s(100.0) == 1.0
    assert clock.is_over(11.0)


def test_an_interruption_cuts_at_the_reported_position(server: LiveServer, talk: Talk) -> None:
    talk.update(**PROMISE)
    item_id = answer(talk)
    talk.send("playback.ack", item_id=item_id, played_ms=700)
    talk.send("playback.ack", item_id=item_id, played_ms=640)
    talk.append(question(before_s=0.0, after_s=0.0))
    truncated = talk.until("conversation.item.truncated")[-1]
    assert (truncated["item_id"], truncated["audio_end_ms"]) == (item_id, 700)
    talk.append(silence(1.0))
    talk.until("response.done")
    spoken = server.vocabulary.speech_ids(range(rates.tokens_heard(int(700 * 22.05))))
    prompt = server.engine.prompts[-1]
    assert any(prompt[at : at + 3] == spoken[:3] for at in range(len(prompt)))
    assert server.vocabulary.speech_ids([len(spoken)])[0] not in prompt


def test_an_answer_that_was_never_played_was_not_heard(talk: Talk) -> None:
    talk.update(**PROMISE)
    item_id = answer(talk)
    talk.append(question(before_s=0.0, after_s=0.0))
    truncated = talk.until("conversation.item.truncated")[-1]
    assert (truncated["item_id"], truncated["audio_end_ms"]) == (item_id, 0)


def test_an_answer_that_was_played_to_its_end_is_not_cut(talk: Talk) -> None:
    item_id = answer(talk)  # without a promise, the first report counts
    talk.send("conversation.item.retrieve", item_id=item_id)
    talk.until("conversation.item.retrieved")
    talk.send("playback.ack", item_id=item_id, played_ms=60_000)
    talk.append(question(before_s=0.0))
    kinds = [event["type"] for event in talk.until("response.created")]
    assert "input_audio_buffer.speech_started" in kinds
    assert "conversation.item.truncated" not in kinds


def test_a_lost_client_keeps_what_it_reported(server: LiveServer) -> None:
    server.engine.hold(35)
    with talking(server) as talk:
        talk.update(**PROMISE)
        talk.write("Hello.")
        talk.send("response.create")
        item_id = talk.until("response.output_audio.delta")[-1]["item_id"]
        talk.send("playback.ack", item_id=item_id, played_ms=320)
        talk.send("session.update", session={"type": "realtime"})
        talk.until("session.updated")  # the report has been handled
    item = kept(server, talk.session["id"]).items.order[-1]
    server.engine.release()
    assert item.heard_ms == 320


def test_a_report_on_an_unknown_item_changes_nothing(talk: Talk) -> None:
    talk.send("playback.ack", item_id="deleted", played_ms=10)
    talk.update(instructions="x")  # its answer is the next event
