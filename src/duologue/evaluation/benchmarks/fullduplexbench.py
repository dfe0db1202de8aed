"""Full-Duplex-Bench v1.0 (arXiv 2503.04721) and v1.5 (arXiv 2507.23159): sounds that a server hears in real time.

    FOLDER/v1_0/TASK/ID/input.wav      with pause.json, turn_taking.json or interrupt.json [{"timestamp": [s, e]}]
    FOLDER/v1_5/TASK/ID/input.wav      with metadata.json {"timestamps": [s, e]} of the overlap

The results have its layout: `TASK/ID/output.wav`, as long as the input and in step with it, and `output.json`
`{"text", "chunks": [{"text", "timestamp": [s, e]}]}` from the recognizer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAUSE, TURN, INTERRUPTION, BACKCHANNEL, OVERLAP = "pause", "turn", "interruption", "backchannel", "overlap"
# Task -> kind, and the file with the times.
TASKS = {
    "v1_0/candor_pause_handling": (PAUSE, "pause.json"),
    "v1_0/synthetic_pause_handling": (PAUSE, "pause.json"),
    "v1_0/candor_turn_taking": (TURN, "turn_taking.json"),
    "v1_0/icc_backchannel": (BACKCHANNEL, ""),
    "v1_0/synthetic_user_interruption": (INTERRUPTION, "interrupt.json"),
    "v1_5/user_interruption": (OVERLAP, "metadata.json"),
    "v1_5/user_backchannel": (OVERLAP, "metadata.json"),
    "v1_5/talking_to_other": (OVERLAP, "metadata.json"),
    "v1_5/background_speech": (OVERLAP, "metadata.json"),
}


@dataclass(frozen=True)
class DuplexItem:
    """One sound.

    Attributes:
        start, end: seconds of the pause, the turn, the interruption or the overlap; None for a backchannel task.
    """

    id: str
    task: str
    kind: str
    sound: Path
    start: float | None = None
    end: float | None = None


def load(folder: Path) -> list[DuplexItem]:
    """Raises ValueError if there is no task, or a sound lacks its times."""
    items = [
        _item(task, kind, times, path)
        for task, (kind, times) in TASKS.items()
        for path in sorted((folder / task).glob("*/input.wav"))
    ]
    if not items:
        raise ValueError(f"{folder} has no TASK/ID/input.wav of Full-Duplex-Bench; the tasks are {', '.join(TASKS)}")
    return items


def _item(task: str, kind: str, times: str, path: Path) -> DuplexItem:
    key = f"{task}/{path.parent.name}"
    if not times:
        return DuplexItem(key, task, kind, path)
    place = path.parent / times
    try:
        data: Any = json.loads(place.read_text(encoding="utf-8"))
        found = data["timestamps"] if isinstance(data, dict) else data[0]["timestamp"]
        start, end = float(found[0]), float(found[1])
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError(f"{place} has no times of the task") from None
    return DuplexItem(key, task, kind, path, start, end)
