"""Tokens per second and model FLOPs utilization (MFU, arXiv:2204.02311) of a training."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

Batch = dict[str, Tensor]

# Dense bfloat16 FLOP/s by a part of the device's name, from the vendors' data sheets.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}


@dataclass(frozen=True)
class Work:
    """What one batch costs: its ids, and the FLOPs of forward and backward pass without recomputation."""

    tokens: int
    flops: float


@runtime_checkable
class MeasuredStage(Protocol):
    """A stage that knows the work of a batch."""

    def work(self, batch: Batch) -> Work: ...


class Throughput:
    """Adds up work between two readings.

    Args:
        peak_flops: FLOP/s of all devices together; None where it is unknown, and there is no MFU.
    """

    def __init__(self, peak_flops: float | None) -> None:
        self._peak = peak_flops
        self._start, self._tokens, self._flops = time.perf_counter(), 0, 0.0

    def add(self, work: Work, num_ranks: int = 1) -> None:
        self._tokens += work.tokens * num_ranks
        self._flops += work.flops * num_ranks

    def read(self) -> dict[str, float]:
        """Returns `tokens_per_s` and `mfu` since the last reading; nothing without work."""
        now = time.perf_counter()
        seconds, tokens, flops = max(now - self._start, 1e-9), self._tokens, self._flops
        self._start, self._tokens, self._flops = now, 0, 0.0
        if not tokens:
            return {}
        values = {"tokens_per_s": tokens / seconds}
        return values if self._peak is None else {**values, "mfu": flops / seconds / self._peak}


def peak_flops(device: str) -> float | None:
    """Returns the dense bfloat16 FLOP/s of a device; None for a CPU and for unknown devices."""
    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def language_work(model: PreTrainedModel, batch: Batch) -> Work:
    """Returns the work of a packed batch.

    A product costs 2 FLOPs a value forward, 2 for its input's gradient, and 2 for its weight's if that is trained.
    """
    ids = batch["input_ids"].numel()
    layers = frozen = 0
    for name, parameter in model.base_model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            layers += parameter.numel()
            frozen += 0 if parameter.requires_grad else parameter.numel()
    config = model.config.get_text_config()
    head = config.vocab_size * config.hidden_size * int((batch["trains"] > 0).sum())
    pairs = int((batch["position_ids"] + 1).sum())  # of a query and a key
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    attention = 12 * config.num_hidden_layers * width * pairs
    return Work(ids, (6 * layers - 2 * frozen) * ids + 6 * head + attention)
