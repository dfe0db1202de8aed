"""Section `decoder`: the released decoder at its published size, eager, in graphs, and compiled."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.language import preset_of, profiled
from benchmarks.gpu.record import Run, Work
from duologue.cuda import CapturedGraphs
from duologue.layers import Padded
from duologue.released.decoder.decoder import ReleasedDecoder, build_released_decoder
from duologue.released.decoder.flow import NUM_STEPS, ReleasedFlow
from duologue.released.decoder.unet import ResnetBlock, TransformerBlock
from duologue.tokenizer.tokenizer import SpeechTokenizer

NUM_BLOCKS = 3
IN_FLOAT32 = ((1, 10), (2, 10), (16, 40))  # rows and tokens of the blocks that are measured in float32 too
COMPILE_S = 20.0  # a compiled variant is left out with less time
MAX_COMPILED = 64  # shapes of one compiled block
Inputs = tuple[Padded, Tensor, Padded, Tensor]


@torch.inference_mode()
def decoder(run: Run) -> None:
    """Measures blocks of a stream, then the solve of the flow alone, and the tokenizer."""
    with run.record.attempt("tokenizer"):
        _tokenizer(run)
    whole = published_decoder(run)
    for dtype in (torch.bfloat16, torch.float32) if run.on_cuda else (torch.float32,):
        whole.flow.estimate_in(dtype)
        for rows in (1, 2) if run.tiny else (1, 4, 16):
            for size in (10,) if run.tiny else (10, 40):
                if dtype is torch.float32 and (rows, size) not in IN_FLOAT32:
                    continue
                whole.flow.graphs = None
                _blocks(run, whole, "eager", rows, size)
                if dtype is torch.bfloat16 or not run.on_cuda:
                    whole.flow.graphs = CapturedGraphs(capture=run.on_cuda)
                    _blocks(run, whole, "graphs", rows, size)
    whole.flow.graphs = None
    inputs = {shape: _inputs(run, whole.flow, *shape) for shape in _shapes(run)}
    exact = {shape: _solve(run, whole.flow, *given) for shape, given in inputs.items()}
    if run.on_cuda:
        whole.flow.estimate_in(torch.bfloat16)
    _solves(run, whole.flow, "solve", inputs, exact)
    if run.on_cuda:
        with run.record.attempt("profile"):
            first = next(iter(inputs.values()))
            kernels, busy_ms = profiled(run, partial(_solve, run, whole.flow, *first))
            run.record.add("kernels of a solve", kernels, "", busy_ms=round(busy_ms, 2))
        torch._dynamo.config.recompile_limit = MAX_COMPILED
        for module in whole.flow.modules():
            if isinstance(module, ResnetBlock | TransformerBlock):
                module.compile(dynamic=False)
        _solves(run, whole.flow, "solve, blocks compiled", inputs, exact, compiled=True)


def published_decoder(run: Run) -> ReleasedDecoder:
    """Returns the decoder of the run, with random weights."""
    preset = preset_of(run)
    torch.manual_seed(0)
    with run.device:
        made = build_released_decoder(preset.flow, preset.vocoder)
    made.vocoder.network.fuse()
    return made.eval().requires_grad_(False)


def _blocks(run: Run, whole: ReleasedDecoder, name: str, rows: int, size: int) -> None:
    """Streams two replies of three blocks: in the first every shape is new."""
    if run.over:
        run.record.add(f"block, {name}", None, reason="no time", rows=rows, tokens=size)
        return
    dtype = str(next(whole.flow.decoder.parameters()).dtype).removeprefix("torch.")
    with run.record.attempt(f"block, {name}, {rows} rows, {size} tokens, {dtype}"):
        flow_ms, vocoder_ms = [], []
        for _ in range(2):
            state = whole.init_state(rows, num_steps(run))
            for _ in range(NUM_BLOCKS):
                codes = torch.randint(whole.codebook_size, (rows, size), device=run.device)
                run.sync()
                start = time.perf_counter()
                mel = whole.flow.step(Padded.full(codes), state.flow)
                run.sync()
                middle = time.perf_counter()
                whole.vocoder.step(mel, state.vocoder)
                run.sync()
                flow_ms.append(1e3 * (middle - start))
                vocoder_ms.append(1e3 * (time.perf_counter() - middle))
        cold = [round(each, 1) for each in flow_ms[:NUM_BLOCKS]]
        details = {"rows": rows, "tokens": size, "dtype": dtype}
        if name == "graphs" and whole.flow.graphs is None:
            raise RuntimeError("the capture failed, see the log")
        run.record.add(f"first block, {name}", flow_ms[NUM_BLOCKS], "ms", **details)
        run.record.add(f"block, {name}", flow_ms[-1], "ms", **details, cold=cold)
        if name == "eager":
            cold = [round(each, 1) for each in vocoder_ms[:NUM_BLOCKS]]
            run.record.add("vocoder", vocoder_ms[-1], "ms", rows=rows, tokens=size, cold=cold)


def _shapes(run: Run) -> tuple[tuple[int, int], ...]:
    """Rows and frames of solves."""
    return ((1, 96),) if run.tiny else ((1, 192), (1, 96), (4, 192), (16, 192), (16, 416))


def num_steps(run: Run) -> int:
    """Returns the number of solver steps."""
    return 2 if run.tiny else NUM_STEPS


def _inputs(run: Run, flow: ReleasedFlow, rows: int, frames: int) -> Inputs:
    """Condition, speaker, prompt of half the frames, and noise."""
    size = flow.config.output_size
    mu, noise = (torch.randn(rows, frames, size, device=run.device) for _ in range(2))
    prompt = torch.randn(rows, frames // 2, size, device=run.device)
    speaker = torch.zeros(rows, flow.config.spk_embed_dim, device=run.device)
    return Padded.full(mu), speaker, Padded.full(prompt), noise


def _solve(run: Run, flow: ReleasedFlow, mu: Padded, speaker: Tensor, prompt: Padded, noise: Tensor) -> Tensor:
    return flow.solve(mu, speaker, prompt, noise, num_steps(run), flow.config.solver.inference_cfg_rate)


def _solves(
    run: Run,
    flow: ReleasedFlow,
    name: str,
    inputs: dict[tuple[int, int], Inputs],
    exact: dict[tuple[int, int], Tensor],
    compiled: bool = False,
) -> None:
    """Measures solves of each shape: eager, in a graph with and without masks, and as streams call it.

    Compiled blocks are measured in a graph with masks alone, because every other way compiles them again.
    """
    for (rows, frames), given in inputs.items():
        mu, speaker, prompt, noise = given
        spread = functional.pad(prompt.values, (0, 0, 0, frames - prompt.values.shape[1]))
        settings = num_steps(run), flow.config.solver.inference_cfg_rate
        integrate = partial(flow._integrate, mu.values, flow.speaker_condition(speaker), spread, noise)
        mask = torch.ones(rows, 1, frames, dtype=torch.bool, device=run.device)
        ways: dict[str, Callable[[], tuple[Work, Tensor]]] = {
            "graph with masks": partial(run.graphed, partial(integrate, mask, *settings))
        }
        if not compiled:
            ways["graph without masks"] = partial(run.graphed, partial(integrate, None, *settings))
            ways["eager"] = partial(_ready, run, flow, None, given)
            ways["as in a stream"] = partial(_ready, run, flow, CapturedGraphs(capture=run.on_cuda), given)
        for way, prepare in ways.items():
            if run.left_s < (COMPILE_S if compiled else 2):
                run.record.add(f"{name}, {way}", None, reason="no time", rows=rows, frames=frames)
                continue
            with run.record.attempt(f"{name}, {way}, {rows} rows, {frames} frames"):
                start = time.perf_counter()
                work, out = prepare()
                work()
                run.sync()
                if way == "as in a stream" and flow.graphs is None:
                    raise RuntimeError("the capture failed, see the log")
                first_s = round(time.perf_counter() - start, 2)
                scale = exact[rows, frames].square().mean().sqrt()
                error = float((out - exact[rows, frames]).square().mean().sqrt() / scale)
                median = run.median_ms(work, 3 if way == "eager" else 10, 1)
                details = {"rows": rows, "frames": frames, "off_float32": float(f"{error:.2g}"), "first_s": first_s}
                run.record.add(f"{name}, {way}", median, "ms", **details)
    flow.graphs = None


def _ready(run: Run, flow: ReleasedFlow, graphs: CapturedGraphs | None, given: Inputs) -> tuple[Work, Tensor]:
    """Returns a solve through the flow's interface and its result."""
    flow.graphs = graphs
    work = partial(_solve, run, flow, *given)
    return work, work()


def _tokenizer(run: Run) -> None:
    """Measures blocks of the tokenizer of the published size; the first reply meets every shape for the first time."""
    with run.device:
        made = SpeechTokenizer(preset_of(run).tokenizer).eval().requires_grad_(False)
    sizes = (16000,) if run.tiny else (32000, 32000, 16000)
    for rows in (1,) if run.tiny else (1, 16):
        times = []
        for _ in range(2):
            state = made.init_state(rows)
            for size in sizes:
                wav = 0.1 * torch.randn(rows, size, device=run.device)
                run.sync()
                start = time.perf_counter()
                made.step(Padded.full(wav), state)
                run.sync()
                times.append(round(1e3 * (time.perf_counter() - start), 2))
            start = time.perf_counter()
            made.flush(state)
            run.sync()
            times.append(round(1e3 * (time.perf_counter() - start), 2))
        half = len(times) // 2
        run.record.add("tokenizer, end of speech", times[-1], "ms", rows=rows, warm=times[half:], cold=times[:half])
