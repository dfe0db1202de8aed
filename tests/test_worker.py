"""The worker: steps that wait together run as one batch, the most urgent first, and nobody's result depends on it."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from duologue.conversation.worker import StepResult, Worker, WorkerFull
from duologue.layers import Padded, num_step_threads, reset_rows

GIVE_UP_S = 300.0  # a busy machine is not a failing test


@dataclass
class SumState:
    total: Tensor
    held: Padded
    factor: float = 1.0


class Sum(nn.Module):
    """Running sums, one value behind: a stage whose results are easily told. Refuses negative numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.batches: list[list[int]] = []
        self.pause_s = 0.0  # for each value, on a clock of its own
        self.worked_s = 0.0

    def init_state(self, factor: float = 1.0) -> SumState:
        return SumState(torch.zeros(1), Padded(torch.zeros(1, 0), torch.zeros(1, dtype=torch.int64)), factor)

    def step(self, x: Padded, state: SumState) -> Padded:
        self.batches.append(x.lengths.tolist())
        self.worked_s += self.pause_s * x.values.numel()
        x = x.zeroed()
        if bool((x.values < 0).any()):
            raise ValueError("negative")
        sums = state.total[:, None] + x.values.cumsum(1) * state.factor
        out = Padded.concat([state.held, Padded(sums, x.lengths)])
        state.total = state.total + x.values.sum(1) * state.factor
        keep = out.lengths.clamp(max=1)
        state.held = Padded(out.values.gather(1, (out.lengths - 1).clamp(min=0)[:, None]), keep)
        return Padded(out.values, out.lengths - keep)

    def flush(self, state: SumState, rows: Tensor | None = None) -> Padded:
        rows = torch.ones(len(state.total), dtype=torch.bool) if rows is None else rows
        out = Padded(state.held.values, state.held.lengths * rows)
        fresh = SumState(
            torch.zeros_like(state.total), Padded(state.held.values[:, :0], 0 * state.held.lengths), state.factor
        )
        reset_rows(state, fresh, rows)
        return out


@dataclass(frozen=True)
class StageTime:
    """In place of the module `time`: only the work of a stage takes time."""

    stage: Sum

    def perf_counter(self) -> float:
        return self.stage.worked_s

    def monotonic(self) -> float:
        return time.monotonic()


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


@pytest.fixture
def stage() -> Sum:
    return Sum()


def held_up(worker: Worker) -> Callable[[], None]:
    """Keeps the worker busy until the returned function is called, so that jobs wait together."""
    begun, go = threading.Event(), threading.Event()

    def wait() -> bool:
        begun.set()
        return go.wait(GIVE_UP_S)

    async def block() -> None:
        worker.submit(wait)

    asyncio.run(block())
    assert begun.wait(GIVE_UP_S)
    return go.set


def values(future: "Future[StepResult]") -> list[float]:
    return future.result(GIVE_UP_S).values.tolist()


def test_steps_that_wait_together_run_as_one_batch(worker: Worker, stage: Sum) -> None:
    states = [stage.init_state() for _ in range(3)]
    go = held_up(worker)
    rows = [torch.arange(1.0, 4.0), torch.tensor([5.0, 5.0]), torch.tensor([1.0, 0.0, 2.0, 0.0])]
    futures = [worker.step(stage, x, state, last=i == 1) for i, (x, state) in enumerate(zip(rows, states, strict=True))]
    go()
    assert [values(f) for f in futures] == [[1.0, 3.0], [5.0, 10.0], [1.0, 1.0, 3.0]]
    assert stage.batches == [[3, 2, 4]]
    assert values(worker.step(stage, torch.tensor([1.0]), states[2])) == [3.0]
    assert values(worker.step(stage, torch.tensor([1.0]), states[0], last=True)) == [6.0, 7.0]
    assert values(worker.step(stage, torch.tensor([1.0]), states[1], last=True)) == [1.0]  # flushed, so fresh
    stats = worker.stats()
    assert (stats.num_jobs, stats.batch_sizes, stats.num_waiting) == (7, {1: 3, 3: 1}, 0)
    assert stats.mean_batch_size == 1.5


