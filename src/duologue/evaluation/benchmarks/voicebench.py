"""VoiceBench (arXiv 2410.17196): Parquet files of the data set hlt-lab/voicebench.

    FOLDER/SUBSET/SPLIT-*.parquet     columns audio, prompt, [reference], [key, instruction_id_list, kwargs], [id]

The results are `MODEL-SUBSET-SPLIT-audio.jsonl`: the row without its sound, and `response`. The benchmark's own
scripts run on them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from duologue.evaluation.benchmarks.items import (
    Benchmark,
    BenchmarkItem,
    BenchmarkQuestion,
    GivenAnswer,
    Scoring,
    SoundPlace,
    texts,
)

SCORINGS = {
    "alpacaeval": Scoring.OPEN,
    "alpacaeval_full": Scoring.OPEN,
    "commoneval": Scoring.OPEN,
    "wildvoice": Scoring.OPEN,
    "openbookqa": Scoring.CHOICE,
    "mmsu": Scoring.CHOICE,
    "sd-qa": Scoring.CORRECT,
    "mtbench": Scoring.ELSEWHERE,  # the layout of its turns is not known here
    "ifeval": Scoring.ELSEWHERE,  # its script has a program for each instruction
    "bbh": Scoring.CLOSED,
    "advbench": Scoring.REFUSAL,
}


def load(folder: Path) -> list[BenchmarkItem]:
    found = [path for subset in SCORINGS for path in sorted((folder / subset).glob("*.parquet"))]
    if not found:
        raise ValueError(f"{folder} has no SUBSET/SPLIT-*.parquet of VoiceBench; the subsets are {', '.join(SCORINGS)}")
    return [item for path in found for item in _items(path)]


def _items(path: Path) -> Iterator[BenchmarkItem]:
    import pyarrow.parquet as pq

    subset, split = path.parent.name, path.stem.split("-")[0]
    with pq.ParquetFile(path) as file:
        names = [name for name in file.schema_arrow.names if name != "audio"]
        if "prompt" not in names or "audio" not in file.schema_arrow.names:
            raise ValueError(f"{path} has not the columns audio and prompt")
        rows = file.read(columns=names).to_pylist()
    for number, row in enumerate(rows):
        question = BenchmarkQuestion(SoundPlace(path, number), str(row["prompt"]), texts(row.get("reference")))
        fields = {**row, "split": split}
        yield BenchmarkItem(f"{subset}/{path.stem}/{number:05d}", subset, (question,), SCORINGS[subset], "en", fields)


def write(target: Path, results: Path, model: str, answers: Sequence[tuple[BenchmarkItem, GivenAnswer]]) -> None:
    lines: dict[str, list[dict[str, Any]]] = {}
    for item, answer in answers:
        row = dict(item.fields)
        name = f"{model}-{item.subset}-{row.pop('split')}-audio.jsonl"
        lines.setdefault(name, []).append({**row, "response": answer.text})
    for name, rows in lines.items():
        text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        (target / name).write_text(text, encoding="utf-8")


VOICEBENCH = Benchmark("voicebench", "VoiceBench", load, write)
