"""The loop under every training stage: step, log, evaluate, sample, save, resume.

A batch is a pure function of its index, and the random generator is seeded from the index before each use. A resumed
run therefore needs only weights, optimizer and step to equal an uninterrupted one.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from duologue.cuda import set_float32_precision
from duologue.training.averaging import WeightAverage
from duologue.training.checkpoints import Checkpoints
from duologue.training.log import RunLog, check_wandb
from duologue.training.optimizers import MuonAdamW
from duologue.training.sharding import (
    ShardedStage,
    WholeCopies,
    agreed,
    average_gradients,
    lost_ranks,
    mean_over_ranks,
    repeated_layers,
    start_distributed,
)
from duologue.training.throughput import MeasuredStage, Throughput, peak_flops

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class LoopConfig:
    """Settings of the loop, the same for every stage.

    Attributes:
        num_steps: total optimizer steps; the schedule ends there.
        minutes: trains for this time instead of `num_steps`, and the schedule follows the clock. A resumed run has the
            rest of the time. For a machine whose speed is unknown; such a run cannot be repeated exactly.
        schedule: decay of the learning rate after the warm-up, down to `learning_rate * min_lr_ratio`.
        accumulate: batches per optimizer step and process.
        optimizer: adamw, or muon for the matrices of the layers of a language model and adamw for the rest, see
            `optimizers.MuonAdamW`.
        precision: of the computation; weights stay in their own dtype.
        average_decay: share of the moving average of the weights that a step keeps, such as 0.998; 0 for no average.
            Evaluations, samples and `final` then have the average.
        average_from: share of the training after which the average begins. A training from nothing leaves its beginning
            out; one from a trained model takes it in.
        num_workers: processes that prepare batches; 0 for one thread of this process.
        evaluate_first: whether to evaluate before the first step as well.
        checkpoint_every_s: seconds between checkpoints.
        wandb_project: project of Weights & Biases that also gets the log; needs the package wandb. Empty for none.
    """

    num_steps: int
    learning_rate: float
    minutes: float | None = None
    seed: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 100
    min_lr_ratio: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    optimizer: Literal["adamw", "muon"] = "adamw"
    accumulate: int = 1
    average_decay: float = 0.0
    average_from: float = 0.0
    num_workers: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    log_every: int = 10
    evaluate_every: int = 500
    evaluate_first: bool = False
    sample_every: int = 1000
    checkpoint_every_s: float = 600.0
    max_shard_bytes: int = 2**31
    wandb_project: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay is {self.average_decay}; it must be from 0 to below 1")

    def lr_at(self, step: int, progress: float) -> float:
        """Learning rate of optimizer step `step`, counted from 0, at a share `progress` of the training."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.minutes is None:
            progress = (step - self.warmup_steps) / max(self.num_steps - self.warmup_steps, 1)
        done = min(progress, 1.0)
        fall = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[self.schedule]
        return self.learning_rate * (self.min_lr_ratio + (1 - self.min_lr_ratio) * fall)


