"""Each loader on a small set in the benchmark's own layout, and the results in the benchmark's own layout."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile

from duologue.evaluation.asking import load_question
from duologue.evaluation.benchmarks.items import Benchmark, BenchmarkItem, GivenAnswer, GivenTurn, Scoring
from duologue.evaluation.benchmarks.openaudiobench import answers_of
from duologue.evaluation.benchmarks.table import BENCHMARKS
from tests.benchmark_data import (
    write_big_bench_audio,
    write_openaudiobench,
    write_seed_tts,
    write_sound,
    write_urobench,
    write_voicebench,
)

WRITERS: dict[str, Callable[[Path], Path]] = {
    "voicebench": write_voicebench,
    "openaudiobench": write_openaudiobench,
    "spoken-qa": write_openaudiobench,
    "urobench": write_urobench,
    "big-bench-audio": write_big_bench_audio,
    "seed-tts-eval": write_seed_tts,
}


def load(name: str, folder: Path) -> tuple[Benchmark, list[BenchmarkItem]]:
    return BENCHMARKS[name], BENCHMARKS[name].load(WRITERS[name](folder))


def write_results(benchmark: Benchmark, items: list[BenchmarkItem], folder: Path) -> Path:
    """One answer to each item, in the benchmark's layout."""
    assert benchmark.write is not None
    own = folder / "own"
    own.mkdir()
    write_sound(folder / "sounds" / "a.wav")
    given = [
        (item, GivenAnswer(item.id, item.subset, (GivenTurn("said", "sounds/a.wav"),) * len(item.questions)))
        for item in items
    ]
    benchmark.write(own, folder, "model", given)
    return own


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_ids_are_unique_and_sounds_can_be_read(name: str, tmp_path: Path) -> None:
    assert set(WRITERS) == set(BENCHMARKS)
    _, items = load(name, tmp_path)
    assert len({item.id for item in items}) == len(items) > 3
    for item in items:
        for question in item.questions:
            if question.sound is None:
                assert name == "seed-tts-eval"
            else:
                wav, rate = load_question(question)
                assert (len(wav), rate) == (8000, 16_000)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_folder_of_something_else_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{tmp_path} has no "):
        BENCHMARKS[name].load(tmp_path)


def test_voicebench(tmp_path: Path) -> None:
    benchmark, items = load("voicebench", tmp_path / "data")
    scorings = {item.subset: item.scoring for item in items}
    assert scorings == {
        "openbookqa": Scoring.CHOICE,
        "advbench": Scoring.REFUSAL,
        "sd-qa": Scoring.CORRECT,
        "alpacaeval": Scoring.OPEN,
        "bbh": Scoring.CLOSED,
    }
    own = write_results(benchmark, items, tmp_path)
    assert {path.name for path in own.iterdir()} == {
        "model-openbookqa-test-audio.jsonl",
        "model-advbench-test-audio.jsonl",
        "model-sd-qa-usa-audio.jsonl",
        "model-alpacaeval-test-audio.jsonl",
        "model-bbh-test-audio.jsonl",
    }
    row = {"prompt": "Who wrote it?", "reference": "Poe", "response": "said"}
    assert read_lines(own / "model-sd-qa-usa-audio.jsonl") == [row]


def test_openaudiobench(tmp_path: Path) -> None:
    benchmark, items = load("openaudiobench", tmp_path / "data")
    first = {item.subset: item for item in items if item.id.endswith("00000")}
    assert first["web_questions"].questions[0].references == ("three", "it is 3")
    assert first["trivia_qa"].questions[0].references == ("mars",)
    assert (first["reasoning_qa"].language, first["llama_questions"].language) == ("zh", "en")
    rows = read_lines(write_results(benchmark, items, tmp_path) / "model.jsonl")
    assert [row["index"] for row in rows] == list(range(10))
    assert rows[-1]["audio_path"] == "1.wav"
    missing = tmp_path / "data" / "eval_datas" / "trivia_qa" / "audios" / "1.wav"
    missing.unlink()
    with pytest.raises(ValueError, match=r"trivia_qa.csv, row 2 names the sound 1.wav, which is missing"):
        benchmark.load(tmp_path / "data")


@pytest.mark.parametrize(
    ("cell", "answers"),
    [("Paris", ("Paris",)), ("['a', 'b']", ("a", "b")), ('["c"]', ("c",)), ("[sic] d", ("[sic] d",)), ("", ())],
)
def test_answers_of_a_cell(cell: str, answers: tuple[str, ...]) -> None:
    assert answers_of(cell) == answers


def test_the_papers_spoken_questions_need_no_judge(tmp_path: Path) -> None:
    _, items = load("spoken-qa", tmp_path)
    assert {item.subset for item in items} == {"web_questions", "llama_questions", "trivia_qa"}
    assert {item.scoring for item in items} == {Scoring.CONTAINS}
    path = tmp_path / "eval_datas" / "trivia_qa" / "trivia_qa.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["question", "audio_filename"], ["a", "0.wav"]])
    with pytest.raises(ValueError, match="row 1 has no column 'answer_normalized_aliases'"):
        BENCHMARKS["spoken-qa"].load(tmp_path)


def test_urobench(tmp_path: Path) -> None:
    benchmark, items = load("urobench", tmp_path / "data")
    by_set = {item.subset: item for item in items}
    assert by_set["Repeat-zh"].language == "zh"
    assert by_set["SRT-en"].scoring is Scoring.ELSEWHERE
    dialogue = by_set["MtBenchEval-en"]
    assert [one.text for one in dialogue.questions] == ["Tell me of cats.", "And now?"]
    own = write_results(benchmark, items, tmp_path)
    assert read_lines(own / "basic" / "Gsm8kEval" / "gt_text.jsonl") == [{"0000": ["three", "3"]}]
    assert read_lines(own / "basic" / "Repeat" / "gt_text.jsonl") == [{"0000": "a red stool"}]
    assert read_lines(own / "basic" / "Repeat" / "pred_text.jsonl") == [{"0000": "said"}]
    assert soundfile.info(own / "basic" / "Repeat" / "audio" / "0000.wav").frames == 8000
    several = own / "pro" / "MtBenchEval-en"
    (row,) = read_lines(several / "output_with_text.jsonl")
    assert (row["id"], row["num_round"], row["dialogue"][1]["output_text"]) == (7, 2, "said")
    assert (several / "audio" / "0000" / "chat_2.wav").is_file()


def test_big_bench_audio(tmp_path: Path) -> None:
    benchmark, items = load("big-bench-audio", tmp_path / "data")
    assert [item.subset for item in items] == ["formal_fallacies", "navigate", "object_counting", "web_of_lies"]
    rows = read_lines(write_results(benchmark, items, tmp_path) / "model.jsonl")
    assert rows[2]["official_answer"] == "5"
    assert rows[2]["response"] == "said"


def test_seed_tts_eval(tmp_path: Path) -> None:
    benchmark, items = load("seed-tts-eval", tmp_path / "data")
    assert [(item.id, item.language) for item in items[1:3]] == [("en/utt2-en", "en"), ("zh/utt-zh", "zh")]
    own = write_results(benchmark, items, tmp_path)
    assert sorted(str(path.relative_to(own)) for path in own.rglob("*.wav"))[:1] == ["en/utt-en.wav"]
    (tmp_path / "data" / "en" / "meta.lst").write_text("only|three|fields\n")
    with pytest.raises(ValueError, match="line 1, is not utt|prompt_text|prompt_wav|text"):
        benchmark.load(tmp_path / "data")
