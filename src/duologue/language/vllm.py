"""An engine over vLLM's HTTP completions, in which ids go in and ids come out.

The server runs in its own process and environment, with our logits processor (`vllm_plugin.py`). It batches, caches
prefixes and draws the same ids as `PlainEngine`. docs/engines.md has the commands that start it.

All connections belong to one thread with an event loop of its own, so readers may live in any loop or thread. A reply
is one streamed request. Cancelling closes its connection, and vLLM then drops the request from its batch.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from duologue.interleave import SPEECH_ONLY, TEXT_ONLY, Kind, Schedule
from duologue.language.engine import MAX_SESSIONS, common_prefix
from duologue.language.event_stream import event_data
from duologue.language.requests import Request, RequestEngine, RunningRequests, engine_failed
from duologue.language.sampling import Sampling
from duologue.language.scripts import language_mask
from duologue.language.vllm_plugin import request_arguments
from duologue.vocabulary import Vocabulary

if TYPE_CHECKING:
    import httpx

BLOCK = 16
"""Ids of a block of vLLM's prefix cache; only whole blocks are found again."""

CONNECT_S = 5.0
SILENCE_S = 120.0  # a server with a long queue sends nothing until it begins the reply
KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's own name
T = TypeVar("T")


class VllmError(RuntimeError):
    """The server is missing, died, refused a request or answered something else than completions."""