def test_other_settings_other_lengths_and_full_batches_go_apart(stage: Sum) -> None:
    worker = Worker(max_rows=2)
    go = held_up(worker)
    one, two = stage.init_state(), stage.init_state(factor=2.0)
    long = stage.init_state()
    more = [stage.init_state() for _ in range(3)]
    futures = [worker.step(stage, torch.ones(2), state) for state in (one, two)]
    futures.append(worker.step(stage, torch.ones(50), long))
    futures += [worker.step(stage, torch.ones(2), state) for state in more]
    go()
    assert [values(f)[0] for f in futures] == [1.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    assert stage.batches == [[2, 2], [2], [50], [2, 2]]
    worker.close()


def test_a_batch_is_no_longer_than_may_be_waited_for(stage: Sum, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the pace of the steps before: with 100 ms for each value there is room for two rows of two."""
    monkeypatch.setattr("duologue.conversation.worker.time", StageTime(stage))
    worker = Worker(max_batch_s=0.58)
    stage.pause_s = 0.1
    worker.step(stage, torch.ones(2), stage.init_state()).result(GIVE_UP_S)
    go = held_up(worker)
    futures = [worker.step(stage, torch.ones(2), stage.init_state()) for _ in range(3)]
    stage.pause_s = 0.0
    go()
    for future in futures:
        future.result(GIVE_UP_S)
    assert stage.batches == [[2], [2, 2], [2]]
    worker.close()


def test_the_earliest_deadline_goes_first(worker: Worker, stage: Sum) -> None:
    done: list[float] = []
    go = held_up(worker)
    now = time.monotonic()
    futures = []
    for seconds in (3.0, 1.0, 2.0):
        # Unequal settings keep them from being joined.
        future = worker.step(stage, torch.ones(1), stage.init_state(factor=seconds), deadline=now + seconds)
        future.add_done_callback(lambda _, seconds=seconds: done.append(seconds))  # type: ignore[misc]
        futures.append(future)
    go()
    for future in futures:
        future.result(GIVE_UP_S)
    assert done == [1.0, 2.0, 3.0]


def test_a_bad_row_fails_alone(worker: Worker, stage: Sum) -> None:
    go = held_up(worker)
    good, bad = stage.init_state(), stage.init_state()
    futures = [worker.step(stage, torch.tensor(x), s, last=True) for x, s in (([2.0, 3.0], good), ([-1.0, 1.0], bad))]
    go()
    assert values(futures[0]) == [2.0, 5.0]
    with pytest.raises(ValueError, match="negative"):
        futures[1].result(GIVE_UP_S)


def test_a_cancelled_step_leaves_its_state_alone(worker: Worker, stage: Sum) -> None:
    go = held_up(worker)
    state = stage.init_state()
    future = worker.step(stage, torch.ones(3), state)
    assert future.cancel()
    go()
    assert values(worker.step(stage, torch.ones(1), state, last=True)) == [1.0]
    assert worker.stats().num_cancelled == 1


def test_the_queue_is_bounded(stage: Sum) -> None:
    worker = Worker(max_waiting=2)
    go = held_up(worker)
    futures = [worker.step(stage, torch.ones(1), stage.init_state(factor=float(i))) for i in range(2)]
    with pytest.raises(WorkerFull, match="2 jobs are already queued"):
        worker.step(stage, torch.ones(1), stage.init_state())
    futures.pop().cancel()  # makes room
    futures.append(worker.step(stage, torch.ones(1), stage.init_state()))
    go()
    for future in futures:
        future.result(GIVE_UP_S)
    stats = worker.stats()
    assert (stats.num_refused, stats.num_cancelled, stats.most_waiting) == (1, 1, 2)
    worker.close()
    with pytest.raises(WorkerFull, match="closed"):
        worker.step(stage, torch.ones(1), stage.init_state())


def test_close_cancels_what_waits(stage: Sum) -> None:
    worker = Worker()
    go = held_up(worker)
    future = worker.step(stage, torch.ones(1), stage.init_state())
    closing = threading.Thread(target=worker.close)
    closing.start()
    with pytest.raises(CancelledError):  # while the worker is still busy
        future.result(GIVE_UP_S)
    go()
    closing.join(GIVE_UP_S)
    assert not closing.is_alive()


def test_many_threads_and_loops_at_once(worker: Worker, stage: Sum) -> None:
    totals: dict[int, list[float]] = {}

    async def talk(name: int) -> None:
        state = stage.init_state()
        for i in range(20):
            await asyncio.wrap_future(worker.step(stage, torch.full((1 + i % 3,), float(name)), state))
        last = await asyncio.wrap_future(worker.step(stage, torch.ones(0), state, last=True))
        totals[name] = last.values.tolist()
        assert (await worker.submit(lambda: name))[0] == name

    threads = [threading.Thread(target=lambda name=name: asyncio.run(talk(name))) for name in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GIVE_UP_S)
    steps = sum(1 + i % 3 for i in range(20))
    assert totals == {name: [float(name * steps)] for name in range(1, 7)}


def test_odd_work_raises_where_it_is_awaited(worker: Worker) -> None:
    def fail() -> None:
        raise RuntimeError("no")

    async def ask() -> None:
        with pytest.raises(RuntimeError, match="no"):
            await worker.submit(fail)
        assert torch.is_inference_mode_enabled() is False
        assert (await worker.submit(torch.is_inference_mode_enabled))[0] is True

    asyncio.run(ask())


def test_small_models_step_in_one_thread_and_the_caller_keeps_its_own() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert num_step_threads(nn.Linear(10, 10), nn.Linear(10, 10)) == 1
        assert num_step_threads(nn.Linear(10_000, 6_000, device="meta")) == 2
        for wanted, expected in ((1, 1), (None, 2)):
            worker = Worker(num_threads=wanted)

            async def threads(worker: Worker = worker) -> int:
                return (await worker.submit(torch.get_num_threads))[0]

            assert asyncio.run(threads()) == expected
            worker.close()
            assert torch.get_num_threads() == 2
            torch.set_num_threads(2)
    finally:
        torch.set_num_threads(before)
