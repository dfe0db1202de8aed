"""The engine: prompt ids in, reply ids out, constrained by the interleave.

Sessions use the interface `Engine`. `PlainEngine` implements it with one thread and transformers alone: every step runs
the model once over all running replies. It keeps the KV caches of recent conversations, so a continued one costs only
its new ids. A `Stepper` runs the steps.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from duologue.interleave import INTERLEAVED, Schedule
from duologue.language.requests import Request, RequestEngine, RunningRequests, engine_failed
from duologue.language.sampling import Sampling
from duologue.language.stepping import EagerStepper, Stepped, Stepper, StepRow
from duologue.layers import num_step_threads
from duologue.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_SESSIONS = 32
MAX_CACHED_TOKENS = 65536
MAX_UNREAD = 64
MAX_STEP_TOKENS = 256


class Engine(Protocol):
    """The interface of engines. No method blocks the event loop."""

    @property
    def max_positions(self) -> int:
        """Maximum ids of a prompt and its reply together."""
        ...

    @property
    def cached_tokens(self) -> int:
        """Number of ids in the KV caches."""
        ...

    @property
    def running(self) -> int:
        """Number of running replies."""
        ...

    def cached_prefix(self, prompt_ids: Sequence[int]) -> int:
        """Returns the number of leading prompt ids in a KV cache; 0 if unknown."""
        ...

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        schedule: Schedule = INTERLEAVED,
        request_id: str | None = None,
    ) -> AsyncIterator[int]:
        """Yields the ids of one reply.

        The stream ends after the end id. At `max_tokens` it ends without one, where a reply may end. A cancelled stream
        is cut anywhere, see `interleave.legal_prefix`. A slow reader pauses the reply after a bounded number of ids.

        Raises:
            ValueError: an empty prompt, an unknown id, too many ids, or a `request_id` that is running.
            EngineFull: too many replies are running, or their ids leave no room.
            RuntimeError: the engine failed; the cause is attached.
        """
        ...

    async def warm(self, prompt_ids: Sequence[int]) -> None:
        """Prefills the prefix of a future prompt, unless running replies leave no room."""
        ...

    def cancel(self, request_id: str) -> None:
        """Ends a stream before its next id; unknown requests are ignored."""
        ...


@dataclass(eq=False)
class CachedSequence:
    """Ids whose keys and values lie in a slot, and the scores (V,) float32 of the next id if they were asked for."""

    ids: list[int] = field(default_factory=list)
    slot: int = -1
    scores: Tensor | None = None


@dataclass(eq=False)
class _EngineJob:
    """A sequence in the engine's thread: `waiting` ids are to be run after the cached ones.

    Without a request it is a prompt to prefill.
    """

    kept: CachedSequence
    waiting: list[int]
    request: Request | None
    warmed: Future[None] = field(default_factory=Future)

    @property
    def ended(self) -> bool:
        return not self.waiting if self.request is None else self.request.ended

    @property
    def runnable(self) -> bool:
        return self.ended or self.request is None or not self.request.held


class PlainEngine(RequestEngine):
    """An engine that computes the next id of every running reply in one model step.

    Long prompts run in chunks together with the other replies, which bounds their delay.

    Args:
        model: a causal LM of transformers over the joint vocabulary, in evaluation mode, with full attention; None if
            the stepper has its own weights.
        max_sessions: maximum number of running replies.
        max_cached_tokens: maximum ids in the KV caches of running replies and recent conversations. None takes 65536,
            or the model's positions if more.
        max_caches: maximum number of cached conversations without a running reply.
        max_unread: maximum unread ids of a reply.
        max_step_tokens: maximum prompt ids of one step.
        stepper: runs the steps; None for an `EagerStepper` of the model.

    Attributes:
        language: the model as given; None if the stepper has its own weights.
        num_computed: ids run through the model so far.
    """

    def __init__(
        self,
        model: PreTrainedModel | None,
        vocabulary: Vocabulary,
        max_sessions: int = MAX_SESSIONS,
        max_cached_tokens: int | None = None,
        max_caches: int = MAX_SESSIONS,
        max_unread: int = MAX_UNREAD,
        max_step_tokens: int = MAX_STEP_TOKENS,
        stepper: Stepper | None = None,
    ) -> None:
        self.num_computed = 0
        if stepper is None:
            if model is None:
                raise ValueError("an engine needs a model or a stepper")
            stepper = EagerStepper(model, vocabulary)
        max_positions = stepper.max_positions
        if max_cached_tokens is None:
            max_cached_tokens = max(MAX_CACHED_TOKENS, max_positions)
        self._requests = RunningRequests(
            vocabulary, max_positions, max_sessions, max_cached_tokens, max_unread, on_room=self._work_on
        )
        self.language = model
        self.stepper: Stepper = stepper
        self._max_caches, self._max_step_tokens = max_caches, max_step_tokens
        self._kept: list[
            CachedSequence
        ] = []  # the longest unused first; like `_rows` it belongs to the engine's thread
        self._rows: list[_EngineJob] = []
        self._free_slots: list[int] = []  # a heap: the lowest free slots keep running replies close together
        self._num_slots = 0
        self._arrived: list[_EngineJob] = []
        self._is_working = False
        self._lock = threading.Lock()
        num_threads = 1 if model is None else num_step_threads(model)
        self._executor = ThreadPoolExecutor(1, "language", torch.set_num_threads, (num_threads,))

    @property
    def cached_tokens(self) -> int:
        return sum(len(kept.ids) for kept in self._all_kept())

    @property
    def busy(self) -> bool:
        """Whether the engine's thread computes. A reply that is paused for its reader does not count."""
        with self._lock:
            return self._is_working

    def cached_prefix(self, prompt_ids: Sequence[int]) -> int:
        return max((common_prefix(kept.ids, prompt_ids) for kept in self._all_kept()), default=0)

    def _all_kept(self) -> list[CachedSequence]:
        return [*self._kept, *(row.kept for row in [*self._rows])]

    async def warm(self, prompt_ids: Sequence[int]) -> None:
        await asyncio.wrap_future(self._warm(prompt_ids))

    def prefill(self, prompt_ids: Sequence[int]) -> None:
        """Prefills a prompt in synchronous code."""
        self._warm(prompt_ids).result()

    def _begin(self, request: Request, schedule: Schedule) -> None:
        self._work_on(_EngineJob(CachedSequence(), request.prompt, request))

    def _leave(self, request: Request) -> None:
        self._requests.remove(request)
        self._work_on()

    def _warm(self, prompt_ids: Sequence[int]) -> Future[None]:
        row = _EngineJob(CachedSequence(), self._requests.check(prompt_ids), None)
        self._work_on(row)
        return row.warmed

    def _work_on(self, arrived: _EngineJob | None = None) -> None:
        """Wakes the engine's thread after a row arrived, resumed or ended."""
        with self._lock:
            if arrived is not None:
                self._arrived.append(arrived)
            if not self._is_working:
                self._is_working = True
                self._executor.submit(self._work)

    def _work(self) -> None:
        """Runs steps in the engine's thread until no row can continue."""
        while True:
            with self._lock:
                arrived, self._arrived = self._arrived, []
                if not arrived and not any(row.runnable for row in self._rows):
                    self._is_working = False
                    return
            try:
                with torch.inference_mode():
                    self._dismiss()  # first, so that ended conversations can be continued at once
                    for row in arrived:
                        self._enter(row)
                    self._evict()
                    self._step()
                    warmed = self._dismiss()
                    self._evict()
                for row in warmed:
                    row.warmed.set_result(None)
            except Exception as error:
                self._fail([*self._rows, *arrived], error)

    def _fail(self, rows: list[_EngineJob], error: Exception) -> None:
        """Ends all running rows with an error; earlier caches remain valid."""
        for row in self._rows:
            self._release(row.kept)
        self._rows = []
        self._requests.fail(error)
        for row in rows:
            if not row.warmed.done():
                row.warmed.set_exception(engine_failed(error))

    def _enter(self, row: _EngineJob) -> None:
        """Adds a new row with the cached prefix of its prompt."""
        prompt = row.waiting
        if row.request is None and not self._has_room(prompt):
            row.warmed.set_result(None)
            return
        row.kept = self._take(prompt)
        row.waiting = prompt[len(row.kept.ids) :]
        self._rows.append(row)
        if not row.waiting and row.request is not None and not row.request.ended:
            assert row.kept.scores is not None
            draw = row.request.drawing.row(self.stepper.masks)
            self._accept(row, self.stepper.draw([row.kept.scores], [draw])[0])

    def _has_room(self, prompt: list[int]) -> bool:
        """Whether a prompt can be prefilled without taking room from replies."""
        num_prefilled = sum(row.request is None for row in self._rows)
        fits = len(prompt) + self._requests.num_reserved <= self.max_cached_tokens
        return fits and (self.stepper.num_slots is None or num_prefilled < self._max_caches)

    def _step(self) -> None:
        """Runs the model over the next ids of all runnable rows: single ids first, then prompt chunks."""
        rows, budget = [], self._max_step_tokens
        for row in sorted((row for row in self._rows if row.waiting), key=lambda row: len(row.waiting) > 1):
            if row.ended or not row.runnable or budget <= 0:
                continue
            rows.append((row, row.waiting[: 1 if len(row.waiting) == 1 else budget]))
            budget -= len(rows[-1][1]) if len(row.waiting) > 1 else 0
        if not rows:
            return
        steps = [self._step_row(row, ids) for row, ids in rows]
        stepped = self._try_step(steps)
        self.num_computed += sum(len(ids) for _, ids in rows)
        for (row, ids), one in zip(rows, stepped, strict=True):
            row.kept.ids += ids
            row.kept.scores = one.scores
            row.waiting = row.waiting[len(ids) :]
            if one.token is not None:
                self._accept(row, one.token)

    def _step_row(self, row: _EngineJob, ids: list[int]) -> StepRow:
        is_last = len(ids) == len(row.waiting)
        draw = None
        if is_last and row.request is not None:
            draw = row.request.drawing.row(self.stepper.masks)
        return StepRow(row.kept.slot, len(row.kept.ids), ids, draw, is_last and row.request is None)

    def _try_step(self, steps: list[StepRow]) -> list[Stepped]:
        """Runs a step; if memory runs out, drops the kept caches and tries it once more."""
        try:
            return self.stepper.step(steps)
        except torch.OutOfMemoryError:
            if not self._kept:
                raise
        while self._kept:
            self._release(self._kept.pop(0))
        self.stepper.keep_only([row.kept.slot for row in self._rows])
        return self.stepper.step(steps)

    def _accept(self, row: _EngineJob, token: int) -> None:
        assert row.request is not None
        row.request.accept(token)
        row.waiting = [token]

    def _dismiss(self) -> list[_EngineJob]:
        """Removes ended rows, keeps their caches as the most recent, and returns the prefilled ones."""
        ended = [row for row in self._rows if row.ended]
        for row in ended:
            self._rows.remove(row)
            if row.kept.ids:
                self._kept.append(row.kept)
            else:
                self._release(row.kept)
        return [row for row in ended if row.request is None]

    def _evict(self) -> None:
        """Drops the least recently used caches beyond the limits."""
        needed = self._requests.num_reserved
        needed += sum(len(row.kept.ids) + len(row.waiting) for row in self._rows if row.request is None)
        while self._kept and (
            len(self._kept) > self._max_caches
            or needed + sum(len(kept.ids) for kept in self._kept) > self.max_cached_tokens
        ):
            self._release(self._kept.pop(0))

    def _take(self, prompt: list[int]) -> CachedSequence:
        """Returns the cache of the longest known prefix of a prompt.

        A cache that the prompt continues is moved, also from a prompt that is still prefilled. Otherwise the shared
        part is copied, because the other conversation may continue too.
        """
        best, shared = None, 0
        for kept in self._all_kept():
            if (common := common_prefix(kept.ids, prompt)) > shared:
                best, shared = kept, common
        if best is None:
            return CachedSequence(slot=self._new_slot())
        if shared == len(best.ids):
            if shared == len(prompt) and best.scores is None:
                del best.ids[-1]  # the last id runs again for its scores
            if best in self._kept:
                self._kept.remove(best)
                return best
            row = next(row for row in self._rows if row.kept is best)
            if row.request is None:
                self._rows.remove(row)
                row.warmed.set_result(None)
                return best
        # Scores exist only after the last cached id, so a copy leaves one prompt id to run.
        shared = min(shared, len(prompt) - 1)
        slot = self._new_slot(best)
        if slot == best.slot:  # no slot is free, and this is the last kept one
            return CachedSequence(prompt[:shared], slot)
        self.stepper.copy_prefix(best.slot, slot, shared)
        return CachedSequence(prompt[:shared], slot)

    def _new_slot(self, source: CachedSequence | None = None) -> int:
        """Returns a free slot, if need be that of the longest unused cache; that of `source` as the last choice."""
        if not self._free_slots and self._num_slots != self.stepper.num_slots:
            self._num_slots += 1
            return self._num_slots - 1
        if not self._free_slots:
            dropped = next((kept for kept in self._kept if kept is not source), source)
            assert dropped in self._kept, "running replies are fewer than slots"
            self._kept.remove(dropped)
            self._release(dropped)
        return heapq.heappop(self._free_slots)

    def _release(self, kept: CachedSequence) -> None:
        if kept.slot >= 0:
            self.stepper.release(kept.slot)
            heapq.heappush(self._free_slots, kept.slot)
        kept.slot = -1


def check_engine(name: str, url: str | None = None) -> None:
    """Raises ValueError for any engine but "plain", "graphs", and "vllm" with a URL."""
    if name == "continuous":
        raise ValueError("engine 'continuous' was removed, because it was slower than 'plain': leave the option out")
    if name not in ("plain", "graphs", "vllm"):
        raise ValueError(f"unknown engine {name!r}; the choices are plain, graphs and vllm")
    if name == "vllm" and url is None:
        raise ValueError("engine 'vllm' needs the URL of its server, such as http://127.0.0.1:8001")
    if name != "vllm" and url is not None:
        raise ValueError(f"engine {name!r} has no server, so it takes no URL")


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the number of equal leading ids; compares slices, because a loop over ids is slow."""
    a, b = (ids if isinstance(ids, list) else list(ids) for ids in (a, b))
    low, size, limit = 0, 16, min(len(a), len(b))
    while low + size <= limit and a[low : low + size] == b[low : low + size]:
        low += size
        size *= 2
    high = min(low + size, limit)
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
