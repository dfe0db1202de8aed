"""The engine: prompt ids in, reply ids out, one by one, every one allowed by the interleave.

`Engine` is the interface that sessions talk to; `PlainEngine` is our own engine behind it, without any library but the
model's: one thread, in which every step runs the model once over all replies under way. It keeps the keys and values of
the last conversations, so a turn that continues one costs only its new ids.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from duologue.interleave import INTERLEAVED, Schedule
from duologue.language.keyvalues import KeyValues, RaggedBatchModel
from duologue.language.requests import Request, RunningRequests, engine_failed
from duologue.language.sampling import KindMasks, Sampling
from duologue.layers import num_step_threads
from duologue.vocabulary import Vocabulary

MAX_SESSIONS = 32
MAX_CACHED_TOKENS = 65536
MAX_UNREAD = 64
MAX_STEP_TOKENS = 256


class Engine(Protocol):
    """What every engine offers to sessions. Methods may be called from the event loop: they never block it."""

    @property
    def max_positions(self) -> int:
        """Ids that a prompt and its reply may have together."""
        ...

    @property
    def cached_tokens(self) -> int:
        """Ids whose keys and values are held."""
        ...

    @property
    def running(self) -> int:
        """Replies under way."""
        ...

    def cached_prefix(self, prompt_ids: Sequence[int]) -> int:
        """Ids at the beginning of a prompt that need not be run any more; 0 where the engine cannot tell."""
        ...

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        schedule: Schedule = INTERLEAVED,
        request_id: str | None = None,
    ) -> AsyncIterator[int]:
        """Ids of one reply as they are made.

        The stream ends after the end id; without one when `max_tokens` is reached (then the reply may stand as it is)
        or when the request is cancelled (then it is cut anywhere, see `interleave.legal_prefix`). A reader that stops
        reading holds the reply up after a bounded number of ids.

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, more ids than the model has positions, a
                `request_id` that is running.
            EngineFull: as many replies are under way as the engine makes at a time, or their ids leave no room.
            RuntimeError: the engine failed while the reply was made; the reason is its cause.
        """
        ...

    async def warm(self, prompt_ids: Sequence[int]) -> None:
        """Prefills the beginning of a prompt that will come. Does nothing when running replies leave no room for it."""
        ...

    def cancel(self, request_id: str) -> None:
        """Ends a stream before its next id; a request that is not running is left alone."""
        ...


@dataclass(eq=False)
class CachedSequence:
    """Keys and values of `ids`, and the scores (V,) float32 of the id after them."""

    ids: list[int]
    cache: KeyValues = field(default_factory=KeyValues)
    scores: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(eq=False)
class _EngineJob:
    """A conversation in the engine's thread: `waiting` ids will be run behind the kept ones, then the request draws
    its next id from the scores. One without a request is a prompt that is warmed for later."""

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


class PlainEngine:
    """One step of the model for the next id of every reply under way, on the model's device.

    Long prompts are run in pieces beside the other replies' ids, so that they delay those by a bounded time.

    Args:
        model: a causal LM of transformers over the joint vocabulary, in evaluation mode, with full attention.
        max_sessions: replies that can be under way at the same time.
        max_cached_tokens: ids whose keys and values are held at most: those that running replies may need, and beside
            them kept conversations as long as there is room. None takes 65536, or the model's positions if those are
            more.
        max_caches: conversations whose keys and values are kept when their reply has ended, the last used ones.
        max_unread: ids of a reply that wait for their reader at most.
        max_step_tokens: ids of prompts that one step runs.

    Attributes:
        language: the model as it was given, for those who call it without the engine.
        model: what the engine runs: the same weights, in modules and a config of its own.
        num_computed: ids that were run through the model so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        max_sessions: int = MAX_SESSIONS,
        max_cached_tokens: int | None = None,
        max_caches: int = MAX_SESSIONS,
        max_unread: int = MAX_UNREAD,
        max_step_tokens: int = MAX_STEP_TOKENS,
    ) -> None:
        self.num_computed = 0
        masks = KindMasks(vocabulary, model.get_output_embeddings().weight.shape[0], model.device)
        max_positions: int = model.config.get_text_config().max_position_embeddings
        if max_cached_tokens is None:
            max_cached_tokens = max(MAX_CACHED_TOKENS, max_positions)
        self._requests = RunningRequests(
            vocabulary, masks, max_positions, max_sessions, max_cached_tokens, max_unread, on_room=self._work_on
        )
        self.language = model
        self._batched_model = RaggedBatchModel(model)
        self.model = self._batched_model.model
        self._max_caches, self._max_step_tokens = max_caches, max_step_tokens
        self._kept: list[
            CachedSequence
        ] = []  # the longest unused first; like `_rows` it belongs to the engine's thread
        self._rows: list[_EngineJob] = []
        self._arrived: list[_EngineJob] = []
        self._is_working = False
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(1, "language", torch.set_num_threads, (num_step_threads(model),))

    @property
    def max_positions(self) -> int:
        """See `Engine`."""
        return self._requests.max_positions

    @property
    def max_sessions(self) -> int:
        """See `Engine`."""
        return self._requests.max_sessions

    @property
    def max_cached_tokens(self) -> int:
        """Ids whose keys and values are held at most."""
        return self._requests.max_cached_tokens

    @property
    def running(self) -> int:
        """See `Engine`."""
        return len(self._requests)

    @property
    def cached_tokens(self) -> int:
        """See `Engine`: ids of running replies and of kept conversations."""
        return sum(kept.cache.length for kept in self._all_kept())

    def cached_prefix(self, prompt_ids: Sequence[int]) -> int:
        """See `Engine.cached_prefix`."""
        return max((_common_prefix(kept.ids, prompt_ids) for kept in self._all_kept()), default=0)

    def _all_kept(self) -> list[CachedSequence]:
        return [*self._kept, *(row.kept for row in [*self._rows])]

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        schedule: Schedule = INTERLEAVED,
        request_id: str | None = None,
    ) -> AsyncIterator[int]:
        """See `Engine.generate`."""
        request = self._requests.admit(prompt_ids, sampling, schedule, request_id)
        try:
            self._begin(request)
            while (token := await request.read()) is not None:
                yield token
        finally:
            self._leave(request)

    def stream(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        schedule: Schedule = INTERLEAVED,
        request_id: str | None = None,
    ) -> Iterator[int]:
        """The synchronous side of `generate`; a prompt that no engine could take is refused at once."""
        prompt = self._requests.check(prompt_ids, sampling.max_tokens)
        return self._stream(prompt, sampling, schedule, request_id)

    async def warm(self, prompt_ids: Sequence[int]) -> None:
        """See `Engine.warm`."""
        await asyncio.wrap_future(self._warm(prompt_ids))

    def prefill(self, prompt_ids: Sequence[int]) -> None:
        """The synchronous side of `warm`."""
        self._warm(prompt_ids).result()

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        if self._requests.cancel(request_id) is not None:
            self._work_on()

    def _stream(
        self, prompt: list[int], sampling: Sampling, schedule: Schedule, request_id: str | None
    ) -> Iterator[int]:
        request = self._requests.admit(prompt, sampling, schedule, request_id)
        try:
            self._begin(request)
            while (token := request.read_now()) is not None:
                yield token
        finally:
            self._leave(request)

    def _begin(self, request: Request) -> None:
        self._work_on(_EngineJob(CachedSequence([]), request.prompt, request))

    def _leave(self, request: Request) -> None:
        self._requests.remove(request)
        self._work_on()

    def _warm(self, prompt_ids: Sequence[int]) -> Future[None]:
        row = _EngineJob(CachedSequence([]), self._requests.check(prompt_ids), None)
        self._work_on(row)
        return row.warmed

    def _work_on(self, arrived: _EngineJob | None = None) -> None:
        """Wakes the engine's thread: a row has arrived, or one may go on or has to go."""
        with self._lock:
            if arrived is not None:
                self._arrived.append(arrived)
            if not self._is_working:
                self._is_working = True
                self._executor.submit(self._work)

    def _work(self) -> None:
        """The engine's thread: steps until there is nothing to do."""
        while True:
            with self._lock:
                arrived, self._arrived = self._arrived, []
                if not arrived and not any(row.runnable for row in self._rows):
                    self._is_working = False
                    return
            try:
                with torch.inference_mode():
                    self._dismiss()  # first, so that a reply's conversation can be gone on with at once
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
        """Ends all that runs. What was kept before is whole and stays."""
        self._rows = []
        self._requests.fail(error)
        for row in rows:
            if not row.warmed.done():
                row.warmed.set_exception(engine_failed(error))

    def _enter(self, row: _EngineJob) -> None:
        """Gives a new row what is known of the beginning of its prompt."""
        prompt = row.waiting
        if row.request is None and len(prompt) + self._requests.num_reserved > self.max_cached_tokens:
            row.warmed.set_result(None)
            return
        row.kept = self._take(prompt)
        row.waiting = prompt[len(row.kept.ids) :]
        self._rows.append(row)
        if not row.waiting and row.request is not None and not row.request.ended:
            self._draw(row)

    def _step(self) -> None:
        """Runs the model over the next ids of all rows that may go on: those with one id first, then what of longer
        prompts has room."""
        rows, budget = [], self._max_step_tokens
        for row in sorted((row for row in self._rows if row.waiting), key=lambda row: len(row.waiting) > 1):
            if row.ended or not row.runnable or budget <= 0:
                continue
            rows.append((row, row.waiting[: 1 if len(row.waiting) == 1 else budget]))
            budget -= len(rows[-1][1]) if len(row.waiting) > 1 else 0
        if not rows:
            return
        scores = self._run([ids for _, ids in rows], [row.kept for row, _ in rows])
        for (row, ids), next_scores in zip(rows, scores, strict=True):
            row.kept.ids += ids
            row.kept.scores = next_scores
            row.waiting = row.waiting[len(ids) :]
            if not row.waiting and row.request is not None:
                self._draw(row)

    def _run(self, ids: list[list[int]], kept: list[CachedSequence]) -> Tensor:
        self.num_computed += sum(map(len, ids))
        return self._batched_model.step(ids, [one.cache for one in kept])

    def _draw(self, row: _EngineJob) -> None:
        assert row.request is not None
        row.waiting = [row.request.choose(row.kept.scores)]

    def _dismiss(self) -> list[_EngineJob]:
        """Takes out the rows that have ended and keeps their conversations as the last used ones. Gives the warmed."""
        ended = [row for row in self._rows if row.ended]
        for row in ended:
            self._rows.remove(row)
            if row.kept.ids:
                self._kept.append(row.kept)
        return [row for row in ended if row.request is None]

    def _evict(self) -> None:
        """Drops the conversations that were unused for longest, beyond the bounds."""
        needed = self._requests.num_reserved
        needed += sum(len(row.kept.ids) + len(row.waiting) for row in self._rows if row.request is None)
        while self._kept and (
            len(self._kept) > self._max_caches
            or needed + sum(len(kept.ids) for kept in self._kept) > self.max_cached_tokens
        ):
            self._kept.pop(0)

    def _take(self, prompt: list[int]) -> CachedSequence:
        """What is known of the longest beginning of a prompt.

        A kept conversation that the prompt continues is taken out, because it will grow, and so is a prompt that is
        still being warmed; of one that goes another way the shared part is copied, because it may go on too.
        """
        best, shared = None, 0
        for kept in self._all_kept():
            if (common := _common_prefix(kept.ids, prompt)) > shared:
                best, shared = kept, common
        if best is None:
            return CachedSequence([])
        if shared == len(best.ids):
            if best in self._kept:
                self._kept.remove(best)
                return best
            row = next(row for row in self._rows if row.kept is best)
            if row.request is None:
                self._rows.remove(row)
                row.warmed.set_result(None)
                return best
        # Scores are known only behind the last kept id, so a copy leaves one id of the prompt to be run.
        shared = min(shared, len(prompt) - 1)
        return CachedSequence(prompt[:shared], best.cache.copy(shared))


def check_engine(name: str) -> None:
    """Raises ValueError for any engine but "plain"."""
    if name == "continuous":
        raise ValueError("engine 'continuous' was removed, because it was slower than 'plain': leave the option out")
    if name != "plain":
        raise ValueError(f"unknown engine {name!r}; the only choice is plain")


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
