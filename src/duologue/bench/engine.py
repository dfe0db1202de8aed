"""Benchmark `engine`: the plain engine against continuous batching, in one run, with the same weights.

    replies at once   1, 4, 8, 16: ids a second of all together, time to the first id of each
    prefix            a long prompt the first time, and another reply to it with some more ids
    memory            what the process grew by at an engine's first reply, and what its keys and values take

The prompts of a measure were never seen before. Every reply has the same number of ids where the weights are random:
such a model hardly ever ends a reply.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from duologue.bench.harness import Check, Spread, at_least, at_most
from duologue.bench.plots import draw_lines
from duologue.interleave import SPEECH_ONLY
from duologue.language.backbone import Dtype, LanguageConfig, new_glm
from duologue.language.continuous import ContinuousEngine
from duologue.language.engine import PlainEngine
from duologue.language.sampling import Sampling
from duologue.models import open_folder
from duologue.vocabulary import Vocabulary

AnyEngine = PlainEngine | ContinuousEngine

COUNTS = (1, 4, 8, 16)
PREFIX_TOKENS = 960
MIN_GAIN = 2.0
MAX_SECOND_OVER_FIRST = 0.5


@dataclass(frozen=True)
class Together:
    """Replies made at once.

    Attributes:
        tokens_per_s: of all together, from the first request to the last id.
        first_ms: from a request to its first id, over all requests.
    """

    num_requests: int
    tokens_per_s: Spread
    first_ms: Spread


@dataclass(frozen=True)
class EngineFigures:
    """One engine.

    Attributes:
        first_prompt_ms: to the first id of a prompt of `PREFIX_TOKENS`; `second_prompt_ms` of the same and eight more.
        grown_mb: resident memory that came with its first reply, in 10^6 bytes; NaN where the system does not tell.
        cached_tokens: ids whose keys and values it held at the end, which take `cached_mb`.
    """

    engine: str
    together: tuple[Together, ...]
    first_prompt_ms: Spread
    second_prompt_ms: Spread
    grown_mb: float
    cached_tokens: int
    cached_mb: float


@dataclass(frozen=True)
class EngineBench:
    """Attributes:
    num_parameters: of the model, and `dtype`, that of its weights.
    """

    num_parameters: int
    dtype: str
    device: str
    prompt_tokens: int
    reply_tokens: int
    engines: tuple[EngineFigures, ...]
    checks: tuple[Check, ...] = ()

    def table(self) -> str:
        """The figures for a terminal."""
        lines = [
            f"{self.num_parameters / 1e6:.1f} million parameters, {self.dtype} on {self.device}; prompts of "
            f"{self.prompt_tokens} ids, replies of {self.reply_tokens}",
            f"{'':12}{'at once':>9}{'ids/s':>10}{'x one':>8}{'first id':>12}{'p95':>12}",
        ]
        for one in self.engines:
            for load in one.together:
                gain = load.tokens_per_s.median / one.together[0].tokens_per_s.median
                lines.append(
                    f"{one.engine:12}{load.num_requests:9}{load.tokens_per_s.median:10.1f}{gain:8.2f}"
                    f"{load.first_ms.median:9.1f} ms{load.first_ms.p95:9.1f} ms"
                )
        for one in self.engines:
            lines.append(
                f"{one.engine:12}prompt of {PREFIX_TOKENS} ids: {one.first_prompt_ms.median:.1f} ms, with 8 more again "
                f"{one.second_prompt_ms.median:.1f} ms; memory +{one.grown_mb:.0f} MB, "
                f"{one.cached_tokens} ids kept in {one.cached_mb:.1f} MB"
            )
        return "\n".join(lines)

    def draw(self, figure: Any) -> None:
        """Ids a second and time to the first id over the replies at once."""
        left, right = figure.subplots(1, 2)
        counts = {one.engine: [float(load.num_requests) for load in one.together] for one in self.engines}
        speed = {one.engine: [load.tokens_per_s.median for load in one.together] for one in self.engines}
        first = {one.engine: [load.first_ms.median for load in one.together] for one in self.engines}
        for axes, values, title, y in (
            (left, speed, "engine: all replies together", "ids / s"),
            (right, first, "engine: first id", "ms"),
        ):
            draw_lines(axes, {name: (counts[name], values[name]) for name in values}, title, "replies at once", y)


def random_language(vocabulary: Vocabulary, device: str = "cpu") -> Callable[[], PreTrainedModel]:
    """Makes language models of pocket's size with random weights, always the same."""
    return lambda: new_glm(vocabulary, LanguageConfig()).to(device).eval()


def stored_language(
    folder: Path, device: str = "cpu", dtype: Dtype | None = None
) -> tuple[Callable[[], PreTrainedModel], Vocabulary]:
    """Reads the language model of a model folder anew each time, and its vocabulary, without the rest."""
    opened = open_folder(folder)
    return lambda: opened.load_language(device, dtype), opened.vocabulary


