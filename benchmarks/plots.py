"""Pictures of results, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Result


def save(result: Result, path: str | Path) -> None:
    """Draws a result into a file; the ending of its name says in which format.

    Raises:
        ImportError: no matplotlib.
        ValueError: an ending that matplotlib does not know.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    result.draw(figure)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_lines(
    axes: Any,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    x: str,
    y: str,
    log: bool = False,
) -> None:
    """Named curves of x and y values, from zero up or on a logarithmic scale."""
    for name, (positions, values) in series.items():
        axes.plot(positions, values, marker="." if len(positions) < 60 else "", label=name)
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if any(series):
        axes.legend(fontsize=8)


def draw_stack(axes: Any, parts: Mapping[str, float], title: str, x: str) -> None:
    """Parts that follow each other: each in a row of its own, beginning where the one above it ends."""
    start = 0.0
    for row, value in enumerate(parts.values()):
        axes.barh([row], [value], left=start, color="#6699bb")
        axes.annotate(f" {value:.1f}", (start + value, row), va="center", fontsize=8)
        start += value
    axes.set_xlim(0, 1.15 * start)
    axes.set_yticks(range(len(parts)), list(parts), fontsize=8)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
