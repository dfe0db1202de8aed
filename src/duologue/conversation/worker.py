"""The worker: one thread per device runs all work on its models.

Sessions submit single steps of streaming stages. Waiting steps of one stage run as one ragged batch, in order of their
deadlines. A row's result does not depend on the rest of the batch.

    future = worker.step(models.decoder, codes, state, last=False, deadline=underrun_at)
    wav, seconds = await asyncio.wrap_future(future)         # or future.result()
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from duologue.cuda import new_stream, on_stream, wait_for
from duologue.layers import Padded, join_states, state_row, state_settings

Result = TypeVar("Result")


class WorkerFull(RuntimeError):
    """The worker's queue is full."""


class BatchedStage(Protocol):
    """The part of `layers.StreamingStage` that the worker uses."""

    def step(self, x: Padded, state: Any) -> Padded: ...
    def flush(self, state: Any, rows: Tensor | None = None) -> Padded: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


class StepResult(NamedTuple):
    """The output of a step: values (T, ...) on the CPU, and the seconds of its batch."""

    values: Tensor
    seconds: float


@dataclass(frozen=True)
class WorkerStats:
    """Counters of a worker.

    Attributes:
        num_jobs: jobs started, single calls and batched steps.
        num_refused, num_cancelled: jobs refused by a full queue, and jobs cancelled before their start.
        num_waiting, most_waiting: current and maximum queue length.
        batch_sizes: number of batches by number of rows.
        busy_s: seconds of work.
    """

    num_jobs: int
    num_refused: int
    num_cancelled: int
    num_waiting: int
    most_waiting: int
    batch_sizes: dict[int, int]
    busy_s: float

    @property
    def mean_batch_size(self) -> float:
        """Mean number of rows per batch; 0 before the first."""
        batches = sum(self.batch_sizes.values())
        return sum(size * count for size, count in self.batch_sizes.items()) / batches if batches else 0.0


@dataclass(eq=False)
class _Step:
    stage: BatchedStage
    x: Tensor
    state: Any
    last: bool
    key: Hashable
    future: Future[StepResult]


@dataclass(eq=False)
class _Job:
    """A queue entry: a step or a single call."""

    deadline: float
    work: _Step | Callable[[], None]
    future: Future[Any]
    came: float = field(default_factory=time.monotonic)


