"""What the system tells about the machine: processor, cores, memory, versions. Knows Linux; elsewhere it tells less."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

VERSIONS_OF = ("duologue", "numpy", "torch", "transformers")


def processor_name() -> str:
    """Model name of the processor."""
    return _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def processor_flags() -> set[str]:
    """Instruction sets by the names that Linux gives them; empty elsewhere."""
    return set(_first("/proc/cpuinfo", "flags").split())


def num_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def free_memory_gb() -> float | None:
    """Memory that is available without swapping, in 10^9 bytes; None where the system does not tell."""
    available = _first("/proc/meminfo", "MemAvailable")
    return int(available.split()[0]) * 1024 / 1e9 if available else None


def describe() -> dict[str, Any]:
    """What a figure depends on: processor, cores, threads, GPU and versions, as plain JSON values."""
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
    """The version of an installed package, or that it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _first(path: str, key: str) -> str:
    """What stands behind the colon of the first line that begins with `key`; empty when there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key) and ":" in line), "")