def measure_engine(
    make_model: Callable[[], PreTrainedModel],
    vocabulary: Vocabulary,
    counts: Sequence[int] = COUNTS,
    prompt_tokens: int = 200,
    reply_tokens: int = 64,
    repetitions: int = 3,
) -> EngineBench:
    """Measures both engines, taking turns.

    Args:
        make_model: gives the model to run, a new one each time, since the continuous engine changes its own.
        counts: replies at once.
    """
    figures: dict[str, _Measured] = {}
    for name, new_engine in (("plain", PlainEngine), ("continuous", ContinuousEngine)):
        model = make_model()
        before = _resident_mb()
        engine: AnyEngine = new_engine(model, vocabulary, max_sessions=max(*counts, 2))
        measured = figures[name] = _Measured(engine, vocabulary)
        measured.replies(1, prompt_tokens, 4)  # takes its memory, and warms up
        measured.grown_mb = _resident_mb() - before
    for _ in range(repetitions):
        for count in counts:
            for measured in figures.values():
                measured.count(count, prompt_tokens, reply_tokens)
        for measured in figures.values():
            measured.prefix()
    engines = tuple(measured.figures(name) for name, measured in figures.items())
    for measured in figures.values():
        measured.close()
    parameters = list(model.parameters())
    return EngineBench(
        sum(parameter.numel() for parameter in parameters),
        str(parameters[0].dtype).removeprefix("torch."),
        str(model.device),
        prompt_tokens,
        reply_tokens,
        engines,
        _checks(engines, model.device.type == "cpu"),
    )


class _Measured:
    """One engine and what was measured of it."""

    def __init__(self, engine: AnyEngine, vocabulary: Vocabulary) -> None:
        self._engine, self._vocabulary = engine, vocabulary
        self._random = random.Random(0)  # both engines get the same prompts
        self._speeds: dict[int, list[float]] = {}
        self._firsts: dict[int, list[float]] = {}
        self._prefixes: list[tuple[float, float]] = []
        self.grown_mb = 0.0

    def count(self, num_requests: int, prompt_tokens: int, reply_tokens: int) -> None:
        start = time.perf_counter()
        replies = self.replies(num_requests, prompt_tokens, reply_tokens)
        seconds = time.perf_counter() - start
        self._speeds.setdefault(num_requests, []).append(sum(num for num, _ in replies) / seconds)
        self._firsts.setdefault(num_requests, []).extend(1000 * first for _, first in replies)

    def prefix(self) -> None:
        prompt = self._prompt(min(PREFIX_TOKENS, self._engine.max_positions - 64))
        (_, first), (_, second) = (asyncio.run(self._reply(ids, 8, 0)) for ids in (prompt, [*prompt, *self._prompt(8)]))
        self._prefixes.append((1000 * first, 1000 * second))

    def replies(self, num_requests: int, prompt_tokens: int, reply_tokens: int) -> list[tuple[int, float]]:
        """Ids and seconds to the first of each reply."""

        async def together() -> list[tuple[int, float]]:
            prompts = [self._prompt(prompt_tokens) for _ in range(num_requests)]
            jobs = (self._reply(prompt, reply_tokens, seed) for seed, prompt in enumerate(prompts))
            return list(await asyncio.gather(*jobs))

        return asyncio.run(together())

    def figures(self, name: str) -> EngineFigures:
        together = tuple(
            Together(count, Spread.of(speeds), Spread.of(self._firsts[count])) for count, speeds in self._speeds.items()
        )
        first, second = (Spread.of(values) for values in zip(*self._prefixes, strict=True))
        config = self._engine.model.config.get_text_config()
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        cached = self._engine.cached_tokens
        cached_mb = cached * per_token * self._engine.model.dtype.itemsize / 1e6
        return EngineFigures(name, together, first, second, self.grown_mb, cached, cached_mb)

    def close(self) -> None:
        if isinstance(self._engine, ContinuousEngine):
            self._engine.close()

    async def _reply(self, prompt: list[int], num_tokens: int, seed: int) -> tuple[int, float]:
        sampling = Sampling(temperature=1.0, top_p=0.9, max_tokens=num_tokens, seed=seed)
        start = time.perf_counter()
        count, first = 0, float("nan")
        async for _ in self._engine.generate(prompt, sampling, SPEECH_ONLY):
            if count == 0:
                first = time.perf_counter() - start
            count += 1
        return count, first

    def _prompt(self, num_tokens: int) -> list[int]:
        codes = (self._random.randrange(self._vocabulary.codebook_size) for _ in range(num_tokens))
        return list(self._vocabulary.speech_ids(list(codes)))


def _checks(engines: Sequence[EngineFigures], on_cpu: bool) -> tuple[Check, ...]:
    plain, continuous = engines
    most = plain.together[-1].tokens_per_s.median
    checks = [at_least("engine.plain.batch_gain", most / plain.together[0].tokens_per_s.median, MIN_GAIN)]
    if on_cpu:  # why the plain engine is the default there
        ratio = most / continuous.together[-1].tokens_per_s.median
        checks.append(at_least("engine.plain_over_continuous", ratio, 1.0))
    for one in engines:
        ratio = one.second_prompt_ms.median / one.first_prompt_ms.median
        checks.append(at_most(f"engine.{one.engine}.second_over_first", ratio, MAX_SECOND_OVER_FIRST))
    return tuple(checks)


def _resident_mb() -> float:
    """Memory that this process has resident now, in 10^6 bytes; NaN where the system does not tell."""
    try:
        pages = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]
    except (OSError, IndexError):
        return float("nan")
    return int(pages) * 1024 / 1e6
