"""Requests of an engine: one running reply each, and the admission of new ones.

A request owns its position in the schedule, its sampling and its seed, so its ids depend on the scores alone. If
`max_unread` ids are unread, it pauses until half of them are read.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from duologue.interleave import INTERLEAVED, Schedule
from duologue.language.drawing import DrawState
from duologue.language.sampling import Sampling
from duologue.vocabulary import Vocabulary


class EngineFull(RuntimeError):
    """The engine has no room for another request; it may be retried later."""


class Request:
    """One running reply. The engine's thread calls `accept`; any thread may call `read`, `cancel` or `fail`.

    Attributes:
        ids: the reply so far, read or not.
        drawing: the state of its next draw.
    """

    def __init__(
        self,
        prompt: list[int],
        sampling: Sampling,
        schedule: Schedule,
        name: str | None,
        vocabulary: Vocabulary,
        max_unread: int,
        on_room: Callable[[], None],
    ) -> None:
        self.prompt, self.sampling, self.name = prompt, sampling, name
        self.ids: list[int] = []
        self.drawing = DrawState(sampling, schedule)
        self._vocabulary = vocabulary
        self._max_unread, self._on_room = max_unread, on_room
        self._unread: deque[int] = deque()
        self._held = self._ended = False
        self._error: Exception | None = None
        self._wake: Callable[[], object] | None = None  # wakes the waiting reader
        self._lock = threading.Lock()

    @property
    def ended(self) -> bool:
        """Whether no further id will be drawn."""
        return self._ended

    @property
    def held(self) -> bool:
        """Whether the request is paused for its reader."""
        return self._held

    @property
    def num_reserved(self) -> int:
        """Maximum number of KV cache entries of the request."""
        return 0 if self._ended else len(self.prompt) + self.sampling.max_tokens

    def accept(self, token: int) -> None:
        """Queues the drawn id for the reader. Raises ValueError if the schedule does not allow it."""
        self.drawing.advance(self._vocabulary.kind(token))
        with self._lock:
            if self._ended:  # cancelled while the step ran
                return
            self.ids.append(token)
            self._unread.append(token)
            self._ended = self.drawing.ended
            self._held = not self._ended and len(self._unread) >= self._max_unread
            wake, self._wake = self._wake, None
        self._call(wake)

    def cancel(self) -> None:
        """Ends the reply and drops unread ids."""
        self._end(None, drop=True)

    def fail(self, error: Exception) -> None:
        """Ends the reply; its reader gets the unread ids and then the error."""
        self._end(error, drop=False)

    async def read(self) -> int | None:
        """Returns the next id, None at the end. Raises RuntimeError if the engine failed."""
        while True:
            loop = asyncio.get_running_loop()
            waiting: asyncio.Future[None] = loop.create_future()
            if (token := self._next(_waker(loop, waiting))) != _WAIT:
                return token
            await waiting

    def read_now(self) -> int | None:
        """Returns the next id as `read`, blocking the calling thread."""
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
        except RuntimeError:  # the reader's event loop is closed
            self.cancel()


class RunningRequests:
    """The requests of one engine and its limits. Thread-safe.

    A request counts until its stream is read to the end, closed or cancelled, which bounds unread ids.

    Args:
        max_positions: maximum ids of a prompt and its reply.
        max_sessions: maximum number of requests.
        max_cached_tokens: maximum ids of all requests with their longest possible replies.
        on_room: called in the reader's thread when a paused request may resume.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
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
        self._vocabulary = vocabulary
        self._max_unread, self._on_room = max_unread, on_room
        self._requests: set[Request] = set()
        self._names: dict[str, Request] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def num_reserved(self) -> int:
        """Maximum number of KV cache entries of all requests."""
        with self._lock:
            return self._num_reserved()

    def check(self, prompt_ids: Sequence[int], max_tokens: int = 0) -> list[int]:
        """Returns the ids as a list. Raises ValueError for an empty or too long prompt, or an unknown id."""
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
        """Admits a request.

        Raises:
            ValueError: as `check`; or a request of this name is running.
            EngineFull: names the limit.
        """
        prompt = self.check(prompt_ids, sampling.max_tokens)
        request = Request(prompt, sampling, schedule, name, self._vocabulary, self._max_unread, self._on_room)
        with self._lock:
            if name is not None and name in self._names:
                raise ValueError(f"request {name!r} is already running; request ids must be unique")
            if len(self._requests) >= self.max_sessions:
                raise EngineFull(
                    f"{len(self._requests)} replies are running, and the engine runs at most {self.max_sessions} "
                    "at a time: try again when one has ended"
                )
            reserved = self._num_reserved()
            if reserved + request.num_reserved > self.max_cached_tokens:
                raise EngineFull(
                    f"a prompt of {len(prompt)} ids and a reply of up to {sampling.max_tokens} do not fit with the "
                    f"{reserved} ids of running replies: the KV cache holds at most "
                    f"{self.max_cached_tokens} ids"
                )
            self._requests.add(request)
            if name is not None:
                self._names[name] = request
        return request

    def cancel(self, name: str) -> Request | None:
        """Ends the request of this name, if there is one."""
        with self._lock:
            request = self._names.get(name)
        if request is not None:
            self.remove(request)
        return request

    def remove(self, request: Request) -> None:
        """Removes a request; a later one of the same name is unaffected."""
        request.cancel()
        with self._lock:
            self._requests.discard(request)
            if request.name is not None and self._names.get(request.name) is request:
                del self._names[request.name]

    def fail(self, error: Exception) -> None:
        """Ends all requests with an error; their readers remove them."""
        with self._lock:
            requests = list(self._requests)
        for request in requests:
            request.fail(error)

    def _num_reserved(self) -> int:
        return sum(request.num_reserved for request in self._requests)


