"""The recipe of a second language: its questions, and that its recordings become a corpus."""

import json
from pathlib import Path

import pytest

from duologue.scoring import is_correct
from recipes.mandarin.questions import number, questions
from recipes.pocket.synthesis import find_voice


def test_numbers_as_they_are_spoken() -> None:
    assert [number(value) for value in (0, 7, 10, 13, 20, 98)] == ["零", "七", "十", "十三", "二十", "九十八"]


def test_every_reply_holds_its_answer_and_the_test_is_new() -> None:
    train, test = questions(test=False), questions(test=True)
    assert len(train) >= 30
    assert set(test) < set(train)
    for question in (one for kinds in (train, test) for found in kinds.values() for one in found):
        assert is_correct(question.reply, [question.answer], "zh"), question
    known = {one.text for found in train.values() for one in found}
    assert not known & {one.text for found in test.values() for one in found}


def test_any_voice_of_espeak_is_a_voice() -> None:
    assert find_voice("espeak-cmn-latn-pinyin+f2").name == "cmn-latn-pinyin+f2"
    assert find_voice("flite-slt").name == "slt"
    with pytest.raises(ValueError, match="unknown voice"):
        find_voice("flite-nobody")


def test_recordings_become_a_corpus(tmp_path: Path) -> None:
    recordings = pytest.importorskip("recipes.mandarin.recordings", reason="pypinyin is in the extra voices")
    from duologue.cli import main

    assert recordings._pinyin("你好。").split()[:2] == ["ni3", "hao3"]
    try:
        recordings.write_source(tmp_path, 6, 2, seed=0, workers=1)
    except (RuntimeError, FileNotFoundError) as error:
        pytest.skip(f"no espeak-ng: {error}")
    test = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert [sorted(line) for line in test] == [["answer", "kind", "new", "text", "voice", "wav"]] * 3
    assert [line["new"] for line in test] == [True, True, False]
    source = ["data", "import", "llama-omni", str(tmp_path / "train.json")]
    assert main([*source, "-o", str(tmp_path / "corpus"), "--language", "zh", "--transcripts", "--valid", "0"]) == 0
    [table] = (tmp_path / "corpus").glob("dialogues-*.jsonl")
    assert len(table.read_text().splitlines()) == 6
    assert len(list((tmp_path / "replies").glob("*.txt"))) == len(list((tmp_path / "replies").glob("*.wav")))
