"""What a run was made of: `run.json` in its folder, one entry for each start."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from duologue import machine
from duologue.config import read_json, write_json

RUN_FILE = "run.json"
RECIPE_FILE = "recipe.json"
MAX_READ_BYTES = 2**20  # larger files count by name and size


def record_start(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Adds a start to `run.json`: time, command, commit, versions, machine, hashes of the recipe's data."""
    path = folder / RUN_FILE
    starts = list(read_json(path)["starts"]) if path.exists() else []
    starts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": sys.argv,
            "commit": machine.source_commit(),
            "machine": machine.describe(),
            "data": {key: data_hash(place) for key, place in _places(recipe)},
        }
    )
    write_json(path, {"starts": starts})


def data_hash(place: str | Path) -> str:
    """Returns the SHA-256 (hex) over names, sizes and small contents of a file or of all files below a folder.

    Sound and weights count by their size: reading a corpus of hours takes minutes.
    """
    place = Path(place)
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    whole = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        content = hashlib.sha256(path.read_bytes()).hexdigest() if size <= MAX_READ_BYTES else ""
        whole.update(f"{path.relative_to(place.parent).as_posix()} {size} {content}\n".encode())
    return whole.hexdigest()


def _places(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Keys and paths of a recipe that exist as files or folders."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _places(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _places(inner, f"{key}[{number}]")
    elif isinstance(value, str) and "/" in value and Path(value).exists():
        yield key, value
