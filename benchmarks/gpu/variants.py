"""Section `variants`: steps of the language model with each change that should make them faster."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.language import draw_row, step_gb
from benchmarks.gpu.record import Run
from benchmarks.gpu.slots import Slots
from duologue.interleave import Kind
from duologue.language.drawing import DrawMasks, draw, rows_of
from duologue.language.stepping import EagerStepper, SpeechColumns, StepRow
from duologue.vocabulary import Vocabulary

COMPILE_S = 20.0  # a compiled variant is left out with less time


@torch.inference_mode()
def variants(run: Run) -> None:
    """Measures every variant alone; those in fp8 and the compiled ones come last."""
    language, record = run.models["language"], run.record
    num_slots, length, num_kept = (4, 64, 12) if run.tiny else (32, 8192, 512)
    slots = Slots(language, num_slots, length, flash=run.on_cuda)
    bound = 64 if run.tiny else 1024
    with record.attempt("slots against the engine's step"):
        _compare(run, slots, num_kept)
    masked = slots.fork(flash=False)
    all_rows = (1, 3) if run.tiny else (1, 4, 16, 32)
    for rows in all_rows:
        step = Step(run, slots, rows, num_kept, bound)
        step.measure("slots, eager", Step.scores, graph=False)
        step.measure("slots, graph", Step.scores)
        step.measure("slots, graph, draw inside", Step.drawn)
        step.measure("slots, graph, draw inside, speech rows of the head", Step.speech)
        Step(run, masked, rows, num_kept, bound).measure("slots, graph, masked attention", Step.scores)
    with record.attempt("draw of all rows"):
        _draws(run, all_rows)
    if not run.tiny:
        for rows in (1, 16):
            Step(run, slots, rows, 4096, 8192).measure("slots, graph", Step.scores)
    with record.attempt("query, key and value apart"):
        apart = Slots(language, num_slots, bound, stacked=False, flash=run.on_cuda)
        Step(run, apart, 1, num_kept, bound).measure("slots, graph, query, key and value apart", Step.scores)
        del apart
    if not run.on_cuda:
        return
    with record.attempt("fp8"):
        small = Slots(language, num_slots, bound, fp8=True)
        for rows in (1, 16):
            Step(run, small, rows, num_kept, bound).measure("slots, graph, fp8", Step.scores)
        del small
    compiled = slots.fork(flash=True, compiled=True)
    for rows in (1, 16):
        if run.left_s < COMPILE_S:
            record.add("slots, graph, layer compiled", None, reason="no time", rows=rows)
            continue
        start = time.perf_counter()
        Step(run, compiled, rows, num_kept, bound).measure("slots, graph, layer compiled", Step.scores)
        record.add("compilation and capture", time.perf_counter() - start, "s", rows=rows)


class Step:
    """Static inputs of a step of some rows, and the works to measure."""

    def __init__(self, run: Run, slots: Slots, rows: int, num_kept: int, bound: int) -> None:
        self.run, self.slots, self.rows, self.num_kept, self.bound = run, slots, rows, num_kept, bound
        device, vocabulary = run.device, run.models["vocabulary"]
        self.ids = torch.full((rows,), 7, device=device)
        self.positions = torch.full((rows,), num_kept, device=device)
        self.places = torch.arange(rows, device=device)
        self.inputs = DrawInputs(device, vocabulary, rows, run.models["language"].config.vocab_size)
        first = vocabulary.speech_offset
        self.speech_head = slots.head[first : first + vocabulary.codebook_size]

    def scores(self) -> Tensor:
        """Runs the step: (R, V)."""
        return self.slots.step(self.ids, self.positions, self.places, self.bound)

    def drawn(self) -> Tensor:
        """Runs the step and draws the next ids (R,) of any kind."""
        return self.inputs.draw(self.scores())

    def speech(self) -> Tensor:
        """Runs the step and draws the next ids (R,) in a run of speech."""
        scores = self.slots.step(self.ids, self.positions, self.places, self.bound, self.speech_head)
        return self.inputs.draw_speech(scores)

    def measure(self, name: str, work: Callable[[Step], Tensor], graph: bool = True) -> None:
        """Measures some work of this step; a failure costs one line."""
        run = self.run
        if run.over:
            run.record.add(name, None, reason="no time", rows=self.rows)
            return
        with run.record.attempt(f"{name}, {self.rows} rows"):
            call = partial(work, self)
            times = run.times_ms(run.graphed(call)[0] if graph else call)
            median = sorted(times)[len(times) // 2]
            speed = round(1e3 * step_gb(run.models["language"]) / median, 1)
            run.record.add(name, median, "ms", rows=self.rows, kept=self.num_kept, weights_gb_s=speed, least=min(times))


class DrawInputs:
    """Static inputs of the package's draw of one more id, after a run of text."""

    def __init__(self, device: torch.device, vocabulary: Vocabulary, rows: int, num_ids: int) -> None:
        masks = DrawMasks(vocabulary, num_ids, device)
        self.table = masks.table
        self.speech_table = SpeechColumns(vocabulary, masks).table[:, : vocabulary.codebook_size]
        self.rows = rows_of([draw_row(vocabulary, masks, Kind.SPEECH)] * rows, device)

    def draw(self, scores: Tensor) -> Tensor:
        """Draws from scores (R, V)."""
        return draw(scores.float(), self.table, self.rows)[0]

    def draw_speech(self, scores: Tensor) -> Tensor:
        """Draws from scores of speech alone."""
        return draw(scores.float(), self.speech_table, self.rows)[0]


