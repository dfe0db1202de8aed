"""The engine of transformers' continuous batching behind our interface: paged keys and values, shared page by page
between prompts that begin alike.

The library runs the model and schedules; we draw the ids. Its hook is the list of logits processors of its manager,
which is called once in a step with the scores of all requests that get an id: ours lets every request draw from its own
row and leaves only the drawn id for the library to take. Its result handlers are not used: they say nothing of a
cancelled request, and they call every reader's event loop for all. Works with transformers 5.17 to 5.23, on which the
tests were run; `docs/engines.md` has the rest.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import itertools
import threading
import weakref
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from duologue.interleave import INTERLEAVED, Schedule
from duologue.language.engine import MAX_SESSIONS, MAX_STEP_TOKENS, MAX_UNREAD, running_requests
from duologue.language.requests import Limited, Request, engine_failed
from duologue.language.sampling import Sampling
from duologue.vocabulary import Vocabulary

PAGE_SIZE = 32
_POLL_S = 0.1


class ContinuousEngine(Limited):
    """`Engine` on transformers' continuous batching. The model belongs to it from then on.

    Its memory is taken at the first request and does not grow: pages for `max_cached_tokens` and a quarter more,
    because the library holds prompts back when less is free.

    Args:
        model: a causal LM of transformers over the joint vocabulary, in evaluation mode.
        max_sessions, max_cached_tokens, max_unread: as in `PlainEngine`. A request whose reader lags is taken out of
            the batch, its place stays reserved, and it is put back with what it has when the reader has caught up.
        page_size: ids of a page; prompts share whole pages.
        max_step_tokens: ids that one step runs.

    Raises:
        ValueError: off CUDA, psutil is missing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        max_sessions: int = MAX_SESSIONS,
        max_cached_tokens: int | None = None,
        max_unread: int = MAX_UNREAD,
        page_size: int = PAGE_SIZE,
        max_step_tokens: int = MAX_STEP_TOKENS,
    ) -> None:
        if model.device.type != "cuda" and importlib.util.find_spec("psutil") is None:
            raise ValueError(
                "the continuous engine needs psutil on this device, for transformers to see how much memory there is: "
                "pip install 'duologue[continuous]'"
            )
        self.model = model
        self._end_id = vocabulary.end_id
        self._requests = running_requests(model, vocabulary, max_sessions, max_cached_tokens, max_unread)
        self._page_size, self._max_step_tokens = page_size, max(max_step_tokens, 2 * max_sessions)
        self._drawing = _Drawing()
        self._names = map(str, itertools.count())
        self._manager: ContinuousBatchingManager | None = None
        self._lock = threading.Lock()

    @property
    def cached_tokens(self) -> int:
        """See `Engine`: ids of the replies in the batch; pages that are kept for later prompts are not counted."""
        return self._drawing.num_cached

    def cached_prefix(self, prompt_ids: Sequence[int]) -> int:
        """See `Engine`: the library does not tell which pages it has kept."""
        return 0

    @property
    def num_computed(self) -> int:
        """Ids that were run through the model so far."""
        return self._drawing.num_computed

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
            request.on_room = self._submit
            self._end_warming(request.prompt)
            self._submit(request)
            while (token := await request.read()) is not None:
                yield token
        finally:
            self._leave(request)

    async def warm(self, prompt_ids: Sequence[int]) -> None:
        """See `Engine.warm`."""
        prompt = self._requests.check(prompt_ids)
        if len(prompt) + self._requests.num_reserved > self.max_cached_tokens or len(prompt) == self.max_positions:
            return
        self._end_warming(prompt)
        name, warmed = f"warm-{next(self._names)}", Future[None]()
        self._drawing.warming[name] = prompt, warmed
        # The library shares no page of a request's last step: with two ids to draw this is not its last.
        self._add(name, prompt, 2)
        await asyncio.wrap_future(warmed)

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        if (request := self._requests.cancel(request_id)) is not None:
            self._take_out(request)

    def close(self) -> None:
        """Stops the library's thread; what runs ends with an error. The next request would start it again."""
        with self._lock:
            manager, self._manager = self._manager, None
        if manager is not None:
            manager.stop(hard_stop=True)

    def _leave(self, request: Request) -> None:
        self._requests.remove(request)
        self._take_out(request)

    def _take_out(self, request: Request) -> None:
        """Frees the pages of a request before the next step."""
        name = self._drawing.forget(request)
        with self._lock:
            if name is not None and not request.complete and self._manager is not None:
                self._manager.cancel_request(name)

    def _end_warming(self, prompt: list[int]) -> None:
        """Gives up warming beginnings of this prompt: it goes on with the pages that they have filled."""
        warming = self._drawing.warming
        for name, (beginning, warmed) in warming.copy().items():
            if prompt[: len(beginning)] == beginning and warming.pop(name, None) is not None:
                with self._lock:
                    if self._manager is not None:
                        self._manager.cancel_request(name)
                warmed.set_result(None)

    def _submit(self, request: Request) -> None:
        """Puts a request into the batch, with the ids that it has already."""
        if not request.ended:
            name = f"reply-{next(self._names)}"
            self._drawing.remember(name, request)
            self._add(name, request.prompt + request.ids, request.sampling.max_tokens - len(request.ids))
            if request.ended:  # cancelled in the meantime, when there was nothing to take out yet
                self._take_out(request)

    def _add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        with self._lock:
            manager = self._manager
            if manager is None or not manager.is_running():
                manager = self._manager = self._start()
            if manager.add_request(prompt, name, max_new_tokens=max_tokens, eos_token_id=self._end_id) is None:
                error = manager.background_thread_status.fatal_error
                raise engine_failed(error or RuntimeError("it is being stopped"))

    def _start(self) -> ContinuousBatchingManager:
        """A manager with its thread, and a thread of ours that sees to what it says."""
        fields = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
        pages = -(-self.max_cached_tokens * 5 // (4 * self._page_size)) + 2 * self.max_sessions
        options: dict[str, Any] = {
            ("page_size" if "page_size" in fields else "block_size"): self._page_size,
            "num_blocks": pages,
            "max_batch_tokens": self._max_step_tokens,
            "max_requests_per_batch": 2 * self.max_sessions,  # replies and prompts to warm
            "use_cuda_graph": False,  # a captured step could not draw ids
            "use_async_batching": False,  # nor could one that is prepared before the ids of the last are known
        }
        if "auto_switch_to_flash" in fields:
            options["auto_switch_to_flash"] = False  # it may fetch kernels from the hub
        elif "flash" not in str(self.model.config._attn_implementation):
            self.model.set_attn_implementation("paged|sdpa")
        generation = GenerationConfig(do_sample=False, eos_token_id=self._end_id)
        manager = self.model.init_continuous_batching(generation, ContinuousBatchingConfig(**options))
        self._drawing.manager = manager
        manager.logit_processor = self._drawing
        manager.start()
        watch = threading.Thread(target=_watch, args=(manager, weakref.ref(self)), name="language")
        watch.start()
        return manager

    def _take(self, output: Any) -> None:
        """What the library says at the end of a request, which has ended for us before unless it failed."""
        if output.error is None:
            return
        error = RuntimeError(output.error)
        if (warming := self._drawing.warming.pop(output.request_id, None)) is not None:
            warming[1].set_exception(engine_failed(error))
        if (request := self._drawing.pop(output.request_id)) is not None:
            request.fail(error)

    def _stopped(self, manager: ContinuousBatchingManager) -> None:
        """The library's thread has ended: so does everything that ran in it, with its error."""
        with self._lock:
            if self._manager is manager:
                self._manager = None
        error = manager.background_thread_status.fatal_error or RuntimeError("it was closed")
        self._drawing.clear()
        self._requests.fail(error)
        while self._drawing.warming:
            self._drawing.warming.popitem()[1][1].set_exception(engine_failed(error))


class _Drawing(ContinuousBatchingLogitsProcessorList):  # type: ignore[misc]
    """The place in the library's step where ids are drawn. The step itself is in the library's thread."""

    def __init__(self) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self.num_computed = 0
        self.manager: ContinuousBatchingManager | None = None
        self.warming: dict[str, tuple[list[int], Future[None]]] = {}
        self._requests: dict[str, Request] = {}
        self._cached: dict[str, int] = {}
        self._batch: list[str] = []

    @property
    def num_cached(self) -> int:
        """Ids of the replies in the batch whose keys and values are held."""
        return sum(self._cached.copy().values())

    def remember(self, name: str, request: Request) -> None:
        self._requests[name] = request

    def forget(self, request: Request) -> str | None:
        """Takes a request out of those that draw; gives the name that it had."""
        name = next((name for name, one in self._requests.copy().items() if one is request), None)
        if name is not None:
            self.pop(name)
        return name

    def pop(self, name: str) -> Request | None:
        self._cached.pop(name, None)
        return self._requests.pop(name, None)

    def clear(self) -> None:
        self._requests.clear()
        self._cached.clear()

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        """Notes who is in the batch; the scores come in this order."""
        self._batch = [future.state.request_id for future in requests_in_batch if future.has_new_token]
        for future in requests_in_batch:
            self.num_computed += future.query_length
            if future.state.request_id in self._requests:
                self._cached[future.state.request_id] = future.state.position_offset
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """Draws the next id of every row of scores (N, V) float32; gives scores that leave nothing else to take."""
        drawn = torch.zeros_like(scores)
        for row, name in enumerate(self._batch):
            if (warming := self.warming.pop(name, None)) is not None:
                self._take_out(name)
                warming[1].set_result(None)
            if (request := self._requests.get(name)) is None or request.ended:
                continue  # nobody's, or that of a reply that was cancelled while the step ran
            token, held = request.choose(scores[row])
            drawn[row, token] = 1.0
            if request.complete:
                self.pop(name)
            elif held:
                self.pop(name)
                self._take_out(name)
        return drawn

    def _take_out(self, name: str) -> None:
        assert self.manager is not None
        self.manager.cancel_request(name)


def _watch(manager: ContinuousBatchingManager, engine: weakref.ref[ContinuousEngine]) -> None:
    """Reads what a manager says until its thread ends, and ends that thread with the engine or the program."""
    while manager.is_running():
        output = manager.get_result(timeout=_POLL_S)
        owner = engine()
        is_stopping = manager.background_thread_status.can_accept_new_requests() is not None
        if owner is not None and output is not None and not is_stopping:  # else everything ends below
            owner._take(output)
        if owner is None or not threading.main_thread().is_alive():
            manager.stop(hard_stop=True)
            break
        del owner
    if (owner := engine()) is not None:
        owner._stopped(manager)
