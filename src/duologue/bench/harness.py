"""What every bench shares: the clock, repetitions, checks against aims, peak memory, and the record of a run.

A bench is a function that returns a `Result`: a frozen dataclass of plain values with `checks`, a table for the
terminal and a drawing. Here it becomes one line of JSON that also says on what machine and by what command.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from duologue import machine
from duologue.config import write_json

RECORD_VERSION = 1


@dataclass(frozen=True)
class Check:
    """One aim, and whether the figure of this run meets it.

    Attributes:
        name: as the project's list of aims has it, "decoder.pocket.last_over_second".
        aim: the bound; `ok` knows on which side of it the value has to lie.
    """

    name: str
    value: float
    aim: float
    ok: bool


def at_most(name: str, value: float, aim: float) -> Check:
    """Met up to and at the aim; what is not a number meets nothing."""
    return Check(name, value, aim, value <= aim)


def at_least(name: str, value: float, aim: float) -> Check:
    """Met from the aim on."""
    return Check(name, value, aim, value >= aim)


def below(name: str, value: float, aim: float) -> Check:
    """Met below the aim."""
    return Check(name, value, aim, value < aim)


@dataclass(frozen=True)
class Spread:
    """Median, 95th percentile and least of repeated measures; the unit is that of the field that holds it."""

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


class Result(Protocol):
    """What a bench returns; the rest of its fields are its figures."""

    @property
    def checks(self) -> Sequence[Check]: ...

    def table(self) -> str:
        """The figures for a terminal."""
        ...

    def draw(self, figure: Any) -> None:
        """The figures on an empty matplotlib figure."""
        ...


@dataclass(frozen=True)
class Record:
    """One run: what was measured, by which command, of which model, on which machine.

    Attributes:
        bench: its name, which is also the name of its file.
        model: name, whether trained, and what else tells one model from another.
        peak_memory_mb: the most that the process had resident until then, in 10^6 bytes, and `gpu_memory_mb` the most
            that torch had allocated there.
        duration_s: of the whole bench, loading not counted.
    """

    bench: str
    command: str
    model: dict[str, Any]
    result: Result
    machine: dict[str, Any]
    peak_memory_mb: float
    gpu_memory_mb: float | None
    duration_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what is not a number is null."""
        results = dataclasses.asdict(self.result)  # type: ignore[call-overload]
        results.pop("checks", None)
        record = {
            "kind": "Bench",
            "version": RECORD_VERSION,
            "bench": self.bench,
            "command": self.command,
            "model": self.model,
            "machine": self.machine,
            "peak_memory_mb": round(self.peak_memory_mb, 1),
            "gpu_memory_mb": self.gpu_memory_mb,
            "duration_s": round(self.duration_s, 2),
            "results": results,
            "checks": [dataclasses.asdict(check) for check in self.result.checks],
        }
        plain: dict[str, Any] = _finite(record)
        return plain

    def save(self, folder: str | Path) -> Path:
        """Writes `<bench>.json` into a folder, which may be new."""
        path = Path(folder) / f"{self.bench}.json"
        write_json(path, self.to_json())
        return path


def run(bench: str, command: str, model: dict[str, Any], work: Callable[[], Any]) -> Record:
    """Runs a bench and records it.

    Args:
        work: returns the bench's `Result`.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result: Result = work()
    duration_s = time.perf_counter() - start
    gpu_mb = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else None
    return Record(bench, command, model, result, machine.describe(), peak_memory_mb(), gpu_mb, duration_s)


def format_checks(checks: Sequence[Check]) -> str:
    """One line for each check."""
    return "\n".join(
        f"{check.name}: {check.value:.4g}, aim {check.aim:g}: {'met' if check.ok else 'NOT met'}" for check in checks
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