def _compare(run: Run, slots: Slots, num_kept: int) -> None:
    """Compares ragged rows in slots out of order with the engine's step."""
    stepper = EagerStepper(run.models["language"], run.models["vocabulary"])
    places, lengths = [2, 0, 3], [num_kept, num_kept // 2, 3]
    ids = torch.randint(run.models["vocabulary"].size, (3, num_kept + 1)).tolist()
    expected = []
    for row, length in enumerate(lengths):
        stepper.step([StepRow(row, 0, ids[row][:length])])
        for layer in range(len(slots.layers)):
            kept = stepper.cache.layer(layer)[:, row, :, :length]  # (2, G, T, K)
            start = places[row] * slots.length
            slots.pool[layer, :, start : start + length] = kept.transpose(1, 2)
        stepped = stepper.step([StepRow(row, length, ids[row][length : length + 1], wants_scores=True)])
        expected.append(stepped[0].scores)
    device = run.device
    last = torch.tensor([ids[row][length] for row, length in enumerate(lengths)], device=device)
    at, which = torch.tensor(lengths, device=device), torch.tensor(places, device=device)
    bound = 64 if run.tiny else 1024
    if slots.flash:
        found = slots.step(last, at, which, bound)
    else:  # masked attention takes slots in order, so each row is moved to slot 0
        rows = []
        for row, place in enumerate(places):
            pool = slots.pool[:, :, : slots.length].clone()
            start = place * slots.length
            slots.pool[:, :, : slots.length] = slots.pool[:, :, start : start + slots.length]
            rows.append(slots.step(last[row : row + 1], at[row : row + 1], torch.zeros_like(at[:1]), bound)[0])
            slots.pool[:, :, : slots.length] = pool
        found = torch.stack(rows)
    wanted = torch.stack([scores for scores in expected if scores is not None])
    difference = (found.float() - wanted).abs().max()
    run.record.add("slots against the engine's step", float(difference), "", largest_score=float(wanted.abs().max()))


def _draws(run: Run, all_rows: tuple[int, ...]) -> None:
    """Measures the batched draw alone."""
    language, vocabulary = run.models["language"], run.models["vocabulary"]
    for rows in all_rows:
        inputs = DrawInputs(run.device, vocabulary, rows, language.config.vocab_size)
        scores = torch.randn(rows, language.config.vocab_size, device=run.device)
        replay, _ = run.graphed(partial(inputs.draw, scores))
        run.record.add("draw of all rows", run.median_ms(replay), "ms", rows=rows)
