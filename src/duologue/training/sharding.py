"""Training by several processes: language models are sharded (FSDP2), other models are copies with averaged gradients.

Which of the two a module gets depends on its layers alone, see `repeated_layers`.
"""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

TIMEOUT = timedelta(hours=1)  # the first rank evaluates while the others wait


class RankLost(RuntimeError):
    """A process of a distributed training ended, so the others cannot go on."""


@runtime_checkable
class ShardedStage(Protocol):
    """A stage whose model can be evaluated and saved as a whole beside the sharded one."""

    def use_whole(self, phase: str, module: nn.Module) -> None:
        """Makes evaluation, samples and the final result use this module, a whole copy of a phase's module."""
        ...


def start_distributed(device: str) -> tuple[int, int, str]:
    """Joins the process group when started by torchrun; returns rank, number of processes, and this one's device."""
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda and "LOCAL_RANK" in os.environ:
        device = f"cuda:{int(os.environ['LOCAL_RANK'])}"
        torch.cuda.set_device(device)  # collectives use the current device
    if "WORLD_SIZE" in os.environ and not distributed.is_initialized():
        # gloo beside nccl: checkpoints are written from the CPU while training goes on
        distributed.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=TIMEOUT)
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size(), device
    return 0, 1, device


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Turns the errors of a collective whose peer ended, and SIGTERM from torchrun, into `RankLost`."""
    if not distributed.is_initialized():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise RankLost(_LOST)

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if in_main else None
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "gloo" in str(error) or "onnection closed" in str(error):
            raise RankLost(_LOST) from None
        raise
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


_LOST = (
    "another process of this training ended, or all were told to end. Run the same command again to resume from the "
    "last checkpoint"
)


def repeated_layers(module: nn.Module) -> list[nn.Module]:
    """Returns the layers that are sharded each by itself: those that transformers names in `_no_split_modules`."""
    names: set[str] = set()
    for inner in module.modules():
        names |= set(getattr(inner, "_no_split_modules", None) or ())
    # A sharded layer has a class of its own, derived from the layer's.
    return [inner for inner in module.modules() if any(kind.__name__ in names for kind in type(inner).__mro__)]


def shard(module: nn.Module, device: str, bf16: bool) -> None:
    """Shards a module with repeated layers over all processes, in place: parameters, gradients and optimizer states.

    Args:
        bf16: computes in bfloat16; weights stay as they are and gradients are summed in float32.
    """
    mesh = init_device_mesh(torch.device(device).type, (distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in repeated_layers(module):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)


class WholeCopies:
    """Whole copies of the sharded modules of a stage, on the CPU of the first rank.

    Attributes:
        modules: by phase; empty on other ranks.
    """

    def __init__(self, stage: ShardedStage, phases: Mapping[str, nn.Module], device: str, bf16: bool) -> None:
        self._sharded = {name: module for name, module in phases.items() if repeated_layers(module)}
        self._device = device
        self.modules: dict[str, nn.Module] = {}
        for name, module in self._sharded.items():
            if distributed.get_rank() == 0:
                self.modules[name] = copy.deepcopy(module)
                stage.use_whole(name, self.modules[name])
            shard(module, device, bf16)

    def update(self) -> None:
        """Gathers the trained weights, one at a time. All ranks must call it."""
        for name, module in self._sharded.items():
            whole = dict(self.modules[name].named_parameters()) if name in self.modules else {}
            for key, parameter in module.named_parameters():
                if parameter.requires_grad:
                    value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                    if key in whole:
                        whole[key].data.copy_(value.detach())

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Holds the copies on the device for as long as they are evaluated."""
        for module in self.modules.values():
            module.to(self._device).eval()
        try:
            yield
        finally:
            for module in self.modules.values():
                module.to("cpu")


def average_gradients(module: nn.Module) -> None:
    """Averages the gradients of copies over all processes, in one message for each dtype; sharded ones already are."""
    if not distributed.is_initialized() or isinstance(module, FSDPModule):
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        for gradient, part in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def mean_over_ranks(values: Mapping[str, float], device: str) -> dict[str, float]:
    """Returns the mean of each value over all processes; all give the same names in the same order."""
    if not distributed.is_initialized():
        return dict(values)
    mean = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    distributed.all_reduce(mean)
    return dict(zip(values, (mean / distributed.get_world_size()).tolist(), strict=True))


def agreed(flag: bool, device: str) -> bool:
    """Returns the first rank's flag on all ranks."""
    if not distributed.is_initialized():
        return flag
    shared = torch.tensor(int(flag), device=device)
    distributed.broadcast(shared, 0)
    return bool(shared.item())
