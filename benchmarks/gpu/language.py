"""Sections `model` and `engine`: a language model of the published size, random, and steps of the engine."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.record import Run
from duologue.interleave import INTERLEAVED, SPEECH_ONLY, Kind
from duologue.language.drawing import DrawMasks, DrawRow, DrawState, rows_of
from duologue.language.drawing import draw as draw_ids
from duologue.language.engine import PlainEngine
from duologue.language.graphs import GraphStepper
from duologue.language.sampling import GREEDY, Sampling
from duologue.language.stepping import EagerStepper, StepRow
from duologue.released import random_weights
from duologue.released.language import read_config
from duologue.released.random_weights import PRESETS, Preset
from duologue.released.text import load_released_vocabulary
from duologue.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import GlmForCausalLM

PREFILL_CHUNK = 256
PROFILED_STEPS = 2


def model(run: Run) -> None:
    """Makes vocabulary and language model in memory; nothing but the vocabulary touches the disk."""
    preset = preset_of(run)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(random_weights, "write_random"):
        place = Path(folder) / "language"
        random_weights.write_random_language(place, preset.language)
        vocabulary, config = load_released_vocabulary(place), read_config(place)
    run.record.add("vocabulary", time.perf_counter() - start, "s", ids=vocabulary.size)
    start = time.perf_counter()
    from transformers import GlmForCausalLM

    with torch.device("meta"):
        made = GlmForCausalLM(config)
    made = made.to(torch.bfloat16 if run.on_cuda else torch.float32).to_empty(device=run.device)
    made.eval().requires_grad_(False)
    made.model.rotary_emb = type(made.model.rotary_emb)(config).to(run.device)
    torch.manual_seed(0)
    for name, weight in made.named_parameters():
        if name.endswith("norm.weight"):
            weight.fill_(1.0)
        elif weight.dim() < 2:
            weight.zero_()
        else:
            weight.normal_(0.0, 0.2 if "embed" in name else weight.shape[1] ** -0.5)
    run.sync()
    run.models["language"], run.models["vocabulary"] = made, vocabulary
    num_parameters = sum(weight.numel() for weight in made.parameters())
    run.record.add("weights", time.perf_counter() - start, "s", parameters=num_parameters)
    if run.on_cuda:
        run.record.add("memory", torch.cuda.memory_allocated(run.device) / 1e9, "GB")


def preset_of(run: Run) -> Preset:
    """Returns the sizes of the run."""
    return PRESETS["tiny" if run.tiny else "9b"]()


def step_gb(language: GlmForCausalLM) -> float:
    """Returns 10^9 bytes of weights that one step reads: all but the embedding table."""
    total: int = sum(weight.numel() * weight.element_size() for weight in language.parameters())
    table: Tensor = language.model.embed_tokens.weight
    return (total - table.numel() * table.element_size()) / 1e9


@torch.inference_mode()
def engine(run: Run) -> None:
    """Measures the engine's model step, prefill and draw, whole replies, and what a step launches."""
    with run.record.attempt("step"):
        _steps(run)
    with run.record.attempt("prefill"):
        _prefill(run)
    with run.record.attempt("draw"):
        _draws(run)
    with run.record.attempt("replies"):
        _replies(run)
    if run.on_cuda:
        for rows in (1, 16):
            with run.record.attempt(f"profile, {rows} rows"):
                _profile(run, rows)


def draw_row(vocabulary: Vocabulary, masks: DrawMasks, kind: Kind) -> DrawRow:
    """Returns the draw of one more id of a reply: its first id of text, or an id of its first run of speech."""
    state = DrawState(Sampling(temperature=0.8, seed=1), INTERLEAVED)
    row = state.row(masks)
    for _ in range(INTERLEAVED.text_run if kind is Kind.SPEECH else 0):
        state.advance(Kind.TEXT)
        row = state.row(masks)
    return row


def _steps(run: Run) -> None:
    """Times steps of one id for rows of the same length: operation by operation, and as a graph on CUDA."""
    language, vocabulary = run.models["language"], run.models["vocabulary"]
    read = step_gb(language)
    all_rows = (1, 3) if run.tiny else (1, 2, 4, 8, 16, 32, 64)
    steppers: list[tuple[str, EagerStepper]] = [("eager", EagerStepper(language, vocabulary))]
    if run.on_cuda:
        with run.record.attempt("graphs"):
            graphs = GraphStepper(language, vocabulary, max(all_rows), 4608)
            run.record.add("capture of graphs", graphs.warm_up(max(all_rows)), "s", graphs=graphs.num_graphs)
            steppers.append(("graph", graphs))
    for num_kept in (16,) if run.tiny else (512, 4096):
        for name, stepper in steppers:
            for start in range(0, num_kept, PREFILL_CHUNK):
                stepper.step([StepRow(0, start, [5] * min(PREFILL_CHUNK, num_kept - start))])
            for slot in range(1, max(all_rows)):
                stepper.copy_prefix(0, slot, num_kept)
            for kind in (Kind.SPEECH, Kind.TEXT):
                draw = draw_row(vocabulary, stepper.masks, kind)
                for rows in all_rows:
                    if run.over:
                        return
                    batch = [StepRow(slot, num_kept, [7], draw) for slot in range(rows)]
                    step = run.median_ms(partial(stepper.step, batch), 10)
                    speed = round(1e3 * read / step, 1)
                    run.record.add(
                        f"step, {name}", step, "ms", rows=rows, kept=num_kept, kind=kind.name, weights_gb_s=speed
                    )
    if len(steppers) > 1:
        _compare_steppers(run, *(stepper for _, stepper in steppers))


