"""A benchmark through a server of the real-time protocol, and texts through its speech route."""

from pathlib import Path

import pytest

from duologue.evaluation.asking import ServerAsker, speech_url
from duologue.evaluation.benchmarks.table import BENCHMARKS
from duologue.evaluation.runner import ask_all
from tests.benchmark_data import judge_server, write_openaudiobench, write_seed_tts, write_sound, write_urobench
from tests.live_server import TEXT, LiveServer


def test_questions_and_dialogues_through_a_server(server: "LiveServer", tmp_path: Path) -> None:
    asker = ServerAsker(server.url, "tiny")
    items = BENCHMARKS["spoken-qa"].load(write_openaudiobench(tmp_path / "qa"))
    items += [item for item in BENCHMARKS["urobench"].load(write_urobench(tmp_path / "uro")) if len(item.questions) > 1]
    answers = ask_all(items, asker, tmp_path, {}, num_at_once=3)
    assert {answer.error for answer in answers.values()} == {""}
    assert {turn.text for answer in answers.values() for turn in answer.turns} == {TEXT}
    dialogue = answers[items[-1].id]
    assert len(dialogue.turns) == 2
    for turn in dialogue.turns:
        assert (tmp_path / turn.sound).is_file()
        assert turn.first_audio_s is not None
        assert 0 < turn.first_audio_s <= turn.total_s
        assert turn.audio_s > 0.5


def test_texts_through_the_speech_route(tmp_path: Path) -> None:
    items = BENCHMARKS["seed-tts-eval"].load(write_seed_tts(tmp_path / "data"))
    sound = write_sound(tmp_path / "said.wav").read_bytes()
    with judge_server(lambda text: sound if "Hello" in text else 400) as (url, requests):
        answers = ask_all(items, ServerAsker(url, "tiny", "secret"), tmp_path, {}, num_at_once=1)
    assert [answer.error == "" for answer in answers.values()] == [True, True, False, False]
    assert answers["en/utt-en"].turns[0].audio_s == 0.5
    assert (requests[0]["path"], requests[0]["key"]) == ("/v1/audio/speech", "Bearer secret")
    assert (requests[0]["input"], requests[0]["response_format"]) == ("Hello there.", "wav")


def test_no_server_is_one_sentence(tmp_path: Path) -> None:
    items = BENCHMARKS["seed-tts-eval"].load(write_seed_tts(tmp_path / "data"))
    with pytest.raises(ValueError, match="the first 4 questions failed: http://127.0.0.1:9/v1/audio/speech"):
        ask_all(items, ServerAsker("127.0.0.1:9", "tiny"), tmp_path, {})
    questions = BENCHMARKS["spoken-qa"].load(write_openaudiobench(tmp_path / "qa"))
    with pytest.raises(ValueError, match="the first 5 questions failed: there is no real-time server"):
        ask_all(questions, ServerAsker("127.0.0.1:9", "tiny"), tmp_path, {})


@pytest.mark.parametrize(
    ("url", "speech"),
    [
        ("ws://host:8000/v1/realtime?model=x", "http://host:8000/v1/audio/speech"),
        ("wss://host/api/v1/realtime?model=x", "https://host/api/v1/audio/speech"),
    ],
)
def test_speech_url(url: str, speech: str) -> None:
    assert speech_url(url) == speech
