"""Benchmark `engine`: replies made together against one alone.

    replies at once   1, 4, 8, 16: ids a second of all together, time to the first id of each
    prefix            a long prompt the first time, and another reply to it with some more ids
    memory            what the process grew by at the first reply, and what its keys and values take

The prompts of a measure were never seen before. Every reply has the same number of ids where the weights are random:
such a model hardly ever ends a reply.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import AIMS, Spread
from benchmarks.plots import draw_lines
from duologue.checkpoint import Dtype
from duologue.evaluation.report import Row
from duologue.interleave import SPEECH_ONLY
from duologue.language.backbone import LanguageConfig, new_glm
from duologue.language.engine import PlainEngine
from duologue.language.sampling import Sampling
from duologue.machine import resident_mb
from duologue.models import open_folder
from duologue.progress import steps
from duologue.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
class EngineBench:
    """The engine of one model.

    Attributes:
        num_parameters: of the model, and `dtype`, that of its weights.
        first_prompt_ms: to the first id of a prompt of `PREFIX_TOKENS`; `second_prompt_ms` of the same and eight more.
        grown_mb: resident memory that came with the first reply, in 10^6 bytes; NaN where the system does not tell.
        cached_tokens: ids whose keys and values it held at the end, which take `cached_mb`.
    """

    num_parameters: int
    dtype: str
    device: str
    prompt_tokens: int
    reply_tokens: int
    together: tuple[Together, ...]
    first_prompt_ms: Spread
    second_prompt_ms: Spread
    grown_mb: float
    cached_tokens: int
    cached_mb: float

    def rows(self) -> list[Row]:
        """The figures for a terminal."""
        millions = self.num_parameters / 1e6
        rows = [Row("model", "parameters", millions, "M", note=f"{self.dtype} on {self.device}")]
        for load in self.together:
            group = f"{load.num_requests} at once"
            rows += [load.tokens_per_s.row(group, "ids per second", "1/s"), load.first_ms.row(group, "first id", "ms")]
        unknown = "" if math.isfinite(self.grown_mb) else "the system does not report resident memory"
        gain = self.together[-1].tokens_per_s.median / self.together[0].tokens_per_s.median
        ratio = self.second_prompt_ms.median / self.first_prompt_ms.median
        return [
            *rows,
            self.first_prompt_ms.row(f"prompt of {PREFIX_TOKENS} ids", "first id", "ms"),
            self.second_prompt_ms.row(f"prompt of {PREFIX_TOKENS} ids", "with 8 more ids again", "ms"),
            Row("memory", "added by the first reply", None if unknown else self.grown_mb, "MB", skipped=unknown),
            Row("memory", "keys and values kept", self.cached_mb, "MB", note=f"{self.cached_tokens} ids"),
            Row(AIMS, "engine.plain.batch_gain", gain, aim=MIN_GAIN, aim_is="at least"),
            Row(AIMS, "engine.plain.second_over_first", ratio, aim=MAX_SECOND_OVER_FIRST),
        ]

    def draw(self, figure: Any) -> None:
        """Ids a second and time to the first id over the replies at once."""
        left, right = figure.subplots(1, 2)
        counts = [float(load.num_requests) for load in self.together]
        speeds = [load.tokens_per_s.median for load in self.together]
        firsts = [load.first_ms.median for load in self.together]
        draw_lines(left, {"": (counts, speeds)}, "engine: all replies together", "replies at once", "ids / s")
        draw_lines(right, {"": (counts, firsts)}, "engine: first id", "replies at once", "ms")


def random_language(vocabulary: Vocabulary, device: str = "cpu") -> PreTrainedModel:
    """A language model of pocket's size with random weights, always the same."""
    return new_glm(vocabulary, LanguageConfig()).to(device).eval()