def _compare_steppers(run: Run, eager: EagerStepper, graphs: EagerStepper) -> None:
    """Counts greedy ids of the graphs that differ from those of the eager stepper, over rows of unequal lengths."""
    vocabulary = run.models["vocabulary"]
    ids = torch.randint(vocabulary.size, (4, 200)).tolist()
    lengths, equal = [200, 7, 64, 129], []
    found: list[list[int | None]] = []
    for stepper in (eager, graphs):
        state = DrawState(GREEDY, SPEECH_ONLY)
        for slot, length in enumerate(lengths):
            stepper.step([StepRow(slot, 0, ids[slot][:length])])
        batch = [StepRow(slot, length, ids[slot][:1], state.row(stepper.masks)) for slot, length in enumerate(lengths)]
        found.append([stepped.token for stepped in stepper.step(batch)])
    equal = [one == other for one, other in zip(*found, strict=True)]
    run.record.add("rows whose graph draws the eager id", sum(equal), "", of=len(equal))


def _prefill(run: Run) -> None:
    stepper = EagerStepper(run.models["language"], run.models["vocabulary"])
    for size in (8,) if run.tiny else (64, 256, 1024):
        once = partial(stepper.step, [StepRow(0, 0, [5] * size)])
        run.record.add("prefill", run.median_ms(once, 5), "ms", ids=size)


def _draws(run: Run) -> None:
    """Times the draw of all rows over the whole vocabulary."""
    language, vocabulary = run.models["language"], run.models["vocabulary"]
    masks = DrawMasks(vocabulary, language.config.vocab_size, run.device)
    for rows in (1, 16):
        scores = 3 * torch.randn(rows, language.config.vocab_size, device=run.device)
        for kind in (Kind.SPEECH, Kind.TEXT):
            draws = rows_of([draw_row(vocabulary, masks, kind)] * rows, run.device)
            one = partial(draw_ids, scores, masks.table, draws)
            run.record.add("draw", run.median_ms(one), "ms", rows=rows, kind=kind.name)


def _replies(run: Run) -> None:
    """Measures whole replies through the engine's interface."""
    language, vocabulary = run.models["language"], run.models["vocabulary"]
    made = PlainEngine(language, vocabulary, max_sessions=64)
    num_ids = 8 if run.tiny else 32
    for rows in (1, 2) if run.tiny else (1, 16, 64):
        if run.over:
            return
        prompt = list(range(10, 42))
        asyncio.run(_reply_together(made, vocabulary, prompt, rows, 2))
        start = time.perf_counter()
        total = asyncio.run(_reply_together(made, vocabulary, prompt, rows, num_ids))
        seconds = time.perf_counter() - start
        run.record.add("replies through the engine", 1e3 * seconds * rows / max(total, 1), "ms per step", rows=rows)


async def _reply_together(made: PlainEngine, vocabulary: Vocabulary, prompt: list[int], rows: int, num_ids: int) -> int:
    async def reply(seed: int) -> int:
        sampling = Sampling(temperature=0.8, max_tokens=num_ids, seed=seed)
        return len([token async for token in made.generate(prompt, sampling, SPEECH_ONLY)])

    return sum(await asyncio.gather(*(reply(seed) for seed in range(rows))))


def _profile(run: Run, rows: int) -> None:
    stepper = EagerStepper(run.models["language"], run.models["vocabulary"])
    draw = draw_row(run.models["vocabulary"], stepper.masks, Kind.SPEECH)
    for slot in range(rows):
        stepper.step([StepRow(slot, 0, [5] * 16)])

    def steps() -> None:
        for _ in range(PROFILED_STEPS):
            stepper.step([StepRow(slot, 16, [7], draw) for slot in range(rows)])

    steps()
    kernels, busy_ms = profiled(run, steps)
    wall = run.median_ms(steps, 3, 0)
    run.record.add(
        "kernels of a step",
        kernels / PROFILED_STEPS,
        "",
        rows=rows,
        busy=f"{busy_ms / wall:.0%}",
        ms=wall / PROFILED_STEPS,
    )


def profiled(run: Run, work: Callable[[], object]) -> tuple[int, float]:
    """Returns the number of kernels of some work on CUDA, and their milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        work()
        run.sync()
    kernels = [event for event in found.events() if event.device_type.name == "CUDA"]
    return len(kernels), sum(event.device_time for event in kernels) / 1e3
