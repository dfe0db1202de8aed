"""Requests: one reply under way in an engine, as the engine sees it and as its reader does, and who is let in.

Whatever engine runs the model, a request draws its own ids: it owns its place in the interleave, its sampling and its
random generator, so what it draws depends on nothing but the scores. Its reader may be slow: `max_unread` ids wait at
most, then the request is held until half of them are read.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from duologue.interleave import InterleaveState, Schedule
from duologue.language.sampling import KindMasks, Sampling, draw
from duologue.vocabulary import Vocabulary


class EngineFull(RuntimeError):
    """An engine has no room for one more request; the same request can be made again later."""


class Request:
    """One reply. The engine's thread calls `choose`; any thread may `read`, `cancel` or `fail`.

    Attributes:
        ids: the reply so far, read or not.
    """

    def __init__(
        self,
        prompt: list[int],
        sampling: Sampling,
        schedule: Schedule,
        name: str | None,
        masks: KindMasks,
        vocabulary: Vocabulary,
        max_unread: int,
        on_room: Callable[[], None],
    ) -> None:
        self.prompt, self.sampling, self.name = prompt, sampling, name
        self.ids: list[int] = []
        self._masks, self._vocabulary = masks, vocabulary
        self._generator = torch.Generator(masks.device).manual_seed(sampling.seed)
        self._state = InterleaveState(schedule)
        self._max_unread, self._on_room = max_unread, on_room
        self._unread: deque[int] = deque()
        self._held = self._ended = False
        self._error: Exception | None = None
        self._wake: Callable[[], object] | None = None  # of the reader that waits
        self._lock = threading.Lock()

    @property
    def ended(self) -> bool:
        """No further id will be drawn."""
        return self._ended

    @property
    def held(self) -> bool:
        """The reader has to catch up before the next id is drawn."""
        return self._held

    @property
    def num_reserved(self) -> int:
        """Ids whose keys and values the request may need at most."""
        return 0 if self._ended else len(self.prompt) + self.sampling.max_tokens

    def choose(self, scores: Tensor) -> int:
        """Draws the next id from scores (V,) float32 and hands it to the reader."""
        remaining = self.sampling.max_tokens - len(self.ids)
        token = draw(scores, self._masks, self._state, remaining, self.sampling, self._generator)
        self._state.advance(self._vocabulary.kind(token))
        with self._lock:
            if self._ended:  # cancelled while the step ran
                return token
            self.ids.append(token)
            self._unread.append(token)
            self._ended = self._state.ended or remaining == 1
            self._held = not self._ended and len(self._unread) >= self._max_unread
            wake, self._wake = self._wake, None
        self._call(wake)
        return token

    def cancel(self) -> None:
        """Ends the reply here; ids that were not read are dropped."""
        self._end(None, drop=True)

    def fail(self, error: Exception) -> None:
        """Ends the reply; its reader gets the ids that are there and then the error."""
        self._end(error, drop=False)

    async def read(self) -> int | None:
        """The next id, None behind the last. Raises RuntimeError when the engine failed."""
        while True:
            loop = asyncio.get_running_loop()
            waiting: asyncio.Future[None] = loop.create_future()
            if (token := self._next(_waker(loop, waiting))) != _WAIT:
                return token
            await waiting

    def read_now(self) -> int | None:
        """`read` for code without an event loop: waits in the calling thread."""
        while True:
            waiting = threading.Event()
            if (token := self._next(waiting.set)) != _WAIT:
                return token
            waiting.wait()

    def _next(self, wake: Callable[[], object]) -> int | None:
        with self._lock:
            if not self._unread:
                if self._error is not None:
                    raise engine_failed(self._error)
                if self._ended:
                    return None
                self._wake = wake
                return _WAIT
            token = self._unread.popleft()
            has_room = self._held and 2 * len(self._unread) <= self._max_unread
            if has_room:
                self._held = False
        if has_room:
            self._on_room()
        return token

    def _end(self, error: Exception | None, drop: bool) -> None:
        with self._lock:
            if not self._ended:
                self._ended, self._error = True, error
            self._held = False
            if drop:
                self._unread.clear()
            wake, self._wake = self._wake, None
        self._call(wake)

    def _call(self, wake: Callable[[], object] | None) -> None:
        try:
            if wake is not None:
                wake()
        except RuntimeError:  # the reader's event loop is closed: nobody will ever read
            self.cancel()


class RunningRequests:
    """The requests that run in one engine: their names, and the limits that let them in. Safe to use from any thread.

    A request counts until its stream is read to the end, left or cancelled, so what waits unread is bounded too.

    Args:
        max_positions: ids that a prompt and its reply may have together.
        max_sessions: requests that run at the same time.
        max_cached_tokens: ids of all running requests together, the longest replies that they may give included.
        on_room: called from the reader's thread when a held request may go on.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        masks: KindMasks,
        max_positions: int,
        max_sessions: int,
        max_cached_tokens: int,
        max_unread: int,
        on_room: Callable[[], None],
    ) -> None:
        for name, value in (
            ("max_sessions", max_sessions),
            ("max_cached_tokens", max_cached_tokens),
            ("max_unread", max_unread),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.max_positions, self.max_sessions = max_positions, max_sessions
        self.max_cached_tokens = max_cached_tokens
        self._vocabulary, self._masks = vocabulary, masks
        self._max_unread, self._on_room = max_unread, on_room
        self._requests: set[Request] = set()
        self._names: dict[str, Request] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def num_reserved(self) -> int:
        """Ids whose keys and values the running requests may need at most."""
        with self._lock:
            return self._num_reserved()

    def check(self, prompt_ids: Sequence[int], max_tokens: int = 0) -> list[int]:
        """The ids as a list. Raises ValueError for an empty prompt, an unknown id, or more than the positions."""
        prompt = list(prompt_ids)
        if not prompt:
            raise ValueError("a prompt must hold at least one id")
        if len(prompt) > self.max_positions:
            raise ValueError(
                f"a prompt of {len(prompt)} ids does not fit the {self.max_positions} positions of the model"
            )
        if len(prompt) + max_tokens > self.max_positions:
            raise ValueError(
                f"a prompt of {len(prompt)} ids and a reply of up to max_tokens = {max_tokens} do not fit the "
                f"{self.max_positions} positions of the model"
            )
        for token in (min(prompt), max(prompt)):
            self._vocabulary.kind(token)
        return prompt

    def admit(self, prompt_ids: Sequence[int], sampling: Sampling, schedule: Schedule, name: str | None) -> Request:
        """Lets a request in.

        Raises:
            ValueError: see `check`; or a request of this name is running.
            EngineFull: one sentence naming the limit.
        """
        prompt = self.check(prompt_ids, sampling.max_tokens)
        request = Request(
            prompt, sampling, schedule, name, self._masks, self._vocabulary, self._max_unread, self._on_room
        )
        with self._lock:
            if name is not None and name in self._names:
                raise ValueError(f"request {name!r} is running; every request needs an id of its own")
            if len(self._requests) >= self.max_sessions:
                raise EngineFull(
                    f"{len(self._requests)} replies are under way, and the engine makes at most {self.max_sessions} "
                    "at a time: try again when one of them has ended"
                )
            reserved = self._num_reserved()
            if reserved + request.num_reserved > self.max_cached_tokens:
                raise EngineFull(
                    f"a prompt of {len(prompt)} ids and a reply of up to {sampling.max_tokens} have no room beside the "
                    f"{reserved} ids of replies under way: the engine holds keys and values of at most "
                    f"{self.max_cached_tokens} ids"
                )
            self._requests.add(request)
            if name is not None:
                self._names[name] = request
        return request

    def cancel(self, name: str) -> Request | None:
        """Ends the request of this name at once, if there is one."""
        with self._lock:
            request = self._names.get(name)
        if request is not None:
            self.remove(request)
        return request

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it stands; a later one of the same name is left alone."""
        request.cancel()
        with self._lock:
            self._requests.discard(request)
            if request.name is not None and self._names.get(request.name) is request:
                del self._names[request.name]

    def fail(self, error: Exception) -> None:
        """Ends all running requests with an error. They are taken out when their readers have seen it."""
        with self._lock:
            requests = list(self._requests)
        for request in requests:
            request.fail(error)

    def _num_reserved(self) -> int:
        return sum(request.num_reserved for request in self._requests)


def engine_failed(error: Exception) -> RuntimeError:
    """What readers are told of an error in the engine's thread, which is its cause."""
    failed = RuntimeError(f"the language engine failed: {type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed


_WAIT = -1


def _waker(loop: asyncio.AbstractEventLoop, waiting: asyncio.Future[None]) -> Callable[[], object]:
    def settle() -> None:
        if not waiting.done():
            waiting.set_result(None)

    return lambda: loop.call_soon_threadsafe(settle)
