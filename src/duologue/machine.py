"""Information about this machine: processor, cores, memory, versions. Complete on Linux, partial elsewhere."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

VERSIONS_OF = ("duologue", "numpy", "torch", "transformers")


def processor_name() -> str:
    return _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def processor_flags() -> set[str]:
    """Returns the instruction sets by their Linux names; empty elsewhere."""
    return set(_first("/proc/cpuinfo", "flags").split())


def num_cores() -> int:
    """Returns the number of cores available to this process."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def free_memory_gb() -> float | None:
    """Returns the memory available without swapping in 10^9 bytes, or None if unknown."""
    available = _first("/proc/meminfo", "MemAvailable")
    return int(available.split()[0]) * 1024 / 1e9 if available else None


def resident_mb() -> float:
    """Returns the memory that this process has resident now, in 10^6 bytes; NaN if unknown."""
    return _memory_mb("VmRSS")


def peak_resident_mb() -> float:
    """Returns the most memory that this process had resident, in 10^6 bytes; NaN if unknown."""
    return _memory_mb("VmHWM")


def load() -> float | None:
    """Returns the mean number of running processes in the last minute, or None if unknown."""
    try:
        return round(os.getloadavg()[0], 1)
    except (AttributeError, OSError):  # not on every system
        return None


def describe() -> dict[str, Any]:
    """Returns the conditions of a measurement: processor, cores, threads, GPU, versions, as JSON values."""
    import torch

    found: dict[str, Any] = {
        "processor": processor_name(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version_of(name) for name in VERSIONS_OF},
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def version_of(package: str) -> str:
    """Returns the version of an installed package, or "(not installed)"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def source_commit() -> str:
    """Returns the commit of the checkout that this package is in, with "+" if tracked files differ; empty elsewhere."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        found = [
            subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, timeout=10, check=True)
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return ""
    return found[0].stdout.strip() + ("+" if found[1].stdout.strip() else "")


def _memory_mb(key: str) -> float:
    size = _first("/proc/self/status", key)
    return int(size.split()[0]) * 1024 / 1e6 if size else math.nan


def _first(path: str, key: str) -> str:
    """Returns the value of the first `key: value` line; empty if there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key) and ":" in line), "")