class TrainingStage(Protocol):
    """The interface of a training stage to the loop.

    Attributes:
        phases: what is optimized, one optimizer each, in order (a GAN has two).
        weights: weights of the losses, by name.
    """

    phases: Mapping[str, nn.Module]
    weights: Mapping[str, float]

    def batch(self, index: int) -> Batch:
        """The batch with this index, on the CPU; a pure function of the index."""
        ...

    def losses(self, phase: str, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Named scalar losses of one phase at a share `progress` of the training; empty when the phase is idle."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Measures on held-out data."""
        ...

    def sample(self, folder: Path) -> None:
        """Writes something to listen to or look at."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the finished component."""
        ...


class _Progress:
    """The share of the training that is done, by steps or by the clock.

    Ranks agree on it: the first one's clock counts.
    """

    def __init__(self, config: LoopConfig, done: float) -> None:
        self._config, self._done, self._start = config, done, time.monotonic()

    def at(self, step: int) -> float:
        """The share done before optimizer step `step`."""
        if self._config.minutes is None:
            return min(step / self._config.num_steps, 1.0)
        share = self._done + (time.monotonic() - self._start) / (60.0 * self._config.minutes)
        if distributed.is_initialized():
            shared = [share]
            distributed.broadcast_object_list(shared)
            share = shared[0]
        return min(share, 1.0)


class NonFiniteLoss(RuntimeError):
    """Training stopped before an optimizer step, because a loss is not a number."""


@runtime_checkable
class PreparedStage(Protocol):
    """A stage that changes its modules for the device before they go there."""

    def prepare(self, device: str) -> None: ...


def run(stage: TrainingStage, config: LoopConfig, out: Path, device: str = "cpu") -> dict[str, float]:
    """Trains until `config.num_steps`, resuming from the newest checkpoint under `out`; returns the last evaluation.

    Under torchrun all processes train together, see `sharding.py`.

    Args:
        device: "cuda" under torchrun is the device of the local rank. What is not in bfloat16 is in TF32 there.

    Raises:
        NonFiniteLoss: a loss is not a number.
        RankLost: another process ended.
        ValueError: `wandb_project` is given and wandb is not installed.
    """
    check_wandb(config.wandb_project)
    rank, world, device = start_distributed(device)
    with lost_ranks():
        return _run(stage, config, out, device, rank, world)


def _run(stage: TrainingStage, config: LoopConfig, out: Path, device: str, rank: int, world: int) -> dict[str, float]:
    set_float32_precision(device, exact=False)
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(stage, PreparedStage):
        stage.prepare(device)
    whole = None
    if world > 1 and isinstance(stage, ShardedStage):
        whole = WholeCopies(stage, stage.phases, device, config.precision == "bf16")
    for module in stage.phases.values():
        module.to(device).train()
    optimizers = {name: make_optimizer(module, config) for name, module in stage.phases.items()}
    average = WeightAverage(optimizers, config.average_decay, config.average_from)
    on_cuda = torch.device(device).type == "cuda"
    checkpoints = Checkpoints(out / "checkpoints", stage.phases, optimizers, in_background=on_cuda)
    step, done = checkpoints.resume()
    progress = _Progress(config, done)
    log = RunLog(out, step, config.wandb_project) if rank == 0 else None
    saved_at = time.monotonic()
    metrics: dict[str, float] = {}
    total = config.num_steps if config.minutes is None else None
    bar = tqdm(total=total, initial=step, desc=out.name, disable=rank > 0, mininterval=5.0, smoothing=0.05)
    batches = _prefetch(stage, config, step, rank, world, device)
    if step == 0 and config.evaluate_first:
        _evaluate(stage, out.name, step, log, whole, average)
    peak = peak_flops(device)
    throughput = Throughput(None if peak is None else peak * world)
    try:
        while (done := progress.at(step)) < 1.0:
            values: dict[str, float] = {}
            micro = [next(batches) for _ in range(config.accumulate)]
            for phase, module in stage.phases.items():
                values |= optimize(stage, phase, module, optimizers[phase], micro, step, done, config, device)
            average.update(done)
            if isinstance(stage, MeasuredStage):
                for _, batch in micro:
                    throughput.add(stage.work(batch), world)
            step += 1
            is_last = progress.at(step) >= 1.0
            bar.update()
            if log and (step % config.log_every == 0 or step == 1):
                values |= throughput.read()
                bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)
                log.write(step, values)
            evaluates = step % config.evaluate_every == 0 or is_last
            if evaluates:
                metrics = _evaluate(stage, out.name, step, log, whole, average)
            if step % config.sample_every == 0 or is_last:
                samples = out / "samples" / f"step-{step:07d}"
                _sample(stage, samples, rank, whole, average, update=not evaluates)
                if log:
                    log.add_sounds(step, samples)
            if agreed(time.monotonic() - saved_at > config.checkpoint_every_s, device) or is_last:
                checkpoints.save(step, progress.at(step))
                saved_at = time.monotonic()
    finally:
        checkpoints.finish()
    bar.close()
    if log:
        with average.applied():
            stage.save(out / "final")
        log.close()
    if distributed.is_initialized():
        distributed.barrier()  # torchrun ends all processes when one has left
    return metrics


