"""Section `facts`: the device alone, without Duologue."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.record import Run
from duologue import machine
from duologue.cuda import set_float32_precision

COPY_BYTES = 2**31
MATRIX = 8192
LAUNCHES = 1000


@torch.inference_mode()
def facts(run: Run) -> None:
    """Measures bandwidth, matrix products and launches."""
    record, device = run.record, run.device
    for name, value in machine.describe().items():
        record.add(name, value)
    record.add("flash attention schema", str(torch.ops.aten._flash_attention_forward.default._schema))
    if run.on_cuda:
        total = torch.cuda.get_device_properties(device).total_memory
        record.add("memory", total / 1e9, "GB", capability=str(torch.cuda.get_device_capability(device)))
    size, count = (256, COPY_BYTES // 2**10) if run.tiny else (MATRIX, COPY_BYTES)
    with record.attempt("copy"):
        source = torch.zeros(count, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        record.add("copy", 2e-6 * count / run.median_ms(partial(target.copy_, source)), "GB/s")
    with record.attempt("product"):
        _products(run, size)
    small = torch.zeros(8, device=device)

    def launches() -> None:
        for _ in range(LAUNCHES):
            small.add_(1)

    with record.attempt("launch"):
        record.add("launch from Python", 1e3 * run.median_ms(launches, 5, 1) / LAUNCHES, "us")
    with record.attempt("launch in a graph"):
        replay, _ = run.graphed(launches)
        record.add("launch in a graph", 1e3 * run.median_ms(replay, 5, 1) / LAUNCHES, "us")


def _products(run: Run, size: int) -> None:
    """Measures the product of two square matrices in each precision."""
    flop = 2 * size**3

    def measure(name: str, x: Tensor, repetitions: int) -> None:
        speed = 1e-9 * flop / run.median_ms(lambda: x @ x, repetitions, 1)
        run.record.add(name, speed, "TFLOP/s", size=size)

    half = torch.randn(size, size, device=run.device, dtype=torch.bfloat16)
    measure("product bfloat16", half, 20)
    for exact in (True, False):
        set_float32_precision(run.device, exact)
        measure("product float32" if exact else "product TF32", half.float(), 5)
    set_float32_precision(run.device)
