"""Section `facts`: the device alone, without Duologue."""

from __future__ import annotations

import torch

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
        source = torch.empty(count, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        record.add("copy", 2e-6 * count / run.median_ms(lambda: target.copy_(source)), "GB/s")
        del source, target
    flop = 2 * size**3
    with record.attempt("product bfloat16"):
        half = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        record.add("product bfloat16", 1e-9 * flop / run.median_ms(lambda: half @ half), "TFLOP/s", size=size)
        whole = half.float()
        for exact in (True, False):
            set_float32_precision(device, exact)
            name = "product float32" if exact else "product TF32"
            record.add(name, 1e-9 * flop / run.median_ms(lambda: whole @ whole, 5, 1), "TFLOP/s", size=size)
        set_float32_precision(device)
        del half, whole
    small = torch.zeros(8, device=device)

    def launches() -> None:
        for _ in range(LAUNCHES):
            small.add_(1)

    with record.attempt("launch"):
        record.add("launch from Python", 1e3 * run.median_ms(launches, 5, 1) / LAUNCHES, "us")
    with record.attempt("launch in a graph"):
        replay, _ = run.graphed(launches)
        record.add("launch in a graph", 1e3 * run.median_ms(replay, 5, 1) / LAUNCHES, "us")
