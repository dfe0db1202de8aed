"""OpenAudioBench, and the three spoken question sets of it that table 4 of arXiv 2412.02612 has.

    FOLDER/eval_datas/SUBSET/SUBSET.csv       FOLDER/eval_datas/SUBSET/audios/AUDIO_FILENAME

The folder may also be `eval_datas` itself. The benchmark's result layout is not known here. The results are JSON Lines
with the fields of Kimi-Audio-Evalkit: index, audio_path, question, answer, subset, task_type, and `response`.
"""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from duologue.evaluation.benchmarks.items import (
    Benchmark,
    BenchmarkItem,
    BenchmarkQuestion,
    GivenAnswer,
    Scoring,
    existing,
    texts,
)

# Subset -> column of the question, column of the answer, scoring.
COLUMNS = {
    "alpaca_eval": ("instruction", "output", Scoring.OPEN),
    "trivia_qa": ("question", "answer_normalized_aliases", Scoring.CORRECT),
    "reasoning_qa": ("Prompt", "参考答案", Scoring.CORRECT),
    "web_questions": ("question", "answers", Scoring.CORRECT),
    "llama_questions": ("Questions", "Answer", Scoring.CORRECT),
}
SPOKEN_QA = ("web_questions", "llama_questions", "trivia_qa")


def load(folder: Path) -> list[BenchmarkItem]:
    return _load(folder, tuple(COLUMNS), {})


def load_spoken_qa(folder: Path) -> list[BenchmarkItem]:
    """WebQ, LlamaQ and TriviaQA by the paper's rule: an accepted answer stands in the reply."""
    return _load(folder, SPOKEN_QA, dict.fromkeys(SPOKEN_QA, Scoring.CONTAINS))


def _load(folder: Path, subsets: Sequence[str], scorings: dict[str, Scoring]) -> list[BenchmarkItem]:
    root = folder / "eval_datas" if (folder / "eval_datas").is_dir() else folder
    found = [path for name in subsets if (path := root / name / f"{name}.csv").is_file()]
    if not found:
        raise ValueError(f"{root} has no SUBSET/SUBSET.csv of OpenAudioBench; the subsets are {', '.join(subsets)}")
    return [item for path in found for item in _items(path, scorings.get(path.stem))]


def _items(path: Path, scoring: Scoring | None) -> Iterator[BenchmarkItem]:
    subset = path.stem
    question_column, answer_column, usual = COLUMNS[subset]
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        where = f"{path}, row {number + 1}"
        for column in (question_column, answer_column, "audio_filename"):
            if row.get(column) is None:
                raise ValueError(f"{where} has no column {column!r}")
        sound = existing(path.parent / "audios" / row["audio_filename"], where)
        question = BenchmarkQuestion(sound, row[question_column], answers_of(row[answer_column]))
        language = "zh" if any("一" <= char <= "鿿" for char in row[question_column]) else "en"
        yield BenchmarkItem(f"{subset}/{number:05d}", subset, (question,), scoring or usual, language, row)


def answers_of(text: str) -> tuple[str, ...]:
    """The accepted answers of a cell: a list as Python or JSON writes it, or one text."""
    if text.strip().startswith("["):
        try:
            return texts(ast.literal_eval(text.strip()))
        except (ValueError, SyntaxError):
            pass  # a text that begins with a bracket
    return texts(text)


def write(target: Path, results: Path, model: str, answers: Sequence[tuple[BenchmarkItem, GivenAnswer]]) -> None:
    with (target / f"{model}.jsonl").open("w", encoding="utf-8") as file:
        for index, (item, answer) in enumerate(answers):
            question = item.questions[0]
            row = {
                "index": index,
                "audio_path": "" if question.sound is None else question.sound.path.name,
                "question": question.text,
                "answer": list(question.references),
                "subset": item.subset,
                "task_type": item.scoring.value,
                "response": answer.text,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


OPENAUDIOBENCH = Benchmark("openaudiobench", "OpenAudioBench", load, write)
SPOKEN_QA_BENCHMARK = Benchmark("spoken-qa", "WebQ, LlamaQ and TriviaQA", load_spoken_qa, write)
