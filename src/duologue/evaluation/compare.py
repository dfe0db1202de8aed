"""Two runs of a benchmark compared item by item: better, worse, or not to be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from duologue.evaluation.report import format_value
from duologue.evaluation.scores import ALL, Score, read_scores

BETTER, WORSE, UNDECIDED = "better", "worse", "not to be told apart"
_NUM_SAMPLES = 2000


@dataclass(frozen=True)
class Comparison:
    """A measure of run B against the same of run A.

    Attributes:
        difference: second minus first.
        interval: 95 % of the difference, paired bootstrap over the items of both runs.
        num: items that both runs have.
        verdict: on the second run: "better" or "worse" where the interval excludes 0.
    """

    subset: str
    measure: str
    unit: str
    first: float
    second: float
    difference: float
    interval: tuple[float, float]
    num: int
    verdict: str


def compare(first: Path, second: Path, seed: int = 0) -> list[Comparison]:
    """Compares what both folders have.

    Raises:
        ValueError: a folder has no scores, or the runs share no item.
    """
    runs = [_by_measure(read_scores(folder)) for folder in (first, second)]
    found = [
        _compare(key, runs[0][key], runs[1][key], seed)
        for key in runs[0]
        if key in runs[1] and {one.item for one in runs[0][key]} & {one.item for one in runs[1][key]}
    ]
    compared = [one for one in found if one is not None]
    if not compared:
        raise ValueError(f"{first} and {second} share no item that both score by the same measure")
    return compared


def format_comparison(compared: Sequence[Comparison]) -> str:
    """As a Markdown table."""
    lines = ["| subset | measure | A | B | B - A (95 %) | items | B is |", "|---|---|---|---|---|---|---|"]
    for one in compared:
        low, high = (format_value(value, _difference_unit(one.unit)) for value in one.interval)
        cells = [one.subset, one.measure, format_value(one.first, one.unit), format_value(one.second, one.unit)]
        difference = f"{format_value(one.difference, _difference_unit(one.unit))} ({low} to {high})"
        lines.append(f"| {' | '.join([*cells, difference, str(one.num), one.verdict])} |")
    return "\n".join(lines)


def to_rows(compared: Sequence[Comparison]) -> list[dict[str, Any]]:
    return [{**vars(one), "interval": list(one.interval)} for one in compared]


def _difference_unit(unit: str) -> str:
    return "points" if unit == "%" else unit


def _by_measure(scores: Sequence[Score]) -> dict[tuple[str, str], list[Score]]:
    several = len({one.subset for one in scores}) > 1
    found: dict[tuple[str, str], list[Score]] = {}
    for one in scores:
        for subset in (one.subset, ALL) if several else (one.subset,):
            found.setdefault((subset, one.measure), []).append(one)
    return found


def _compare(key: tuple[str, str], first: list[Score], second: list[Score], seed: int) -> Comparison | None:
    shared = sorted({one.item for one in first} & {one.item for one in second})
    place = {item: number for number, item in enumerate(shared)}
    sums = np.zeros((2, 2, len(shared)))  # run; value, weight; item
    for run, scores in enumerate((first, second)):
        for one in scores:
            if one.item in place:
                sums[run, :, place[one.item]] += one.value, one.weight
    if not sums[:, 1].sum(-1).all():
        return None
    rng = np.random.default_rng(seed)
    differences = []
    for _ in range(_NUM_SAMPLES):
        drawn = sums[:, :, rng.integers(len(shared), size=len(shared))].sum(-1)
        if drawn[:, 1].all():
            differences.append(drawn[1, 0] / drawn[1, 1] - drawn[0, 0] / drawn[0, 1])
    low, high = (float(value) for value in np.percentile(differences, (2.5, 97.5)))
    values = sums.sum(-1)
    a, b = float(values[0, 0] / values[0, 1]), float(values[1, 0] / values[1, 1])
    verdict = UNDECIDED
    if low > 0 or high < 0:
        verdict = BETTER if (low > 0) == (first[0].better == "higher") else WORSE
    return Comparison(*key, first[0].unit, a, b, b - a, (low, high), len(shared), verdict)
