"""The log of a training run: `log.csv`, TensorBoard where it is installed, Weights & Biases where it is asked for."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from duologue.config import read_json
from duologue.sound_files import load_audio
from duologue.training.curves import LOG_FILE
from duologue.training.tracking import RECIPE_FILE


def check_wandb(project: str) -> None:
    """Raises ValueError if a project of Weights & Biases is named and its library is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ValueError("loop.wandb_project needs wandb, which is not installed: pip install wandb")


class RunLog:
    """Writes the values of a run, those before `step` kept.

    Args:
        out: folder of the run.
        step: last step of the checkpoint that the run resumes from; 0 for a new run.
        wandb_project: project of Weights & Biases, which also gets the recipe in `out`; empty for none.
    """

    def __init__(self, out: Path, step: int, wandb_project: str = "") -> None:
        path = out / LOG_FILE
        kept = [row for row in _rows(path) if int(row["step"]) <= step]
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, ["step", "name", "value", "time"])
        self._writer.writeheader()
        self._writer.writerows(kept)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._board = None
        else:
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step)
        self._wandb: Any = None
        if wandb_project:
            import wandb

            key = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]  # a resumed run goes on there
            recipe = read_json(out / RECIPE_FILE) if (out / RECIPE_FILE).exists() else {}
            self._wandb = wandb.init(
                project=wandb_project, name=out.name, id=key, resume="allow", dir=str(out), config=recipe
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes named values of one step."""
        now = round(time.time(), 1)
        for name, value in values.items():
            self._writer.writerow({"step": step, "name": name, "value": f"{value:.6g}", "time": now})
            if self._board:
                self._board.add_scalar(name, value, step)
        self._file.flush()
        if self._wandb:
            self._wandb.log(dict(values), step=step)

    def add_sounds(self, step: int, folder: Path) -> None:
        """Adds the sound files of a folder of samples to TensorBoard and Weights & Biases."""
        for path in sorted((*folder.rglob("*.wav"), *folder.rglob("*.flac"))):
            wav, sample_rate = load_audio(path)
            name = f"samples/{path.relative_to(folder).with_suffix('').as_posix()}"
            if self._board:
                self._board.add_audio(name, torch.from_numpy(wav)[None], step, sample_rate)
            if self._wandb:
                import wandb

                self._wandb.log({name: wandb.Audio(wav, sample_rate)}, step=step)

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
