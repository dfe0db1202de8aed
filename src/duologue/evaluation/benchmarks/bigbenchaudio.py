"""Big Bench Audio: the data set ArtificialAnalysis/big_bench_audio as a folder.

    FOLDER/metadata.jsonl     category, official_answer, file_name ("data/question_0.mp3"), id, [transcript]

Answers are closed: valid or invalid, yes or no, a whole number. The published figures come from a judge; here a matcher
reads the answer offline, and `--judge` adds the judged share.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from duologue.evaluation.benchmarks.items import (
    Benchmark,
    BenchmarkItem,
    BenchmarkQuestion,
    GivenAnswer,
    Scoring,
    existing,
    read_rows,
    texts,
)


def load(folder: Path) -> list[BenchmarkItem]:
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} has no metadata.jsonl of Big Bench Audio")
    items = []
    for number, row in enumerate(read_rows(path, ("category", "official_answer", "file_name"))):
        sound = existing(folder / row["file_name"], f"{path}, line {number + 1}")
        question = BenchmarkQuestion(sound, str(row.get("transcript", "")), texts(row["official_answer"]))
        key = str(row.get("id", number))
        items.append(BenchmarkItem(key, str(row["category"]), (question,), Scoring.CLOSED, "en", row))
    return items


def write(target: Path, results: Path, model: str, answers: Sequence[tuple[BenchmarkItem, GivenAnswer]]) -> None:
    """No result layout is published: the rows with `response`."""
    rows = ({**item.fields, "response": answer.text} for item, answer in answers)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (target / f"{model}.jsonl").write_text("".join(lines), encoding="utf-8")


BIG_BENCH_AUDIO = Benchmark("big-bench-audio", "Big Bench Audio", load, write)
