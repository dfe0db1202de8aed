"""A table of measures: on the terminal, as JSON, Markdown and a picture. A row that could not be computed says why."""

from __future__ import annotations

import math
import operator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from duologue.config import write_json

RESULTS_VERSION = 1
_KEEPS = {"at most": operator.le, "at least": operator.ge, "below": operator.lt}
DRAWN_BY_PARTS = ("understanding", "style")  # the table has the parts of every row


@dataclass(frozen=True)
class Row:
    """One measure.

    Attributes:
        group: part of the chain that is judged: "tokenizer", "understanding", ...
        name: what is measured, unique within its group.
        value: in `unit`; None when it could not be computed, then `skipped` says why.
        unit: "%" (the value is a share: 0.25 is printed as 25.0 %), "s", "ms", "MB", "x" (factor), "R2", "MOS",
            "dB", ... or "".
        aim: upper or lower bound that the value should keep; `aim_is` is "at most", "at least" or "below".
        num: how many items the value was computed from.
        interval: 95 % confidence interval of the value, in the same unit.
        parts: the same measure by intent, voice or style, in the same unit.
    """

    group: str
    name: str
    value: float | None
    unit: str = ""
    aim: float | None = None
    aim_is: str = "at most"
    num: int = 0
    note: str = ""
    skipped: str = ""
    parts: dict[str, float] = field(default_factory=dict)
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"{self.group}, {self.name}: {self.value} is no result")
        if (self.value is None) != bool(self.skipped):
            raise ValueError(f"{self.group}, {self.name}: a row has a value, or the reason why it has none")
        if self.aim_is not in _KEEPS:
            raise ValueError(f"aim_is must be one of {', '.join(_KEEPS)}, got {self.aim_is!r}")

    @property
    def met(self) -> bool | None:
        """Whether the aim is reached; None without aim or value."""
        if self.value is None or self.aim is None:
            return None
        return bool(_KEEPS[self.aim_is](self.value, self.aim))


@dataclass(frozen=True)
class Report:
    """All rows of a suite, and what they were computed with."""

    suite: str
    model: dict[str, Any]
    machine: dict[str, Any]
    rows: tuple[Row, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    samples: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; every row carries `met`."""
        rows = [{**asdict(row), "met": row.met} for row in self.rows]
        return {
            "kind": "Report",
            "version": RESULTS_VERSION,
            "suite": self.suite,
            "model": self.model,
            "machine": self.machine,
            "settings": self.settings,
            "rows": rows,
            "samples": list(self.samples),
        }

    def save(self, folder: str | Path, name: str = "results") -> list[Path]:
        """Writes `<name>.json` and, where matplotlib is installed, `<name>.png`; returns what was written."""
        folder = Path(folder)
        write_json(folder / f"{name}.json", self.to_json())
        written = [folder / f"{name}.json"]
        if draw(self, folder / f"{name}.png"):
            written.append(folder / f"{name}.png")
        return written


def difference_row(group: str, name: str, larger: Row, smaller: Row, aim: float | None, unit: str = "points") -> Row:
    """By how much one measure exceeds another; skipped where one of them was."""
    if larger.value is None or smaller.value is None:
        return Row(group, name, None, unit, skipped=larger.skipped or smaller.skipped)
    return Row(group, name, larger.value - smaller.value, unit, aim, num=larger.num)


def format_value(value: float | None, unit: str) -> str:
    """As the table prints it: 0.253 of "%" is "25.3 %"."""
    if value is None:
        return "-"
    if unit == "%":
        return f"{100 * value:.1f} %"
    if unit == "points":
        return f"{100 * value:+.1f} points"
    return f"{value:.2f} {unit}".rstrip()


def _format_interval(row: Row) -> str:
    if row.interval is None:
        return ""
    low, high = row.interval
    return f" ({100 * low:.1f} to {100 * high:.1f})" if row.unit == "%" else f" ({low:.2f} to {high:.2f})"


def format_table(report: Report) -> str:
    """The rows as aligned text, parts of a row indented below it."""
    lines: list[tuple[str, str, str, str, str]] = []
    group = ""
    for row in report.rows:
        aim = "" if row.aim is None else f"{row.aim_is} {format_value(row.aim, row.unit)}"
        verdict = {True: "met", False: "not met", None: ""}[row.met]
        note = f"skipped: {row.skipped}" if row.skipped else row.note
        if row.num and not row.skipped:
            note = f"{note} (n = {row.num})" if note else f"n = {row.num}"
        name = f"{row.group}: {row.name}" if row.group != group else f"{' ' * len(row.group)}  {row.name}"
        lines.append((name, format_value(row.value, row.unit) + _format_interval(row), aim, verdict, note))
        group = row.group
        for part, value in row.parts.items():
            lines.append((f"{' ' * len(row.group)}    {part}", format_value(value, row.unit), "", "", ""))
    head = ("measure", "value", "aim", "", "")
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(4)]
    return "\n".join(
        "  ".join(
            [
                line[0].ljust(widths[0]),
                line[1].rjust(widths[1]),
                line[2].ljust(widths[2]),
                line[3].ljust(widths[3]),
                line[4],
            ]
        ).rstrip()
        for line in [head, *lines]
    )


def format_markdown(report: Report) -> str:
    """The rows as a Markdown table below what they were computed with."""
    lines = [f"# {report.suite}: {report.model.get('name', '')}", ""]
    lines += [f"- {key}: {value}" for key, value in {**report.model, **report.settings}.items() if value != ""]
    lines += ["", "| group | measure | value (95 %) | n | with |", "|---|---|---|---|---|"]
    for row in report.rows:
        value = format_value(row.value, row.unit) + _format_interval(row)
        cells = (row.group, row.name, value, str(row.num or ""), f"skipped: {row.skipped}" if row.skipped else row.note)
        lines.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def draw(report: Report, path: str | Path) -> bool:
    """A PNG of the rows that are shares, with their aims and their parts. False without matplotlib or such rows."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    shares = [row for row in report.rows if row.unit == "%" and row.value is not None]
    if not shares:
        return False
    parted = [row for row in shares if row.parts and row.group in DRAWN_BY_PARTS]
    height = 2.0 + 0.18 * (len(shares) + 2 + sum(len(row.parts) + 4 for row in parted))
    figure = Figure(figsize=(9, height), layout="constrained")
    tall = [len(shares) + 2, *(len(row.parts) + 4 for row in parted)]
    axes = figure.subplots(len(tall), 1, squeeze=False, gridspec_kw={"height_ratios": tall})[:, 0]
    _bars(
        axes[0],
        f"{report.suite}: {report.model.get('name', '')}",
        {f"{r.group}: {r.name}": r.value or 0.0 for r in shares},
    )
    for position, row in enumerate(shares):
        if row.aim is not None:
            axes[0].plot([100 * row.aim] * 2, [position - 0.45, position + 0.45], color="black", linewidth=2)
    for axis, row in zip(axes[1:], parted, strict=True):
        _bars(axis, f"{row.group}: {row.name}", row.parts)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return True


def _bars(axis: Any, title: str, values: dict[str, float]) -> None:
    axis.barh(range(len(values)), [100 * value for value in values.values()], color="#6699bb")
    axis.set_yticks(range(len(values)), list(values), fontsize=7)
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.set_xlim(0, 105)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("%  (a black mark is the aim)", fontsize=7)
