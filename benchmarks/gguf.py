"""Benchmark `gguf`: steps of a language model in llama.cpp, against the memory bandwidth of this machine.

A step of one conversation reads every weight once, except for the embedding. So the size of the file over the memory
bandwidth is the least time of a step. The bandwidth is that of a sum over a large array with the same threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import AIMS, Spread, repeat
from benchmarks.plots import draw_lines
from duologue import rates
from duologue.evaluation.report import Row
from duologue.interleave import INTERLEAVED, SPEECH_ONLY
from duologue.language.drawing import DrawState
from duologue.language.llama import LlamaStepper
from duologue.language.sampling import Sampling
from duologue.language.stepping import Stepper, StepRow
from duologue.progress import steps
from duologue.vocabulary import Vocabulary

ROWS = (1, 4, 8)
FIRST_SOUND_IDS = INTERLEAVED.text_run + rates.BLOCK_TOKENS
FEW_IDS, STEPS_EACH = 32, 4
BANDWIDTH_BYTES = 2**30
MAX_OVER_FLOOR = 2.0


@dataclass(frozen=True)
class GgufBench:
    """Attributes:
    num_parameters: of the file; `weight_gb` of its weights, in 10^9 bytes, without the embedding.
    threads: of the sum, and of llama.cpp with a large model.
    bandwidth_gb_s: of the memory.
    floor_ms: time in which the memory gives all weights.
    prompt_ms: of the ids of a prompt, in one step.
    step_ms: (conversations, milliseconds) of one id in each.
    """

    num_parameters: int
    weight_gb: float
    threads: int
    bandwidth_gb_s: float
    floor_ms: float
    prompt_tokens: int
    prompt_ms: Spread
    step_ms: tuple[tuple[int, Spread], ...]

    def rows(self) -> list[Row]:
        """The figures for a terminal."""
        one = self.step_ms[0][1]
        first_s = (self.prompt_ms.median + FIRST_SOUND_IDS * one.median) / 1000
        rows = [
            Row("model", "parameters", self.num_parameters / 1e6, "M"),
            Row("memory", "weights without the embedding", self.weight_gb, "GB"),
            Row("memory", "bandwidth", self.bandwidth_gb_s, "GB/s", note=f"a sum in {self.threads} threads"),
            Row("memory", "least time of a step", self.floor_ms, "ms"),
        ]
        per_s = 1000 * self.prompt_tokens / self.prompt_ms.median
        rows.append(self.prompt_ms.row("prompt", f"{self.prompt_tokens} ids", "ms", f"{per_s:.1f} ids/s"))
        for count, spread in self.step_ms:
            per_s = 1000 * count / spread.median
            rows.append(spread.row("step", f"{count} at once", "ms", f"{per_s:.1f} ids/s"))
        note = f"the prompt and {FIRST_SOUND_IDS} steps, without tokenizer and decoder"
        rows.append(Row("first sound", "language model", first_s, "s", note=note))
        return [*rows, Row(AIMS, "gguf.step_over_floor", one.median / self.floor_ms, aim=MAX_OVER_FLOOR)]

    def draw(self, figure: Any) -> None:
        """Time of a step over the conversations at once, beside its least time."""
        counts = [float(count) for count, _ in self.step_ms]
        lines = {
            "step": (counts, [spread.median for _, spread in self.step_ms]),
            "memory bandwidth": (counts, [self.floor_ms] * len(counts)),
        }
        draw_lines(figure.subplots(), lines, "llama.cpp: one step", "conversations at once", "ms")


def measure_gguf(path: Path, vocabulary: Vocabulary, prompt: int, repetitions: int) -> GgufBench:
    """Times steps of a GGUF file.

    Args:
        prompt: ids of a prompt.

    Raises:
        ValueError: as `LlamaStepper`.
    """
    stepper = LlamaStepper(path, vocabulary, num_slots=max(ROWS) + 1, num_cells=1024)
    num_parameters, weight_bytes = _sizes(path)
    bandwidth = _bandwidth()
    ids = [3 + index % 200 for index in range(prompt)]
    prompt_s = repeat(lambda _: stepper.step([StepRow(0, 0, ids, wants_scores=True)]), repetitions)
    step_ms = []
    for count in steps(ROWS, "conversations at once"):
        times = repeat(_step(stepper, count, ids[:FEW_IDS]), STEPS_EACH * repetitions)
        step_ms.append((count, Spread.of(times).scaled(1000.0)))
    return GgufBench(
        num_parameters=num_parameters,
        weight_gb=weight_bytes / 1e9,
        threads=torch.get_num_threads(),
        bandwidth_gb_s=bandwidth / 1e9,
        floor_ms=1000.0 * weight_bytes / bandwidth,
        prompt_tokens=prompt,
        prompt_ms=Spread.of(prompt_s).scaled(1000.0),
        step_ms=tuple(step_ms),
    )


def _step(stepper: Stepper, count: int, prompt: Sequence[int]) -> Callable[[int], object]:
    """Returns what draws the next id in `count` conversations after a prompt."""
    for slot in range(1, count + 1):
        stepper.step([StepRow(slot, 0, list(prompt))])
    draw = DrawState(Sampling(temperature=0.0), SPEECH_ONLY).row(stepper.masks)

    def step(number: int) -> object:
        rows = [StepRow(slot, len(prompt) + number, [prompt[-1]], draw) for slot in range(1, count + 1)]
        return stepper.step(rows)

    return step


def _sizes(path: Path) -> tuple[int, int]:
    """Returns the number of parameters, and the bytes of the weights that a step reads."""
    from gguf import GGUFReader

    tensors = GGUFReader(path).tensors
    parameters = sum(math.prod(int(size) for size in tensor.shape) for tensor in tensors)
    return parameters, sum(int(tensor.n_bytes) for tensor in tensors if tensor.name != "token_embd.weight")


def _bandwidth() -> float:
    """Returns the bytes per second that a sum in all threads reads, the best of five."""
    array = torch.ones(BANDWIDTH_BYTES // 4)
    return BANDWIDTH_BYTES / min(repeat(lambda _: array.sum(), 5))