class VllmEngine(RequestEngine):
    """An engine whose language model runs in a vLLM server.

    Args:
        url: of the server, such as http://127.0.0.1:8001.
        max_sessions: maximum number of running replies.
        max_cached_tokens: maximum ids of running replies; None for what `max_sessions` replies of full length need.
        check_draws: asks for one text id and one speech id, which a server without our processor gets wrong.

    Attributes:
        url: without a path.
        model: name of the served model.
        num_cached: prompt ids that the server found in its cache, as far as it reported them.

    Raises:
        ValueError: the URL is malformed or httpx is missing; no usable server answers.
    """

    def __init__(
        self,
        url: str,
        vocabulary: Vocabulary,
        max_sessions: int = MAX_SESSIONS,
        max_cached_tokens: int | None = None,
        check_draws: bool = True,
    ) -> None:
        self.url, self.num_cached = _checked_url(url), 0
        self._vocabulary = vocabulary
        self._ends = [int(token) for token in np.flatnonzero(vocabulary.kinds == Kind.END)]
        self._languages: set[str] = set()
        self._warmed: deque[list[int]] = deque(maxlen=2 * max(max_sessions, 1))
        self._tasks: dict[Request, asyncio.Task[None]] = {}  # belongs to the engine's thread
        self._client = _new_client(self.url, max_sessions)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self.model, max_positions = self._run(self._describe())
            reserved = max_sessions * max_positions if max_cached_tokens is None else max_cached_tokens
            # vLLM cannot pause a reply: its ids wait here, at most max_tokens of them.
            self._requests = RunningRequests(
                vocabulary, max_positions, max_sessions, reserved, max_positions, on_room=lambda: None
            )
            if check_draws:
                self._run(self._check_draws())
        except VllmError as error:
            self.close()
            raise ValueError(str(error)) from error
        except BaseException:
            self.close()
            raise

    @property
    def cached_tokens(self) -> int:
        """Number of ids of running replies and their prompts; the server's own cache is not counted."""
        return sum(len(request.prompt) + len(request.ids) for request in [*self._tasks] if not request.ended)

    def cached_prefix(self, prompt_ids: Sequence[int]) -> int:
        """Returns 0: only the server knows its cache."""
        return 0

    async def warm(self, prompt_ids: Sequence[int]) -> None:
        """Prefills the whole blocks of a prompt by a request for one id, unless they were sent before."""
        prompt = self._requests.check(prompt_ids, 1)
        prompt = prompt[: len(prompt) // BLOCK * BLOCK]
        known = max((common_prefix(earlier, prompt) for earlier in [*self._warmed]), default=0)
        if known == len(prompt) or len(self._requests) >= self.max_sessions:
            return
        warming = asyncio.run_coroutine_threadsafe(self._ask_one(prompt, TEXT_ONLY), self._loop)
        try:
            await asyncio.wrap_future(warming)
        except VllmError as error:
            raise engine_failed(error) from error
        self._warmed.append(prompt)

    def close(self) -> None:
        """Ends all replies and closes the connections."""
        if self._loop.is_closed():
            return
        self._run(self._end_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _end_all(self) -> None:
        tasks = [*self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    def _admit(
        self, prompt_ids: Sequence[int], sampling: Sampling, schedule: Schedule, request_id: str | None
    ) -> Request:
        language = sampling.text_language
        if language is not None and language not in self._languages:
            is_text = self._vocabulary.kinds == Kind.TEXT
            if not (is_text & language_mask(self._vocabulary, language)).any():
                raise ValueError(f"the vocabulary has no text id for the language {language!r}")
            self._languages.add(language)
        return super()._admit(prompt_ids, sampling, schedule, request_id)

    def _begin(self, request: Request, schedule: Schedule) -> None:
        self._loop.call_soon_threadsafe(self._start, request, schedule)

    def _start(self, request: Request, schedule: Schedule) -> None:
        if not request.ended:
            task = self._tasks[request] = self._loop.create_task(self._reply(request, schedule))
            task.add_done_callback(lambda _: self._tasks.pop(request, None))

    def _leave(self, request: Request) -> None:
        self._requests.remove(request)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._abort, request)

    def _abort(self, request: Request) -> None:
        # A whole reply reads on: the usage follows its last id, and the connection remains for the next one.
        if (task := self._tasks.get(request)) is not None and not request.drawing.ended:
            task.cancel()  # closes the connection

    async def _reply(self, request: Request, schedule: Schedule) -> None:
        """Passes the ids of a reply on until it ends; every fault ends it with an error."""
        try:
            body = self._body(request.prompt, request.sampling, schedule)
            streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
            async with aclosing(self._events(streamed)) as events:
                async for event in events:
                    self._accept(request, *self._read_event(event))
            if not request.ended:
                raise VllmError(f"the vLLM server at {self.url} ended a reply early")
        except asyncio.CancelledError:
            request.cancel()
            raise
        except Exception as error:
            request.fail(error)

    def _accept(self, request: Request, tokens: list[int], finish: str | None) -> None:
        for token in tokens:
            try:
                request.accept(token)
            except ValueError as error:
                raise VllmError(f"the vLLM server at {self.url} gave an impossible id: {error}") from None
        if finish is not None and not request.ended:
            raise VllmError(f"the vLLM server at {self.url} ended a reply early (finish_reason {finish!r})")

    def _body(self, prompt: list[int], sampling: Sampling, schedule: Schedule) -> dict[str, Any]:
        """Returns a completion request. Our processor draws, so vLLM itself takes the likeliest id."""
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": sampling.max_tokens,
            "temperature": 0,
            "stop_token_ids": self._ends,
            "ignore_eos": True,
            "return_token_ids": True,
            "vllm_xargs": request_arguments(sampling, schedule),
        }

    def _read_event(self, event: dict[str, Any]) -> tuple[list[int], str | None]:
        """Returns the new ids of an event, and why the reply ended if it did."""
        if "error" in event:
            raise VllmError(f"the vLLM server at {self.url} failed: {_sentence(event['error'])}")
        usage, choices = event.get("usage"), event.get("choices")
        details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
        if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
            self.num_cached += details["cached_tokens"]
        if choices == []:  # the last event has only the usage
            return [], None
        choice = choices[0] if isinstance(choices, list) and isinstance(choices[0], dict) else {}
        tokens = choice.get("token_ids")
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise VllmError(f"the vLLM server at {self.url} sent no token_ids: it must be vLLM 0.10.2 or newer")
        return tokens, choice.get("finish_reason")

    async def _events(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Posts a completion and yields its server-sent events until `[DONE]`."""
        async with self._answer("POST", "/v1/completions", body) as response:
            chunks = response.aiter_bytes()
            try:
                async for data in event_data(chunks):
                    yield self._object(data)
                async for _ in chunks:  # an answer that was read to its end keeps the connection
                    pass
            except ValueError as error:
                raise VllmError(f"the vLLM server at {self.url} sent something else than events: {error}") from None

    def _answer(self, method: str, path: str, body: dict[str, Any] | None = None) -> _Answer:
        return _Answer(self._client, self.url, method, path, body)

    def _object(self, data: bytes) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise VllmError(f"the server at {self.url} answered something that is not vLLM's: {data[:60]!r}")
        return value

    async def _get(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        async with self._answer(method, path, body) as response:
            return self._object(await response.aread())

    async def _describe(self) -> tuple[str, int]:
        """Returns name and positions of the served model."""
        listed = (await self._get("GET", "/v1/models")).get("data")
        model = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], dict) else {}
        name, positions = model.get("id"), model.get("max_model_len")
        if not isinstance(name, str) or type(positions) is not int or positions < 1:
            raise VllmError(f"the server at {self.url} lists no model with its max_model_len: it is not vLLM")
        return name, positions

    async def _ask_one(self, prompt: list[int], schedule: Schedule) -> int:
        """Returns the likeliest first id of a reply."""
        body = self._body(prompt, Sampling(temperature=0.0, max_tokens=1), schedule)
        tokens, _ = self._read_event(await self._get("POST", "/v1/completions", body))
        if len(tokens) != 1:
            raise VllmError(f"the vLLM server at {self.url} gave {len(tokens)} ids where one was asked for")
        return tokens[0]

    async def _check_draws(self) -> None:
        prompt = [int(np.flatnonzero(self._vocabulary.kinds == Kind.TEXT)[0])]
        for schedule, wanted in ((TEXT_ONLY, (Kind.TEXT, Kind.END)), (SPEECH_ONLY, (Kind.SPEECH,))):
            token = await self._ask_one(prompt, schedule)
            if not 0 <= token < self._vocabulary.size or self._vocabulary.kind(token) not in wanted:
                raise VllmError(
                    f"the vLLM server at {self.url} gave id {token} where only {wanted[0].name.lower()} can come: "
                    "start it with the same model and --logits-processors duologue.vllm_processor:Interleave"
                )


class _Answer:
    """An answer of the server with status 200, as an async context. Faults of the connection become `VllmError`."""

    def __init__(
        self, client: httpx.AsyncClient, url: str, method: str, path: str, body: dict[str, Any] | None
    ) -> None:
        self._stream, self._url = client.stream(method, path, json=body), url

    async def __aenter__(self) -> httpx.Response:
        import httpx

        try:
            response = await self._stream.__aenter__()
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise VllmError(
                f"no vLLM server answers at {self._url} ({error or 'timeout'}): docs/engines.md says how to start one"
            ) from None
        except httpx.HTTPError as error:
            raise self._broken(error) from None
        if response.status_code == 200:
            return response
        try:
            said = await response.aread()
        except httpx.HTTPError:
            said = b""
        await self._stream.__aexit__(None, None, None)
        try:
            reason = _sentence(json.loads(said).get("error"))
        except (ValueError, AttributeError):
            reason = _sentence(said.decode(errors="replace"))
        raise VllmError(f"the vLLM server at {self._url} refused a request ({response.status_code}): {reason}")

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import httpx

        await self._stream.__aexit__(kind, error, trace)
        if isinstance(error, httpx.HTTPError):
            raise self._broken(error) from None

    def _broken(self, error: httpx.HTTPError) -> VllmError:
        import httpx

        if isinstance(error, httpx.TimeoutException):
            return VllmError(f"the vLLM server at {self._url} sent nothing for {SILENCE_S:.0f} s")
        return VllmError(f"the vLLM server at {self._url} closed the connection ({type(error).__name__})")


def _new_client(url: str, max_sessions: int) -> httpx.AsyncClient:
    try:
        import httpx
    except ImportError:
        raise ValueError(
            "the engine 'vllm' needs httpx: run pip install -e '.[vllm]' in the folder of Duologue"
        ) from None
    key = os.environ.get(KEY_VARIABLE)
    return httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"} if key else None,
        timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S, pool=None),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=max_sessions),
        trust_env=False,  # a proxy would hold back the stream
    )


def _checked_url(url: str) -> str:
    """Returns the URL without a path, or a trailing /v1. Raises ValueError for anything else."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.rstrip("/") not in ("", "/v1"):
        raise ValueError(f"the URL of a vLLM server looks like http://127.0.0.1:8001, not {url!r}")
    return f"{parts.scheme}://{parts.netloc}"


def _sentence(error: object) -> str:
    """Returns the message of an error of the server in one short line."""
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message or "no reason given").split())[:300]
