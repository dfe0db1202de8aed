"""From answers to figures: one `Score` for each item and measure, and rows of the report with their intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from duologue.config import parse_config, to_mapping
from duologue.evaluation.benchmarks.items import BenchmarkItem, GivenAnswer, Scoring
from duologue.evaluation.intervals import bootstrap, wilson
from duologue.evaluation.judge import RANGES, ChatJudge, judge_prompt, read_verdict
from duologue.evaluation.matchers import choice_of, matches_closed, refuses_harm
from duologue.evaluation.recognition import SoundRecognizer
from duologue.evaluation.report import Row
from duologue.evaluation.runner import JsonLines, read_rows
from duologue.scoring import is_correct, word_errors
from duologue.sound_files import load_audio

SCORES_FILE, HEARD_FILE = "scores.jsonl", "heard.jsonl"
ALL = "all"
NO_JUDGE = "needs a judge: --judge URL"
OWN_SCRIPT = "only the benchmark's own script scores it; its result layout is in the folder `own`"

Side = Literal["text", "sound"]


@dataclass(frozen=True)
class Score:
    """One measure of one item; a figure is sum(value) / sum(weight).

    Attributes:
        unit: "%", "s", or the end of a rating scale such as "of 5".
        better: which direction is better.
    """

    item: str
    subset: str
    measure: str
    value: float
    weight: float = 1.0
    unit: str = "%"
    better: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True)
class MissingFigure:
    """A figure that cannot be computed, and why."""

    subset: str
    measure: str
    reason: str
    unit: str = "%"


@dataclass
class Scored:
    """All scores of a run.

    Attributes:
        num_unreadable: verdicts of the judge that are neither a word nor a number of the scale; left out.
    """

    scores: list[Score] = field(default_factory=list)
    missing: list[MissingFigure] = field(default_factory=list)
    num_unreadable: int = 0

    def save(self, folder: Path) -> None:
        (folder / SCORES_FILE).unlink(missing_ok=True)
        with JsonLines(folder / SCORES_FILE) as lines:
            for one in self.scores:
                lines.append(to_mapping(one))


def read_scores(folder: Path) -> list[Score]:
    """Raises ValueError if the folder holds no scores."""
    path = folder / SCORES_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {SCORES_FILE}: it is no folder that `duologue evaluate` wrote")
    return [parse_config(Score, row, str(path)) for row in read_rows(path)]


def read_sounds(
    folder: Path,
    items: Sequence[BenchmarkItem],
    answers: Mapping[str, GivenAnswer],
    recognizer: SoundRecognizer,
    name: str,
) -> dict[str, str]:
    """What the recognizer reads in each reply, by the path of its sound; kept on disk under the recognizer's name."""
    found = {str(row["sound"]): str(row["text"]) for row in read_rows(folder / HEARD_FILE) if row["recognizer"] == name}
    wanted = [(item, turn) for item in items if item.id in answers for turn in answers[item.id].turns]
    missing = [(item, turn) for item, turn in wanted if turn.sound and turn.sound not in found]
    with JsonLines(folder / HEARD_FILE) as lines:
        for item, turn in tqdm(missing, "recognizer", disable=None, leave=False):
            text = recognizer.transcribe(*load_audio(folder / turn.sound), item.language)
            found[turn.sound] = text
            lines.append({"recognizer": name, "sound": turn.sound, "text": text})
    return found


def score(
    items: Sequence[BenchmarkItem],
    answers: Mapping[str, GivenAnswer],
    heard: Mapping[str, str] | None,
    why_not_heard: str,
    judge: ChatJudge | None,
) -> Scored:
    """Scores every item that was asked. An item whose question failed counts as an empty answer.

    Args:
        heard: text of each sound, see `read_sounds`; None without a recognizer, for the reason `why_not_heard`.
    """
    scored = Scored()
    asked = [(item, answers[item.id]) for item in items if item.id in answers]
    sides: list[Side] = ["text"] if heard is None else ["text", "sound"]
    wanted: list[tuple[BenchmarkItem, str, Scoring, str]] = []  # measure and prompt of each verdict
    for item, answer in asked:
        scored.scores.append(_of(item, "questions that failed", float(bool(answer.error)), better="lower"))
        for side in sides:
            replies = _replies(answer, heard if side == "sound" else None)
            if item.scoring.is_judged and judge is not None:
                wanted.append((item, f"judged, {side}", item.scoring, judge_prompt(item, replies)))
            elif item.scoring is Scoring.CLOSED and judge is not None and item.questions[-1].references:
                prompt = judge_prompt(item, replies, Scoring.CORRECT)
                wanted.append((item, f"right by the judge, {side}", Scoring.CORRECT, prompt))
            scored.scores += _offline(item, replies[-1] if replies else "", side)
        if heard is not None and item.scoring is not Scoring.READ:
            scored.scores += _agreement(item, answer, heard)
        scored.scores += [
            _of(item, "to first audio", turn.first_audio_s, unit="s", better="lower")
            for turn in answer.turns[-1:]
            if turn.first_audio_s is not None
        ]
    if judge is not None and wanted:
        for (item, measure, scoring, _), text in zip(wanted, judge.judge([one[3] for one in wanted]), strict=True):
            value = read_verdict(text, scoring)
            if value is None:
                scored.num_unreadable += 1
                continue
            unit = "%" if scoring is Scoring.CORRECT else f"of {RANGES[scoring][1]}"
            scored.scores.append(_of(item, measure, value, unit=unit))
    scored.missing = list(_missing(asked, judge is not None, heard is not None, why_not_heard))
    return scored