class RequestEngine(ABC):
    """The part of an engine that admits replies and hands out their ids. Subclasses set `_requests`."""

    _requests: RunningRequests

    @property
    def max_positions(self) -> int:
        """Maximum ids of a prompt and its reply together."""
        return self._requests.max_positions

    @property
    def max_sessions(self) -> int:
        """Maximum number of running replies."""
        return self._requests.max_sessions

    @property
    def max_cached_tokens(self) -> int:
        """Maximum ids of all running replies with their prompts."""
        return self._requests.max_cached_tokens

    @property
    def running(self) -> int:
        """Number of running replies."""
        return len(self._requests)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        schedule: Schedule = INTERLEAVED,
        request_id: str | None = None,
    ) -> AsyncIterator[int]:
        """Yields the ids of one reply, see `engine.Engine`."""
        request = self._admit(prompt_ids, sampling, schedule, request_id)
        try:
            self._begin(request, schedule)
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
        """Generates a reply in synchronous code; an impossible prompt is refused at once."""
        prompt = self._requests.check(prompt_ids, sampling.max_tokens)
        return self._stream(prompt, sampling, schedule, request_id)

    def cancel(self, request_id: str) -> None:
        """Ends a stream before its next id; unknown requests are ignored."""
        if (request := self._requests.cancel(request_id)) is not None:
            self._leave(request)

    def _stream(
        self, prompt: list[int], sampling: Sampling, schedule: Schedule, request_id: str | None
    ) -> Iterator[int]:
        request = self._admit(prompt, sampling, schedule, request_id)
        try:
            self._begin(request, schedule)
            while (token := request.read_now()) is not None:
                yield token
        finally:
            self._leave(request)

    def _admit(
        self, prompt_ids: Sequence[int], sampling: Sampling, schedule: Schedule, request_id: str | None
    ) -> Request:
        return self._requests.admit(prompt_ids, sampling, schedule, request_id)

    @abstractmethod
    def _begin(self, request: Request, schedule: Schedule) -> None:
        """Starts to generate the ids of an admitted request."""

    @abstractmethod
    def _leave(self, request: Request) -> None:
        """Removes a request that ended or whose reader left."""


def engine_failed(error: Exception) -> RuntimeError:
    """Returns the error for readers, with the engine's error as its cause."""
    failed = RuntimeError(f"the language engine failed: {type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed


_WAIT = -1


def _waker(loop: asyncio.AbstractEventLoop, waiting: asyncio.Future[None]) -> Callable[[], object]:
    def settle() -> None:
        if not waiting.done():
            waiting.set_result(None)

    return lambda: loop.call_soon_threadsafe(settle)
