"""The engine: prompt ids in, reply ids out, one by one, every one allowed by the interleave.

`Engine` is the interface that sessions talk to; `PlainEngine` is the plain loop behind it: prefill, then one step for
each id. It keeps the keys and values of the last conversations, so a turn that continues one costs only its new ids.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from duologue.interleave import INTERLEAVED, InterleaveState, Schedule
from duologue.language.sampling import KindMasks, Sampling, choose, within_budget
from duologue.vocabulary import Vocabulary


class Engine(Protocol):
    """What every engine offers to sessions. Methods may be called from the event loop: they never block it."""

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        schedule: Schedule = INTERLEAVED,
        request_id: str | None = None,
    ) -> AsyncIterator[int]:
        """Ids of one reply as they are made.

        The stream ends after the end id; without one when `max_tokens` is reached (then the reply may stand as it is)
        or when the request is cancelled (then it is cut anywhere, see `interleave.legal_prefix`).

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, more ids than the model has positions, a
                `request_id` that is running.
        """
        ...

    async def warm(self, prompt_ids: Sequence[int]) -> None:
        """Prefills the beginning of a prompt that will come."""
        ...

    def cancel(self, request_id: str) -> None:
        """Ends a stream before its next id; a request that is not running is left alone."""
        ...


@dataclass
class _Kept:
    """Keys and values of `ids`, and the scores (V,) float32 of the id after them."""

    ids: list[int]
    cache: DynamicCache
    scores: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(eq=False)
class _Request:
    id: str | None
    cancelled: bool = False


class PlainEngine:
    """One step of the model for each id and request, on the model's device. Requests that run at the same time take
    turns id by id.

    Args:
        model: a causal LM of transformers over the joint vocabulary, in evaluation mode.
        max_caches: conversations whose keys and values are kept.
        max_cached_tokens: ids in all kept conversations together; the longest unused go first.

    Attributes:
        max_positions: ids that a prompt and its reply may have together.
    """

    def __init__(
        self, model: PreTrainedModel, vocabulary: Vocabulary, max_caches: int = 8, max_cached_tokens: int = 32768
    ) -> None:
        self.model = model
        self._vocabulary = vocabulary
        self._masks = KindMasks(vocabulary, model.get_output_embeddings().weight.shape[0], model.device)
        self.max_positions: int = model.config.max_position_embeddings
        self._positions = torch.arange(self.max_positions, device=model.device)[None]
        self._max_caches, self._max_cached_tokens = max_caches, max_cached_tokens
        self._kept: list[_Kept] = []  # the longest unused first
        self._running: dict[str, _Request] = {}
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(1, "language")

    def stream(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        schedule: Schedule = INTERLEAVED,
        request_id: str | None = None,
    ) -> Iterator[int]:
        """The synchronous side of `generate`, with the same errors, raised at once."""
        return self._begin(prompt_ids, sampling, schedule, request_id)[0]

    def _begin(
        self, prompt_ids: Sequence[int], sampling: Sampling, schedule: Schedule, request_id: str | None
    ) -> tuple[Generator[int, None, None], _Request]:
        prompt = list(prompt_ids)
        self._check(prompt)
        if len(prompt) + sampling.max_tokens > self.max_positions:
            raise ValueError(
                f"a prompt of {len(prompt)} ids and a reply of up to max_tokens = {sampling.max_tokens} do not fit the "
                f"{self.max_positions} positions of the model"
            )
        request = _Request(request_id)
        if request_id is not None:
            if request_id in self._running:
                raise ValueError(f"request {request_id!r} is running; every request needs an id of its own")
            self._running[request_id] = request
        return self._reply(prompt, sampling, schedule, request), request

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        schedule: Schedule = INTERLEAVED,
        request_id: str | None = None,
    ) -> AsyncIterator[int]:
        """See `Engine.generate`."""
        stream, request = self._begin(prompt_ids, sampling, schedule, request_id)
        loop = asyncio.get_running_loop()
        try:
            while (token := await loop.run_in_executor(self._executor, next, stream, None)) is not None:
                yield token
        finally:
            # Behind the step that may still be under way: the executor has one thread.
            self._executor.submit(self._close, stream, request)

    async def warm(self, prompt_ids: Sequence[int]) -> None:
        """See `Engine.warm`."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self.prefill, prompt_ids)

    def prefill(self, prompt_ids: Sequence[int]) -> None:
        """The synchronous side of `warm`."""
        prompt = list(prompt_ids)
        self._check(prompt)
        self._keep(self._prefilled(prompt))

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        if (request := self._running.pop(request_id, None)) is not None:
            request.cancelled = True

    @property
    def cached_tokens(self) -> int:
        """Ids whose keys and values are kept for conversations that may go on."""
        with self._lock:
            return sum(len(kept.ids) for kept in self._kept)

    def _check(self, prompt: list[int]) -> None:
        if not prompt:
            raise ValueError("a prompt must hold at least one id")
        if len(prompt) > self.max_positions:
            raise ValueError(
                f"a prompt of {len(prompt)} ids does not fit the {self.max_positions} positions of the model"
            )
        for token in (min(prompt), max(prompt)):
            self._vocabulary.kind(token)

    def _reply(
        self, prompt: list[int], sampling: Sampling, schedule: Schedule, request: _Request
    ) -> Generator[int, None, None]:
        generator = torch.Generator(self.model.device).manual_seed(sampling.seed)
        state = InterleaveState(schedule)
        kept: _Kept | None = None
        try:
            for remaining in range(sampling.max_tokens, 0, -1):
                if request.cancelled:
                    return
                if kept is None:
                    kept = self._prefilled(prompt)
                allowed = within_budget(state, remaining)
                token = choose(
                    kept.scores + self._masks.get(allowed, sampling.text_language),
                    sampling.temperature_for(allowed),
                    sampling.top_p,
                    sampling.top_k,
                    generator,
                )
                state.advance(self._vocabulary.kind(token))
                yield token
                if state.ended:
                    return
                if remaining > 1:
                    self._feed(kept, [token])
        finally:
            if kept is not None:
                self._keep(kept)
            self._forget(request)

    def _close(self, stream: Generator[int, None, None], request: _Request) -> None:
        stream.close()
        self._forget(request)  # a stream that was never begun does not do it itself

    def _forget(self, request: _Request) -> None:
        """Frees the id of a request, unless a later one has it by now."""
        if request.id is not None and self._running.get(request.id) is request:
            del self._running[request.id]

    def _prefilled(self, prompt: list[int]) -> _Kept:
        """Keys, values and scores of a whole prompt, from what is kept of its beginning."""
        kept = self._take(prompt)
        if len(kept.ids) < len(prompt):
            self._feed(kept, prompt[len(kept.ids) :])
        return kept

    @torch.inference_mode()
    def _feed(self, kept: _Kept, ids: list[int]) -> None:
        """Runs new ids behind the kept ones."""
        start = len(kept.ids)
        output = self.model(
            input_ids=torch.tensor([ids], device=self.model.device),
            position_ids=self._positions[:, start : start + len(ids)],
            past_key_values=kept.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        kept.scores = output.logits[0, -1].float()
        kept.ids += ids

    def _take(self, prompt: list[int]) -> _Kept:
        """The kept conversation that shares the longest beginning with the prompt.

        One that the prompt continues is taken out, because it will grow; of one that goes another way the shared part
        is copied, because its own conversation may go on too.
        """
        with self._lock:
            best, shared = None, 0
            for kept in self._kept:
                if (common := _common_prefix(kept.ids, prompt)) > shared:
                    best, shared = kept, common
            if best is not None and shared == len(best.ids):
                self._kept.remove(best)
                return best
        # Scores are known only behind the last kept id, so a copy leaves one id of the prompt to be run.
        shared = min(shared, len(prompt) - 1)
        cache = DynamicCache(config=self.model.config)
        if best is not None and shared > 0:
            for index, layer in enumerate(best.cache.layers):
                cache.update(layer.keys[:, :, :shared].clone(), layer.values[:, :, :shared].clone(), index)
        return _Kept(prompt[:shared], cache)

    def _keep(self, kept: _Kept) -> None:
        """Keeps a conversation as the last used one and drops the longest unused beyond the bounds."""
        with self._lock:
            self._kept.append(kept)
            while len(self._kept) > self._max_caches or sum(len(k.ids) for k in self._kept) > self._max_cached_tokens:
                self._kept.pop(0)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