def optimize(
    stage: TrainingStage,
    phase: str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro: list[tuple[int, Batch]],
    step: int,
    progress: float,
    config: LoopConfig,
    device: str,
) -> dict[str, float]:
    """One optimizer step of one phase; returns the losses, averaged over its batches."""
    for group in optimizer.param_groups:
        group["lr"] = config.lr_at(step, progress)
    optimizer.zero_grad(set_to_none=True)
    computed: list[dict[str, Tensor]] = []
    for index, batch in micro:
        torch.manual_seed(hash((config.seed, index)) % 2**63)
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=config.precision == "bf16"):
            losses = stage.losses(phase, batch, progress)
        if not losses:  # an idle phase
            return {}
        total = torch.stack([loss.float() * stage.weights[name] for name, loss in losses.items()]).sum()
        (total / len(micro)).backward()
        computed.append({name: loss.detach() for name, loss in losses.items()})
    average_gradients(module)
    # Losses are read after all work is queued: reading them earlier would let the device wait for the host.
    values: dict[str, float] = {}
    fault = ""
    for (index, _), losses in zip(micro, computed, strict=True):
        read = {name: float(loss) for name, loss in losses.items()}
        if not all(math.isfinite(value) for value in read.values()):
            fault = f"batch {index}: " + ", ".join(f"{name} = {value}" for name, value in read.items())
            break
        for name, value in read.items():
            values[name] = values.get(name, 0.0) + value / len(micro)
    # A mean over ranks, so that all stop when one has a fault.
    values = mean_over_ranks({name: math.nan if fault else values[name] for name in computed[0]}, device)
    if not all(math.isfinite(value) for value in values.values()):
        raise NonFiniteLoss(
            f"step {step + 1}, {fault or 'a batch of another process: a loss is not a number'}; no weight was changed "
            "by this step. Lower learning_rate or look at the batch, then run again"
        )
    norm = nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    values["grad_norm" if len(stage.phases) == 1 else f"grad_norm/{phase}"] = float(norm)
    optimizer.step()
    return values


def _evaluate(
    stage: TrainingStage, name: str, step: int, log: RunLog | None, whole: WholeCopies | None, average: WeightAverage
) -> dict[str, float]:
    """Evaluates on the first rank; the others take part in gathering the weights and return nothing."""
    with average.applied():
        if whole is not None:
            whole.update()
        if log is None:
            return {}
        metrics: dict[str, float] = _quiet(stage, stage.evaluate, whole)
    shown = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items())
    tqdm.write(f"{name} step {step}: {shown}", file=sys.stderr)
    log.write(step, {f"valid/{key}": value for key, value in metrics.items()})
    return metrics


def _sample(
    stage: TrainingStage, folder: Path, rank: int, whole: WholeCopies | None, average: WeightAverage, update: bool
) -> None:
    with average.applied():
        if whole is not None and update:
            whole.update()
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _quiet(stage, lambda: stage.sample(folder), whole)


def _quiet(stage: TrainingStage, work: Any, whole: WholeCopies | None) -> Any:
    """Runs work in evaluation mode without gradients, then restores training mode."""
    for module in stage.phases.values():
        module.eval()
    with torch.no_grad(), nullcontext() if whole is None else whole.on_device():
        result = work()
    for module in stage.phases.values():
        module.train()
    return result


class _Batches(Dataset[tuple[int, Batch]]):
    """All batches of a stage by their index."""

    def __init__(self, stage: TrainingStage) -> None:
        self._stage = stage

    def __getitem__(self, index: int) -> tuple[int, Batch]:
        return index, self._stage.batch(index)


def _prefetch(
    stage: TrainingStage, config: LoopConfig, step: int, rank: int, world: int, device: str
) -> Iterator[tuple[int, Batch]]:
    """Batches with their indices; the next ones are prepared while one is in use."""
    # A run by the clock has no last batch; a sampler needs one all the same.
    num_steps = config.num_steps if config.minutes is None else 2**40
    indices = range(step * config.accumulate * world + rank, num_steps * config.accumulate * world, world)
    if config.num_workers:
        # Workers are forked, so that they share the corpus; batches are made on the CPU and never touch the device.
        yield from DataLoader(
            _Batches(stage),
            batch_size=None,
            sampler=indices,
            num_workers=config.num_workers,
            pin_memory=torch.device(device).type == "cuda",
            multiprocessing_context="fork",
        )
        return
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(stage.batch, indices[0]) if indices else None
        for index in indices:
            assert coming is not None
            batch = coming.result()
            coming = pool.submit(stage.batch, index + world)
            yield index, batch


def make_optimizer(module: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    """Returns the optimizer of a module's trained parameters; weights without a second dimension do not decay.

    Raises:
        ValueError: Muon, and the module has no trained matrices in repeated layers.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices: list[nn.Parameter] = []
    if config.optimizer == "muon":
        matrices = [
            p for layer in repeated_layers(module) for p in layer.parameters() if p.requires_grad and p.dim() == 2
        ]
        if not matrices:
            raise ValueError("optimizer: muon needs the layers of a language model; this stage trains with adamw")
    taken = set(map(id, matrices))
    groups = [
        {"params": [p for p in parameters if p.dim() > 1 and id(p) not in taken], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if matrices:
        return MuonAdamW(matrices, groups, config.learning_rate, config.weight_decay, config.betas)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