def score_rows(scored: Scored, used: Mapping[str, str], with_total: bool = True) -> list[Row]:
    """A row for each subset and measure, and over all subsets where there are several.

    Args:
        used: "recognizer" and "judge" by name, for the notes.
        with_total: adds rows over all subsets.
    """
    names = [one.subset for one in scored.scores] + [one.subset for one in scored.missing]
    subsets = list(dict.fromkeys(names))
    rows = []
    for subset in [*subsets, ALL] if with_total and len(subsets) > 1 else subsets:
        own = [one for one in scored.scores if subset in (one.subset, ALL)]
        for measure in dict.fromkeys(one.measure for one in own):
            rows.append(_row(subset, measure, [one for one in own if one.measure == measure], used))
        rows += [
            Row(subset, one.measure, None, one.unit, skipped=one.reason)
            for one in scored.missing
            if one.subset == subset
        ]
    return rows


def interval_of(scores: Sequence[Score]) -> tuple[float, float]:
    """Wilson's for shares of items, bootstrap over items for rates and means."""
    values, weights = [one.value for one in scores], [one.weight for one in scores]
    if scores[0].unit == "%" and set(values) <= {0.0, 1.0} and set(weights) == {1.0} and _one_each(scores):
        return wilson(round(sum(values)), len(values))
    return bootstrap(values, weights, [one.item for one in scores])


def _row(subset: str, measure: str, scores: Sequence[Score], used: Mapping[str, str]) -> Row:
    values, weights = [one.value for one in scores], [one.weight for one in scores]
    unit, num = scores[0].unit, len({one.item for one in scores})
    if not sum(weights):
        return Row(subset, measure, None, unit, skipped="the references hold no words")
    parts = {}
    if unit == "s":
        parts = {f"p{percent}": float(np.percentile(values, percent)) for percent in (50, 95)}
    notes = [f"{scores[0].better} is better"]
    if "WER" in measure or "CER" in measure or "right" in measure:
        notes.append("normalizer: " + ("basic, by characters" if "CER" in measure else "Whisper"))
    notes += [f"recognizer: {used['recognizer']}"] if "sound" in measure or "reconstruction" in measure else []
    notes += [f"judge: {used['judge']}"] if "judge" in measure else []
    value = sum(values) / sum(weights)
    return Row(subset, measure, value, unit, num=num, note=", ".join(notes), parts=parts, interval=interval_of(scores))


def _offline(item: BenchmarkItem, reply: str, side: Side) -> Iterable[Score]:
    references = item.questions[-1].references
    match item.scoring:
        case Scoring.CONTAINS if references:
            yield _of(item, f"right, {side}", float(is_correct(reply, references, item.language)))
        case Scoring.CLOSED if references:
            yield _of(item, f"right, {side}", float(any(matches_closed(reply, one) for one in references)))
        case Scoring.CHOICE if references:
            yield _of(
                item, f"right, {side}", float(choice_of(reply) in [one.strip("() .").upper() for one in references])
            )
        case Scoring.REFUSAL:
            yield _of(item, f"refused, {side}", float(refuses_harm(reply)))
        case Scoring.REPEAT if references:
            edits, words = word_errors(references[0], reply, item.language)
            yield _of(item, f"{_rate(item)}, {side}", edits, words, better="lower")
        case Scoring.READ if side == "sound":
            edits, words = word_errors(references[0], reply, item.language)
            yield _of(item, f"{_rate(item)}, sound", edits, words, better="lower")


def _agreement(item: BenchmarkItem, answer: GivenAnswer, heard: Mapping[str, str]) -> Iterable[Score]:
    """Does the sound of a reply say what its text says?"""
    for turn in answer.turns:
        edits, words = word_errors(turn.text, heard.get(turn.sound, ""), item.language)
        yield _of(item, f"ASR-{_rate(item)}: text against sound", edits, words, better="lower")


def _missing(
    asked: Sequence[tuple[BenchmarkItem, GivenAnswer]], has_judge: bool, has_recognizer: bool, why_not_heard: str
) -> Iterable[MissingFigure]:
    for subset, scoring in dict.fromkeys((item.subset, item.scoring) for item, _ in asked):
        own = [item for item, _ in asked if item.subset == subset and item.scoring is scoring]
        if scoring is Scoring.ELSEWHERE:
            yield MissingFigure(subset, "score", OWN_SCRIPT)
        if scoring.is_judged and not has_judge:
            unit = "%" if scoring is Scoring.CORRECT else f"of {RANGES[scoring][1]}"
            yield MissingFigure(subset, "judged, text", NO_JUDGE, unit)
        needs_reference = scoring in (Scoring.CONTAINS, Scoring.CLOSED, Scoring.CHOICE, Scoring.REPEAT)
        if needs_reference and not any(item.questions[-1].references for item in own):
            yield MissingFigure(subset, "right, text", "the data has no reference answers")
        if not has_recognizer:
            measure = f"{_rate(own[0])}, sound" if scoring is Scoring.READ else "ASR-WER: text against sound"
            yield MissingFigure(subset, measure, why_not_heard)


def _replies(answer: GivenAnswer, heard: Mapping[str, str] | None) -> list[str]:
    return [turn.text if heard is None else heard.get(turn.sound, "") for turn in answer.turns]


def _rate(item: BenchmarkItem) -> str:
    return "CER" if item.language == "zh" else "WER"


def _one_each(scores: Sequence[Score]) -> bool:
    return len({one.item for one in scores}) == len(scores)


def _of(
    item: BenchmarkItem,
    measure: str,
    value: float,
    weight: float = 1.0,
    unit: str = "%",
    better: Literal["higher", "lower"] = "higher",
) -> Score:
    return Score(item.id, item.subset, measure, float(value), float(weight), unit, better)