class Worker:
    """One thread for all steps of tokenizer and decoder. Thread-safe.

    Args:
        max_waiting: maximum queue length; further jobs raise `WorkerFull`.
        max_rows: maximum rows per batch.
        max_batch_s: maximum estimated duration of a batch of several steps, which urgent work cannot overtake.
        num_threads: PyTorch threads on a CPU, see `layers.num_step_threads`; None for PyTorch's default.
        device: of the models. On CUDA the worker has its own stream, so its work does not wait for the language model.
    """

    def __init__(
        self,
        max_waiting: int = 1024,
        max_rows: int = 16,
        max_batch_s: float = 0.2,
        num_threads: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if max_waiting < 1 or max_rows < 1:
            raise ValueError(f"max_waiting and max_rows must be at least 1, got {max_waiting} and {max_rows}")
        self.max_waiting, self.max_rows, self.max_batch_s = max_waiting, max_rows, max_batch_s
        # Recent batches of each stage: rows times the longest length, and seconds.
        self._paces: WeakKeyDictionary[BatchedStage, deque[tuple[int, float]]] = WeakKeyDictionary()
        self._stream = new_stream(device)
        if self._stream is not None:  # after the weights have arrived
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._executor = ThreadPoolExecutor(
            1, "worker", _start_thread, (num_threads or torch.get_num_threads(), self._stream)
        )
        self._lock = threading.Lock()
        self._waiting: list[_Job] = []
        self._closed = False
        self._is_working = False
        self._num_jobs = self._num_refused = self._num_cancelled = self._most_waiting = 0
        self._batch_sizes: Counter[int] = Counter()
        self._busy_s = 0.0

    def submit(self, work: Callable[[], Result]) -> asyncio.Future[tuple[Result, float]]:
        """Queues a call, due at once, from inside an event loop; the future gives its result and seconds.

        Raises:
            WorkerFull: the queue is full.
        """
        future: Future[tuple[Result, float]] = Future()
        self._enqueue(_Job(time.monotonic(), lambda: _run(future, work), future))
        return asyncio.wrap_future(future)

    def step(
        self, stage: BatchedStage, x: Tensor, state: Any, last: bool = False, deadline: float = 0.0
    ) -> Future[StepResult]:
        """Queues one step of one row.

        Args:
            stage: the streaming stage.
            x: (T, ...) the row's new input, on any device.
            state: of one row, made in `on_stream`; replaced when the step is done and reserved for it until then.
            last: also flushes the row.
            deadline: when the result is needed, by `time.monotonic`; the earliest runs first.

        Returns:
            a future of the final output. Cancelling it before its start leaves the state unchanged.

        Raises:
            WorkerFull: the queue is full.
        """
        future: Future[StepResult] = Future()
        wait_for(self._stream, x)
        key = id(stage), x.dtype, x.shape[1:], state_settings(state)
        self._enqueue(_Job(deadline, _Step(stage, x, state, last, key, future), future))
        return future

    def on_stream(self) -> AbstractContextManager[object]:
        """Returns a context for other threads to make states in: on CUDA they belong to the worker's stream."""
        return on_stream(self._stream)

    def stats(self) -> WorkerStats:
        """Returns the counters."""
        with self._lock:
            return WorkerStats(
                self._num_jobs,
                self._num_refused,
                self._num_cancelled,
                len(self._waiting),
                self._most_waiting,
                dict(sorted(self._batch_sizes.items())),
                self._busy_s,
            )

    @property
    def busy(self) -> bool:
        """Whether a job waits or runs. The callbacks of finished jobs have been called when it becomes false."""
        with self._lock:
            return self._is_working or any(not job.future.cancelled() for job in self._waiting)

    def close(self) -> None:
        """Finishes the running job, cancels waiting ones and refuses new ones."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, []
        for job in waiting:
            job.future.cancel()
        self._executor.shutdown()

    def _enqueue(self, job: _Job) -> None:
        with self._lock:
            if self._closed:
                raise WorkerFull("the worker is closed and takes no more work")
            self._waiting = [waiting for waiting in self._waiting if not self._gone(waiting)]
            if len(self._waiting) >= self.max_waiting:
                self._num_refused += 1
                raise WorkerFull(f"{len(self._waiting)} jobs are already queued; try again later")
            self._waiting.append(job)
            self._most_waiting = max(self._most_waiting, len(self._waiting))
            # One call per job; calls whose job ran in an earlier batch do less or nothing.
            self._executor.submit(self._work)

    def _gone(self, job: _Job) -> bool:
        gone = job.future.cancelled()
        self._num_cancelled += gone
        return gone

    def _work(self) -> None:
        with self._lock:
            jobs = self._choose()
            self._is_working = True
        try:
            self._run_jobs([job for job in jobs if job.future.set_running_or_notify_cancel()])
        finally:
            with self._lock:
                self._is_working = False

    def _run_jobs(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        start = time.perf_counter()
        steps = [job.work for job in jobs if isinstance(job.work, _Step)]
        with torch.inference_mode():
            if steps:
                _run_steps(steps)
            else:
                jobs[0].work()  # type: ignore[operator]
        seconds = time.perf_counter() - start
        with self._lock:
            self._busy_s += seconds
            if steps:
                size = len(steps) * max(len(step.x) for step in steps)
                self._paces.setdefault(steps[0].stage, deque(maxlen=8)).append((size, seconds))

    def _choose(self) -> list[_Job]:
        """Dequeues the most urgent job and the steps to batch with it.

        No row is longer than twice the most urgent one. Padding is at most a third of a batch. The estimated duration
        is at most `max_batch_s`.
        """
        self._waiting = [job for job in self._waiting if not self._gone(job)]
        if not self._waiting:
            return []
        self._waiting.sort(key=lambda job: (job.deadline, job.came))
        first = self._waiting[0]
        chosen = [first]
        if isinstance(first.work, _Step):
            longest = total = len(first.work.x)
            pace = self._pace(first.work.stage)
            for job in self._waiting[1:]:
                if len(chosen) == self.max_rows:
                    break
                if not isinstance(job.work, _Step) or job.work.key != first.work.key:
                    continue
                length = len(job.work.x)
                width = max(longest, length)
                size = (len(chosen) + 1) * width
                if (
                    length <= 2 * len(first.work.x)
                    and 2 * size <= 3 * (total + length)
                    and pace * size <= self.max_batch_s
                ):
                    chosen.append(job)
                    longest, total = width, total + length
            self._batch_sizes[len(chosen)] += 1
        self._num_jobs += len(chosen)
        self._waiting = [job for job in self._waiting if job not in chosen]
        return chosen

    def _pace(self, stage: BatchedStage) -> float:
        """Returns the recent seconds per row and unit of length; 0 if unknown."""
        paces = self._paces.get(stage, ())
        return sum(seconds for _, seconds in paces) / max(sum(size for size, _ in paces), 1)


def _start_thread(num_threads: int, stream: torch.cuda.Stream | None) -> None:
    torch.set_num_threads(num_threads)
    if stream is not None:
        torch.cuda.set_stream(stream)


def _run(future: Future[tuple[Result, float]], work: Callable[[], Result]) -> None:
    start = time.perf_counter()
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result((result, time.perf_counter() - start))


def _run_steps(steps: list[_Step]) -> None:
    """Runs steps as one batch. If it fails, each runs alone, so that errors stay with their row."""
    try:
        results = _step_together(steps)
    except Exception as error:
        if len(steps) == 1:
            steps[0].future.set_exception(error)
            return
        for step in steps:
            _run_steps([step])
        return
    for step, result in zip(steps, results, strict=True):
        step.future.set_result(result)


def _step_together(steps: list[_Step]) -> list[StepResult]:
    start = time.perf_counter()
    stage = steps[0].stage
    device = next(stage.parameters()).device
    state = join_states([step.state for step in steps])
    x = Padded.stack([step.x for step in steps])
    out = [stage.step(Padded(x.values.to(device), x.lengths.to(device)), state)]
    if any(step.last for step in steps):
        last = torch.tensor([step.last for step in steps], device=device)
        out.append(stage.flush(state, None if all(step.last for step in steps) else last))
    joined = Padded.concat(out)
    rows = Padded(joined.values.cpu(), joined.lengths.cpu()).rows()
    if len(steps) > 1:
        for row, step in enumerate(steps):
            _replace(step.state, state_row(state, row))
    seconds = time.perf_counter() - start
    return [StepResult(values.clone() if len(steps) > 1 else values, seconds) for values in rows]


def _replace(state: Any, new: Any) -> None:
    for item in dataclasses.fields(state):
        setattr(state, item.name, getattr(new, item.name))
