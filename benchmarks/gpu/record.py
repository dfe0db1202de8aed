"""The record of a run: figures as lines of JSON, deadlines, and the clock."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from duologue.cuda import captured

Work = Callable[[], object]
_TRACE_LINES = 8


class Record:
    """Figures of one run, appended to a file and kept for the table.

    Args:
        path: the file; lines of an earlier run stay.
        start: `time.time()` at the start of the run.
    """

    def __init__(self, path: Path, start: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._start = path, start
        self._file = path.open("a", encoding="utf-8")
        self.section = ""
        self.lines: list[dict[str, Any]] = []

    def add(self, name: str, value: float | int | str | None, unit: str = "", **details: Any) -> None:
        """Writes one figure at once.

        Args:
            details: further JSON values, such as the number of rows.
        """
        if isinstance(value, float):
            value = float(f"{value:.5g}") if math.isfinite(value) else None
        line = {"section": self.section, "name": name, "value": value, "unit": unit, **details}
        line["at_s"] = round(time.time() - self._start, 1)
        self.lines.append(line)
        text = json.dumps(line, default=str)
        self._file.write(text + "\n")
        self._file.flush()
        print(text, flush=True)

    def fail(self, name: str, error: BaseException) -> None:
        """Writes one failure; its trace goes to stderr."""
        sentence = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        self.add(name, None, "", error=sentence)
        traceback.print_exception(error, limit=-_TRACE_LINES, file=sys.stderr)

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Runs a block of which a failure costs one line."""
        try:
            yield
        except Exception as error:
            self.fail(name, error)

    def table(self) -> str:
        """Returns all figures, one per line."""
        rows = []
        for line in self.lines:
            known = {"section", "name", "value", "unit", "at_s", "error"}
            details = ", ".join(f"{key} {value}" for key, value in line.items() if key not in known)
            value = f"FAILED {line['error']}" if "error" in line else f"{line['value']} {line['unit']}"
            rows.append(f"{line['section']:<13}{line['name']:<46}{value:<24}{details}")
        return "\n".join(rows)


@dataclass
class Run:
    """What the sections share.

    Attributes:
        ends_at: end of the current section, by `time.time()`.
        models: models that an earlier section made, by name.
    """

    device: torch.device
    tiny: bool
    record: Record
    ends_at: float = 0.0
    models: dict[str, Any] = field(default_factory=dict)

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def over(self) -> bool:
        """Whether the section must end."""
        return time.time() > self.ends_at

    @property
    def left_s(self) -> float:
        """Seconds until the end of the section."""
        return max(self.ends_at - time.time(), 0.0)

    def sync(self) -> None:
        """Waits for the device."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def times_ms(self, work: Work, repetitions: int = 20, warm_up: int = 3) -> list[float]:
        """Returns wall-clock milliseconds of each repetition, with the device idle before and after."""
        if self.tiny:
            repetitions, warm_up = min(repetitions, 2), min(warm_up, 1)
        for _ in range(warm_up):
            work()
        times = []
        for _ in range(repetitions):
            self.sync()
            start = time.perf_counter()
            work()
            self.sync()
            times.append(1e3 * (time.perf_counter() - start))
        return times

    def median_ms(self, work: Work, repetitions: int = 20, warm_up: int = 3) -> float:
        """Returns the median of `times_ms`."""
        return statistics.median(self.times_ms(work, repetitions, warm_up))

    def graphed(self, work: Callable[[], Any]) -> tuple[Work, Any]:
        """Returns a replay of the captured work and its result; without CUDA the work itself."""
        if not self.on_cuda:
            return work, work()
        return captured(work)
