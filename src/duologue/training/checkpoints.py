"""Checkpoints of a training run, in PyTorch's distributed format (DCP): any number of processes may resume them.

    checkpoints/step-0000007/    .metadata, __RANK_N.distcp, state.json {version, step, progress}

A folder that is being written ends in `.part`. The metadata is a pickle, so only a run's own checkpoints are resumed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from duologue.training.sharding import repeated_layers

VERSION = 2
Optimizers = Mapping[str, torch.optim.Optimizer]


class Checkpoints:
    """The checkpoints of one run, of which the newest complete one is kept.

    Args:
        in_background: writes while training goes on, from a copy on the CPU.
    """

    def __init__(self, folder: Path, phases: Mapping[str, nn.Module], optimizers: Optimizers, in_background: bool):
        self._folder, self._phases, self._optimizers = folder, phases, optimizers
        self._in_background = in_background
        self._is_first = not distributed.is_initialized() or distributed.get_rank() == 0
        # Another thread than the training's needs a group of its own.
        apart = in_background and distributed.is_initialized()
        self._group = distributed.new_group(backend="gloo") if apart else None
        self._running: tuple[Future[Any], Path, dict[str, Any]] | None = None

    def save(self, step: int, progress: float) -> None:
        """Writes a checkpoint. All ranks must call it."""
        self.finish()
        part = self._folder / f"step-{step:07d}.part"
        if self._is_first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        state = {"version": VERSION, "step": step, "progress": progress}
        tensors = self._weights() | self._moments()
        if self._in_background:
            future: Any = async_save(
                tensors, checkpoint_id=part, process_group=self._group, no_dist=not distributed.is_initialized()
            )
            self._running = (future, part, state)
        else:
            save_state_dict(tensors, checkpoint_id=part, no_dist=not distributed.is_initialized())
            self._complete(part, state)

    def finish(self) -> None:
        """Waits for the checkpoint that is being written."""
        if self._running is not None:
            future, part, state = self._running
            self._running = None
            future.result()
            self._complete(part, state)

    def resume(self) -> tuple[int, float]:
        """Loads the newest checkpoint; returns its step and share of the training, or 0 when there is none.

        Raises:
            ValueError: it is of another version, or lacks a weight.
        """
        found = sorted(self._folder.glob("step-???????"))
        if not found:
            return 0, 0.0
        state = json.loads((found[-1] / "state.json").read_text())
        if state.get("version") != VERSION:
            raise ValueError(
                f"{found[-1]} is of version {state.get('version')!r}; this release resumes version {VERSION}. Give "
                "another --out, or remove it"
            )
        stored = FileSystemReader(found[-1]).read_metadata().state_dict_metadata
        wanted = self._weights()
        if missing := [key for key in wanted if key not in stored]:
            raise ValueError(f"{found[-1]} has no {missing[0]}, which this training needs")
        parameters = {_moment(phase, "", name): p for phase, name, p in self._parameters()}
        moments: dict[str, Tensor] = {}
        for key, about in stored.items():
            if not key.startswith("optimizer/") or not isinstance(about, TensorStorageMetadata):
                continue
            _, phase, field, name = key.split("/", 3)
            parameter = parameters[_moment(phase, "", name)]
            alike = tuple(about.size) == tuple(parameter.shape)
            moments[key] = (
                torch.zeros_like(parameter) if alike else torch.zeros(about.size, dtype=about.properties.dtype)
            )
        load_state_dict({**wanted, **moments}, checkpoint_id=found[-1], no_dist=not distributed.is_initialized())
        for key, value in moments.items():
            _, phase, field, name = key.split("/", 3)
            self._optimizers[phase].state[parameters[_moment(phase, "", name)]][field] = value.detach()
        return int(state["step"]), float(state["progress"])

    def _complete(self, part: Path, state: Mapping[str, Any]) -> None:
        """Names a written checkpoint and removes the older one."""
        if not self._is_first:
            return
        (part / "state.json").write_text(json.dumps(state))
        finished = part.with_suffix("")
        shutil.rmtree(finished, ignore_errors=True)
        part.rename(finished)
        for old in sorted(self._folder.glob("step-???????"))[:-1]:
            shutil.rmtree(old)

    def _weights(self) -> dict[str, Tensor]:
        """All weights by phase and name, each once. Frozen weights of a language model come from its start."""
        tensors: dict[str, Tensor] = {}
        for phase, module in self._phases.items():
            skips_frozen = bool(repeated_layers(module))
            seen: set[int] = set()
            for name, value in module.state_dict(keep_vars=True).items():
                frozen = isinstance(value, nn.Parameter) and not value.requires_grad
                if isinstance(value, Tensor) and id(value) not in seen and not (skips_frozen and frozen):
                    seen.add(id(value))
                    tensors[f"weights/{phase}/{name}"] = value.detach()
        return tensors

    def _parameters(self) -> list[tuple[str, str, nn.Parameter]]:
        return [(phase, name, p) for phase, module in self._phases.items() for name, p in module.named_parameters()]

    def _moments(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for phase, name, parameter in self._parameters():
            for field, value in self._optimizers[phase].state.get(parameter, {}).items():
                tensors[_moment(phase, field, name)] = value
        return tensors


def _moment(phase: str, field: str, name: str) -> str:
    return f"optimizer/{phase}/{field}/{name}"
