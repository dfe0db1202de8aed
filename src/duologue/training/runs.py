"""Runs beside each other: their final figures, their changed settings, their curves."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from duologue.config import read_json
from duologue.training.curves import LOG_FILE, read_log
from duologue.training.tracking import RECIPE_FILE, RUN_FILE

PAUSE_S = 1800.0  # a longer gap in the log is a pause, not training


@dataclass(frozen=True)
class RunSummary:
    """A run as its folder tells it.

    Attributes:
        hours: time of training without pauses.
        final: last value of every name in the log.
        settings: keys and values of the recipe, such as "loop.num_steps".
        data: keys of the recipe and hashes of the data there, at the last start.
    """

    folder: Path
    stage: str
    num_steps: int
    hours: float
    commit: str
    final: dict[str, float]
    settings: dict[str, Any] = field(repr=False)
    data: dict[str, str] = field(repr=False)


def read_run(folder: str | Path) -> RunSummary:
    """Reads a run's folder. Raises ValueError if it holds no log or no recipe."""
    folder = Path(folder)
    curves = read_log(folder)
    recipe = read_json(folder / RECIPE_FILE)
    path = folder / RUN_FILE
    last = read_json(path)["starts"][-1] if path.exists() else {}
    return RunSummary(
        folder,
        str(recipe.pop("stage", "")),
        max(step for curve in curves.values() for step, _ in curve),
        _hours(folder),
        str(last.get("commit", "")),
        {name: curve[-1][1] for name, curve in sorted(curves.items())},
        dict(_flat(recipe)),
        dict(last.get("data", {})),
    )


def changed_settings(runs: Sequence[RunSummary]) -> dict[str, list[Any]]:
    """Settings and data that are not the same in all runs, with the value of each run; None where a run has none."""
    rows: dict[str, list[Any]] = {}
    for name in dict.fromkeys(key for run in runs for key in run.settings):
        rows[name] = [run.settings.get(name) for run in runs]
    for name in dict.fromkeys(key for run in runs for key in run.data):
        rows[f"data of {name}"] = [run.data.get(name, "")[:12] or None for run in runs]
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def table(runs: Sequence[RunSummary]) -> str:
    """The final figures and the changed settings of runs as a Markdown table."""
    rows: list[tuple[str, list[Any]]] = [
        ("stage", [run.stage for run in runs]),
        ("steps", [run.num_steps for run in runs]),
        ("hours", [f"{run.hours:.2f}" for run in runs]),
        ("commit", [run.commit[:10] for run in runs]),
    ]
    names = dict.fromkeys(name for run in runs for name in run.final)
    rows += [(name, [_number(run.final.get(name)) for run in runs]) for name in names]
    rows += [(name, [json.dumps(value) for value in values]) for name, values in changed_settings(runs).items()]
    lines = [("", [run.folder.name for run in runs]), *rows]
    widths = [max(len(str(cells[column])) for _, cells in lines) for column in range(len(runs))]
    first = max(len(name) for name, _ in lines)

    def line(name: str, cells: Sequence[Any]) -> str:
        padded = [str(cell).rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return f"| {name.ljust(first)} | {' | '.join(padded)} |"

    head, *rest = (line(name, cells) for name, cells in lines)
    rule = f"|{'-' * (first + 2)}|{'|'.join('-' * (width + 1) + ':' for width in widths)}|"
    return "\n".join([head, rule, *rest])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _hours(folder: Path) -> float:
    with (folder / LOG_FILE).open(newline="", encoding="utf-8") as file:
        times = sorted(float(row["time"]) for row in csv.DictReader(file))
    gaps = (later - earlier for earlier, later in pairwise(times))
    return sum(gap for gap in gaps if gap < PAUSE_S) / 3600.0


def _flat(value: Mapping[str, Any], key: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        name = f"{key}.{name}" if key else name
        if isinstance(inner, Mapping):
            yield from _flat(inner, name)
        else:
            yield name, inner
