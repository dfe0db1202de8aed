"""Section `streams`: steps of the language model while another thread decodes."""

from __future__ import annotations

import threading
import time

import numpy as np
import torch

from benchmarks.gpu.decoder import num_steps, published_decoder
from benchmarks.gpu.record import Run, Work
from benchmarks.gpu.slots import Slots
from duologue.cuda import CapturedGraphs, new_stream, on_stream
from duologue.layers import Padded
from duologue.released.decoder.decoder import ReleasedDecoder

NUM_KEPT = 64
IN_EAGER = ("one stream", "two streams")  # measured without graphs of the decoder too


@torch.inference_mode()
def streams(run: Run) -> None:
    """Measures the captured step of one row alone, and beside decoding on the same stream and on others."""
    slots = Slots(run.models["language"], 1, 128, flash=False)
    device = run.device
    ids, place = torch.full((1,), 7, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    position = torch.full((1,), NUM_KEPT, device=device)
    whole = published_decoder(run)
    if run.on_cuda:
        whole.flow.estimate_in(torch.bfloat16)
    replay, _ = run.graphed(lambda: slots.step(ids, position, place, 128))
    ways = {
        "alone": (None, None),
        "one stream": (None, None),
        "a stream for the decoder": (None, new_stream(device)),
        "two streams": (new_stream(device), new_stream(device)),
        "two streams, the model first": (new_stream(device, -1), new_stream(device)),
    }
    for graphs in (True, False):
        whole.flow.graphs = CapturedGraphs(capture=run.on_cuda) if graphs else None
        _reply(run, whole, 1 if run.tiny else 3)  # captures, and meets every shape
        for name, (own, decoding) in ways.items():
            if run.over or (not graphs and name not in IN_EAGER):
                continue
            run.sync()  # new streams do not wait for earlier work
            stop, blocks = threading.Event(), [0]
            thread = threading.Thread(target=_decode_until, args=(run, whole, decoding, stop, blocks))
            if name != "alone":
                thread.start()
            with run.record.attempt(name):
                times = _steps(run, own, replay)
                stop.set()
                p50, p95 = np.percentile(times, [50, 95])
                run.record.add(
                    f"step, {name}",
                    float(p50),
                    "ms",
                    p95=round(float(p95), 2),
                    decoder_in_graphs=graphs,
                    blocks=blocks[0],
                )
            stop.set()
            if thread.ident is not None:
                thread.join()


def _steps(run: Run, stream: torch.cuda.Stream | None, replay: Work) -> list[float]:
    """Milliseconds of single steps, each waited for on its own stream."""
    times = []
    with on_stream(stream):
        for _ in range(3 if run.tiny else 60):
            start = time.perf_counter()
            replay()
            if run.on_cuda:
                torch.cuda.current_stream(run.device).synchronize()
            times.append(1e3 * (time.perf_counter() - start))
    return times


@torch.inference_mode()
def _decode_until(
    run: Run, whole: ReleasedDecoder, stream: torch.cuda.Stream | None, stop: threading.Event, blocks: list[int]
) -> None:
    with on_stream(stream):
        while not stop.is_set():
            blocks[0] += _reply(run, whole, 1 if run.tiny else 4)


def _reply(run: Run, whole: ReleasedDecoder, num_blocks: int) -> int:
    """Decodes blocks of 10 tokens of one reply, each to the CPU, as the worker does."""
    state = whole.init_state(1, num_steps(run))
    for _ in range(num_blocks):
        codes = torch.randint(whole.codebook_size, (1, 10), device=run.device)
        whole.step(Padded.full(codes), state).values.cpu()
    return num_blocks