def stored_language(
    folder: Path, device: str = "cpu", dtype: Dtype | None = None
) -> tuple[PreTrainedModel, Vocabulary]:
    """The language model of a model folder and its vocabulary, without the rest."""
    opened = open_folder(folder)
    return opened.load_language(device, dtype), opened.vocabulary


def measure_engine(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    counts: Sequence[int] = COUNTS,
    prompt_tokens: int = 200,
    reply_tokens: int = 64,
    repetitions: int = 3,
) -> EngineBench:
    """Measures the engine with each number of replies at once, in turns.

    Args:
        counts: replies at once; the last is compared with the first.
    """
    before = resident_mb()
    clients = _Clients(PlainEngine(model, vocabulary, max_sessions=max(*counts, 2)), vocabulary)
    clients.replies(1, prompt_tokens, 4)  # takes its memory, and warms up
    grown_mb = resident_mb() - before
    speeds: dict[int, list[float]] = {count: [] for count in counts}
    firsts: dict[int, list[float]] = {count: [] for count in counts}
    prefixes = []
    rounds = [(count, number) for _ in range(repetitions) for number, count in enumerate(counts)]
    for count, number in steps(rounds, "replies at once"):
        start = time.perf_counter()
        replies = clients.replies(count, prompt_tokens, reply_tokens)
        speeds[count].append(sum(num for num, _ in replies) / (time.perf_counter() - start))
        firsts[count].extend(1000 * first for _, first in replies)
        if number == len(counts) - 1:
            prefixes.append(clients.prefix())
    first, second = (Spread.of(values) for values in zip(*prefixes, strict=True))
    parameters = list(model.parameters())
    config = model.config.get_text_config()
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    cached = clients.engine.cached_tokens
    return EngineBench(
        sum(parameter.numel() for parameter in parameters),
        str(parameters[0].dtype).removeprefix("torch."),
        str(model.device),
        prompt_tokens,
        reply_tokens,
        tuple(Together(count, Spread.of(speeds[count]), Spread.of(firsts[count])) for count in speeds),
        first,
        second,
        grown_mb,
        cached,
        cached * per_token * model.dtype.itemsize / 1e6,
    )


class _Clients:
    """Readers of replies of one engine."""

    def __init__(self, engine: PlainEngine, vocabulary: Vocabulary) -> None:
        self.engine, self._vocabulary = engine, vocabulary
        self._random = random.Random(0)

    def prefix(self) -> tuple[float, float]:
        """Milliseconds to the first id of a long prompt, and of the same prompt with eight more ids."""
        prompt = self._prompt(min(PREFIX_TOKENS, self.engine.max_positions - 64))
        (_, first), (_, second) = (asyncio.run(self._reply(ids, 8, 0)) for ids in (prompt, [*prompt, *self._prompt(8)]))
        return 1000 * first, 1000 * second

    def replies(self, num_requests: int, prompt_tokens: int, reply_tokens: int) -> list[tuple[int, float]]:
        """Ids and seconds to the first of each reply."""

        async def together() -> list[tuple[int, float]]:
            prompts = [self._prompt(prompt_tokens) for _ in range(num_requests)]
            jobs = (self._reply(prompt, reply_tokens, seed) for seed, prompt in enumerate(prompts))
            return list(await asyncio.gather(*jobs))

        return asyncio.run(together())

    async def _reply(self, prompt: list[int], num_tokens: int, seed: int) -> tuple[int, float]:
        sampling = Sampling(temperature=1.0, top_p=0.9, max_tokens=num_tokens, seed=seed)
        start = time.perf_counter()
        count, first = 0, float("nan")
        async for _ in self.engine.generate(prompt, sampling, SPEECH_ONLY):
            if count == 0:
                first = time.perf_counter() - start
            count += 1
        return count, first

    def _prompt(self, num_tokens: int) -> list[int]:
        codes = (self._random.randrange(self._vocabulary.codebook_size) for _ in range(num_tokens))
        return list(self._vocabulary.speech_ids(list(codes)))
