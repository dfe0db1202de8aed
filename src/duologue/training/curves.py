"""The curves of training runs, drawn from their `log.csv`."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

LOG_FILE = "log.csv"
Curve = list[tuple[int, float]]
_VALID = "valid/"


def read_log(folder: str | Path) -> dict[str, Curve]:
    """(step, value) pairs of every name in the log of a run.

    Raises:
        ValueError: the folder holds no log, or it is damaged or empty.
    """
    path = Path(folder) / LOG_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the folder of a training run")
    curves: dict[str, Curve] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                curves.setdefault(row["name"], []).append((int(row["step"]), float(row["value"])))
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{path}, line {number}, is no line of a training log") from None
    if not curves:
        raise ValueError(f"{path} holds no values yet")
    return curves


def plot(folder: str | Path, out: str | Path | None = None) -> Path:
    """Draws one panel per name, training and validation of the same name in one; returns the PNG's path.

    Args:
        out: the picture; "curves.png" in the folder by default.

    Raises:
        ValueError: see `read_log`.
    """
    return plot_runs([folder], Path(folder) / "curves.png" if out is None else out)


def plot_runs(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Draws the curves of several runs into the same panels, one color for each run; returns the PNG's path.

    Raises:
        ValueError: see `read_log`.
    """
    from matplotlib.figure import Figure  # of the extra `train`

    runs = [(Path(folder).name, read_log(folder)) for folder in folders]
    panels = sorted({name.removeprefix(_VALID) for _, curves in runs for name in curves})
    num_columns = min(len(panels), 3)
    num_rows = math.ceil(len(panels) / num_columns)
    figure = Figure(figsize=(5 * num_columns, 3 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        for number, (run, curves) in enumerate(runs):
            color, of_run = f"C{number}", f"{run}, " if len(runs) > 1 else ""
            if panel in curves:
                steps, values = np.array(curves[panel]).T
                axis.plot(steps, values, alpha=0.35, color=color)
                axis.plot(steps, _smooth(values), color=color, label=f"{of_run}training")
            if _VALID + panel in curves:
                steps, values = np.array(curves[_VALID + panel]).T
                held_out = "C1" if len(runs) == 1 else color
                axis.plot(steps, values, "o-", color=held_out, markersize=3, label=f"{of_run}held out")
        axis.set_title(panel, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


def _smooth(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]], share: float = 0.05) -> list[float]:
    """Running mean over about this share of the curve, without values that are not finite."""
    keep = 1 - 1 / max(share * len(values), 1.0)
    smooth: list[float] = []
    for value in values:
        if not math.isfinite(value):
            smooth.append(smooth[-1] if smooth else math.nan)
        elif not smooth or math.isnan(smooth[-1]):
            smooth.append(float(value))
        else:
            smooth.append(keep * smooth[-1] + (1 - keep) * float(value))
    return smooth
