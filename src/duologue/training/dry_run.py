"""What a run would cost, from a few steps of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from duologue.machine import peak_resident_mb
from duologue.training.loop import LoopConfig, PreparedStage, TrainingStage, make_optimizer, optimize

DRY_STEPS = 3


@dataclass(frozen=True)
class RunCost:
    """The cost of a run.

    Attributes:
        num_parameters, num_trained: of all modules that the optimizer sees, and of these the trained ones.
        weights_gb, optimizer_gb: 10^9 bytes of weights; of gradients and optimizer state.
        peak_gb: highest memory of the steps: of the device on CUDA, of the process on a CPU.
        step_s: seconds of a step.
        num_steps, hours: of the whole run; without evaluations and samples.
    """

    num_parameters: int
    num_trained: int
    weights_gb: float
    optimizer_gb: float
    peak_gb: float
    step_s: float
    num_steps: int
    hours: float


def dry_run(stage: TrainingStage, config: LoopConfig, device: str = "cpu") -> RunCost:
    """Makes `DRY_STEPS` steps, of which the first is not timed, and writes nothing."""
    if isinstance(stage, PreparedStage):
        stage.prepare(device)
    for module in stage.phases.values():
        module.to(device).train()
    optimizers = {name: make_optimizer(module, config) for name, module in stage.phases.items()}
    on_cuda = torch.device(device).type == "cuda"
    spent: list[float] = []
    for step in range(DRY_STEPS):
        begin = time.monotonic()
        indices = range(step * config.accumulate, (step + 1) * config.accumulate)
        micro = [(index, stage.batch(index)) for index in indices]
        for phase, module in stage.phases.items():
            optimize(stage, phase, module, optimizers[phase], micro, step, 0.5, config, device)
        if on_cuda:
            torch.cuda.synchronize()
        spent.append(time.monotonic() - begin)
    parameters = {id(one): one for module in stage.phases.values() for one in module.parameters()}.values()
    trained = [one for one in parameters if one.requires_grad]
    step_s = min(spent[1:])
    num_steps = config.num_steps if config.minutes is None else int(config.minutes * 60.0 / step_s)
    return RunCost(
        sum(one.numel() for one in parameters),
        sum(one.numel() for one in trained),
        sum(one.nbytes for one in parameters) / 1e9,
        sum(3 * one.nbytes for one in trained) / 1e9,  # a gradient and two moments
        (torch.cuda.max_memory_allocated() if on_cuda else peak_resident_mb() * 1e6) / 1e9,
        step_s,
        num_steps,
        num_steps * step_s / 3600.0,
    )
