"""URO-Bench (arXiv 2502.17810), tracks basic and pro.

    FOLDER/{basic|pro}/DATASET/test.jsonl     source_wav, source_text, [target_text]
                                              or of several turns: id, dialogue [{round, source_wav, ...}]

The results have its layout: `TRACK/DATASET/audio/0000.wav`, and pred_text, question_text and gt_text.jsonl with
`{"0000": text}`; of several turns `output_with_text.jsonl` and `NUMBER/chat_ROUND.wav`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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

# Modes of its scripts/config.sh. The modes ge, gs, sf, srt, ue, ml and sa need the sound itself or another prompt: only
# its own scripts score them.
MODES = {
    **dict.fromkeys(
        ("AlpacaEval", "CommonEval", "WildchatEval", "AlpacaEval-zh", "Claude-zh", "Wildchat-zh"), Scoring.OPEN
    ),
    **dict.fromkeys(
        ("StoralEval", "Summary", "TruthfulEval", "LCSTS-zh", "CodeSwitching-en", "CodeSwitching-zh"), Scoring.REFERENCE
    ),
    **dict.fromkeys(
        (
            *("GaokaoEval", "Gsm8kEval", "MLC", "SQuAD-zh", "APE-zh", "MLC-zh", "OpenbookQA-zh", "HSK5-zh"),
            *("MLCpro-en", "MLCpro-zh", "ClothoEval-en", "MuChoEval-en"),
        ),
        Scoring.CORRECT,
    ),
    **dict.fromkeys(("Repeat", "Repeat-zh"), Scoring.REPEAT),
    "MtBenchEval-en": Scoring.DIALOGUE,
}
TRACKS = ("basic", "pro")


def load(folder: Path) -> list[BenchmarkItem]:
    found = [path for track in TRACKS for path in sorted((folder / track).glob("*/test.jsonl"))]
    if not found:
        raise ValueError(f"{folder} has no {{basic|pro}}/DATASET/test.jsonl of URO-Bench")
    return [item for path in found for item in _items(path)]


def _items(path: Path) -> list[BenchmarkItem]:
    name, track = path.parent.name, path.parents[1].name
    language = (
        "" if name in ("Multilingual", "CodeSwitching-en", "CodeSwitching-zh") else "zh" if "-zh" in name else "en"
    )
    items = []
    for number, row in enumerate(read_rows(path, ())):
        where = f"{path}, line {number + 1}"
        rounds = sorted(row["dialogue"], key=lambda one: int(one["round"])) if "dialogue" in row else [row]
        questions = tuple(_question(path.parent, one, where) for one in rounds)
        scoring = MODES.get(name, Scoring.ELSEWHERE)
        fields = {"track": track, "number": number, "several": "dialogue" in row, "id": row.get("id", number)}
        items.append(BenchmarkItem(f"{track}/{name}/{number:04d}", name, questions, scoring, language, fields))
    return items


def _question(folder: Path, row: dict[str, Any], where: str) -> BenchmarkQuestion:
    if "source_wav" not in row:
        raise ValueError(f"{where} has no 'source_wav'")
    sound = existing(folder / row["source_wav"], where)
    return BenchmarkQuestion(sound, str(row.get("source_text", "")), texts(row.get("target_text")))


def write(target: Path, results: Path, model: str, answers: Sequence[tuple[BenchmarkItem, GivenAnswer]]) -> None:
    by_set: dict[Path, list[tuple[BenchmarkItem, GivenAnswer]]] = {}
    for item, answer in answers:
        by_set.setdefault(target / str(item.fields["track"]) / item.subset, []).append((item, answer))
    for folder, given in by_set.items():
        (folder / "audio").mkdir(parents=True, exist_ok=True)
        if given[0][0].fields["several"]:
            _write_dialogues(folder, results, given)
            continue
        for name in ("pred_text", "question_text", "gt_text"):
            (folder / f"{name}.jsonl").write_text("", encoding="utf-8")
        for item, answer in given:
            key, question = f"{int(item.fields['number']):04d}", item.questions[0]
            _append(folder / "pred_text.jsonl", {key: answer.text})
            _append(folder / "question_text.jsonl", {key: question.text})
            references: Any = question.references
            _append(folder / "gt_text.jsonl", {key: references[0] if len(references) == 1 else list(references)})
            if answer.sound:
                link(results / answer.sound, folder / "audio" / f"{key}.wav")


def _write_dialogues(folder: Path, results: Path, given: Sequence[tuple[BenchmarkItem, GivenAnswer]]) -> None:
    (folder / "output_with_text.jsonl").write_text("", encoding="utf-8")
    for item, answer in given:
        number, dialogue = int(item.fields["number"]), []
        for index, (question, turn) in enumerate(zip(item.questions, answer.turns, strict=False), start=1):
            said = {"source_text": question.text, "target_text": list(question.references), "output_text": turn.text}
            dialogue.append({"round": index, **said})
            if turn.sound:
                (folder / "audio" / f"{number:04d}").mkdir(exist_ok=True)
                link(results / turn.sound, folder / "audio" / f"{number:04d}" / f"chat_{index}.wav")
        row = {"id": item.fields["id"], "num_round": len(item.questions), "dialogue": dialogue}
        _append(folder / "output_with_text.jsonl", row)


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def link(source: Path, target: Path) -> None:
    """A second name of a file, or a copy where the file system has no hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


UROBENCH = Benchmark("urobench", "URO-Bench", load, write)
