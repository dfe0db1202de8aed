"""What every bench shares: the clock, repetitions, peak memory, and the report of a run.

A bench is a function that returns a `Result`: a frozen dataclass of plain values that gives rows of a report and draws
itself. Here it becomes a `BenchReport`, which also names the machine and the command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Protocol

import numpy as np
import torch

from duologue import machine
from duologue.evaluation.report import Report, Row, format_value

RECORD_VERSION = 2
AIMS = "aims"  # group of the rows that have an aim; their names are those of docs/benchmarks.md


@dataclass(frozen=True)
class Spread:
    """Median, 95th percentile and minimum of repeated measures; the unit is that of the field that holds it."""

    median: float
    p95: float
    least: float
    num: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError without values."""
        if not len(values):
            raise ValueError("nothing was measured, so there is no median")
        return cls(statistics.median(values), float(np.percentile(values, 95)), min(values), len(values))

    def scaled(self, factor: float) -> Spread:
        """In another unit."""
        return Spread(self.median * factor, self.p95 * factor, self.least * factor, self.num)

    def row(self, group: str, name: str, unit: str, note: str = "") -> Row:
        """The median as a row, with the 95th percentile in its note."""
        p95 = f"p95 {format_value(self.p95, unit)}"
        return Row(group, name, self.median, unit, num=self.num, note=f"{note}, {p95}" if note else p95)


class Result(Protocol):
    """What a bench returns; its fields are its figures."""

    def rows(self) -> list[Row]:
        """The figures for a terminal; those of the group `AIMS` have an aim."""
        ...

    def draw(self, figure: Any) -> None:
        """The figures on an empty matplotlib figure."""
        ...


@dataclass(frozen=True)
class BenchReport(Report):
    """The report of one run.

    Attributes:
        command: the command line that ran the bench.
        result: what the bench returned.
        peak_memory_mb: the most that the process had resident until then, in 10^6 bytes.
        gpu_memory_mb: the most that torch had allocated on the GPU; None without one.
        duration_s: of the whole bench, without loading.
    """

    _: KW_ONLY
    command: str
    result: Result
    peak_memory_mb: float
    gpu_memory_mb: float | None
    duration_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what is not a number is null."""
        record = {
            "kind": "Bench",
            "version": RECORD_VERSION,
            "bench": self.suite,
            "command": self.command,
            "model": self.model,
            "machine": self.machine,
            "peak_memory_mb": round(self.peak_memory_mb, 1),
            "gpu_memory_mb": self.gpu_memory_mb,
            "duration_s": round(self.duration_s, 2),
            "results": dataclasses.asdict(self.result),  # type: ignore[call-overload]
            "checks": [
                {"name": row.name, "value": row.value, "aim": row.aim, "ok": bool(row.met)}
                for row in self.rows
                if row.aim is not None
            ],
        }
        plain: dict[str, Any] = _finite(record)
        return plain


def run(bench: str, command: str, model: dict[str, Any], work: Callable[[], Any]) -> BenchReport:
    """Runs a bench and reports it.

    Args:
        work: returns the bench's `Result`.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result: Result = work()
    duration_s = time.perf_counter() - start
    gpu_mb = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else None
    return BenchReport(
        bench,
        model,
        machine.describe(),
        tuple(result.rows()),
        command=command,
        result=result,
        peak_memory_mb=peak_memory_mb(),
        gpu_memory_mb=gpu_mb,
        duration_s=duration_s,
    )


def peak_memory_mb() -> float:
    """The most that this process had resident, in 10^6 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def now(device: torch.device | str = "cpu") -> float:
    """The clock in seconds, after everything that was asked of the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def computed(device: torch.device | str = "cpu") -> float:
    """Seconds of computation so far: those of the processor in all threads; of another device its clock, see `now`."""
    return time.process_time() if torch.device(device).type == "cpu" else now(device)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes in one thread of the processor inside of this block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds that the work takes, on the device too."""
    start = now(device)
    work()
    return now(device) - start


def repeat(
    work: Callable[[int], object], repetitions: int, warm_up: int = 1, device: torch.device | str = "cpu"
) -> list[float]:
    """Seconds of each counted repetition; `work` is given the number of its round, warm-up rounds first.

    Raises:
        ValueError: fewer than one repetition, or a negative warm-up.
    """
    if repetitions < 1 or warm_up < 0:
        raise ValueError(f"repetitions must be at least 1 and warm_up not negative, got {repetitions} and {warm_up}")
    seconds = []
    for index in range(warm_up + repetitions):
        start = now(device)
        work(index)
        seconds.append(now(device) - start)
    return seconds[warm_up:]


def _finite(value: Any) -> Any:
    """NaN and infinities become null, which JSON has."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
