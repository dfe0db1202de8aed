"""Sections `model` and `engine`: a language model of the published size, random, and steps of the engine."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from transformers import GlmForCausalLM

from benchmarks.gpu.record import Run
from duologue.interleave import SPEECH_ONLY, Allowed
from duologue.language.engine import PlainEngine
from duologue.language.sampling import Sampling
from duologue.released import random_weights
from duologue.released.language import read_config
from duologue.released.random_weights import PRESETS, Preset
from duologue.released.text import load_released_vocabulary
from duologue.vocabulary import Vocabulary

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


def _steps(run: Run) -> None:
    from duologue.language.keyvalues import KeyValues, RaggedBatchModel

    language = run.models["language"]
    batched, read = RaggedBatchModel(language), step_gb(language)
    for num_kept in (16,) if run.tiny else (512, 4096):
        first = KeyValues()
        for start in range(0, num_kept, PREFILL_CHUNK):
            batched.step([[5] * min(PREFILL_CHUNK, num_kept - start)], [first])
        kept = [first]
        for rows in (1, 3) if run.tiny else (1, 2, 4, 8, 16, 32):
            if run.over:
                return
            kept += [first.copy(num_kept) for _ in range(rows - len(kept))]
            step = run.median_ms(partial(batched.step, [[7]] * rows, kept[:rows]), 10)
            run.record.add("step", step, "ms", rows=rows, kept=num_kept, weights_gb_s=round(1e3 * read / step, 1))


def _prefill(run: Run) -> None:
    from duologue.language.keyvalues import KeyValues, RaggedBatchModel

    batched = RaggedBatchModel(run.models["language"])
    for size in (8,) if run.tiny else (64, 256, 1024):

        def once(size: int = size) -> None:
            batched.step([[5] * size], [KeyValues()])

        run.record.add("prefill", run.median_ms(once, 5), "ms", ids=size)


def _draws(run: Run) -> None:
    from duologue.language.sampling import KindMasks, choose, choose_kind

    language, vocabulary = run.models["language"], run.models["vocabulary"]
    num_ids = language.config.vocab_size
    masks = KindMasks(vocabulary, num_ids, run.device)
    generator = torch.Generator(run.device).manual_seed(0)
    scores, sampling = 3 * torch.randn(num_ids, device=run.device), Sampling(temperature=0.8)
    for name, allowed in (
        ("speech", Allowed(False, True, False)),
        ("text or speech", Allowed(True, True, False)),
        ("any", Allowed(True, True, True)),
    ):

        def one(allowed: Allowed = allowed) -> int:
            kind, narrowed = choose_kind(scores, masks, allowed, sampling, generator)
            return choose(narrowed, sampling.temperature_for(kind), sampling.top_p, None, generator)

        run.record.add("draw of one row", run.median_ms(one), "ms", kinds=name)


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
    from duologue.language.keyvalues import KeyValues, RaggedBatchModel

    batched = RaggedBatchModel(run.models["language"])
    kept = [KeyValues() for _ in range(rows)]
    batched.step([[5] * 16] * rows, kept)

    def steps() -> Tensor:
        for _ in range(PROFILED_STEPS):
            scores = batched.step([[7]] * rows, kept)
        return scores

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
