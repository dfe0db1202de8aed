"""State and functions shared by the routes: the chatbot, its limits, audio upload and streamed responses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import Request, Security
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from numpy.typing import NDArray
from starlette.types import Receive, Scope, Send

from duologue import rates
from duologue.conversation.chatbot import Chatbot
from duologue.conversation.ear import tokenize
from duologue.conversation.events import EndReason, Event, ReplyDone
from duologue.conversation.mouth import Mouth
from duologue.language.sampling import Sampling
from duologue.serving.admission import Admission, ResumeStore
from duologue.serving.errors import ApiError
from duologue.serving.items import SavedConversation
from duologue.serving.metrics import Metrics
from duologue.serving.objects import Audio, AudioOutput, SessionConfig
from duologue.serving.session_records import take_stored
from duologue.serving.session_store import open_store
from duologue.serving.settings import Settings
from duologue.sound_files import AudioTooLong, load_audio

Result = TypeVar("Result")

PATIENCE_S = 5.0  # maximum delay of REST work in favor of live sessions
_BEARER = HTTPBearer(auto_error=False, description="An API key, if the server has keys.")


@dataclass(eq=False)
class Service:
    """A served chatbot with its admission control and metrics.

    Attributes:
        gather_metrics: returns the page of `/metrics` for several servers; None shows this server's own metrics.
    """

    bot: Chatbot
    settings: Settings
    metrics: Metrics = field(default_factory=Metrics)
    gather_metrics: Callable[[], Awaitable[bytes]] | None = None

    def __post_init__(self) -> None:
        self.admission = Admission(self.settings, self.metrics)
        self.resumable = ResumeStore(self.settings.resume_s, self.settings.max_sessions)
        self.sessions = open_store(self.settings.store, self.settings.store_s) if self.settings.store else None
        worker, watch = self.bot.worker, self.metrics.watch
        watch("sessions_kept", "Dropped conversations that can be resumed.", lambda: len(self.resumable))
        watch("tasks", "Tasks of the event loop.", lambda: len(asyncio.all_tasks()))
        watch("worker_waiting", "Jobs waiting for the device.", lambda: worker.stats().num_waiting)
        watch("worker_batch_size", "Mean number of rows per batch.", lambda: worker.stats().mean_batch_size)
        watch("worker_busy_seconds", "Busy time of the device.", lambda: worker.stats().busy_s)
        engine = self.bot.models.engine
        watch("engine_running", "Replies in generation.", lambda: engine.running)
        watch("engine_cached_tokens", "Token ids in the KV cache.", lambda: engine.cached_tokens)

    def key(
        self, request: Request, bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)] = None
    ) -> str:
        """Returns the name of the caller's key, "" on a server without keys. A dependency of the guarded routes."""
        return self.admission.check_key(request.headers.get("authorization"))

    @property
    def model(self) -> str:
        """The model's name. Requests for any other name are served by this model."""
        return self.bot.models.card.name

    def session_config(self) -> SessionConfig:
        """Returns the configuration of a new real-time session."""
        return SessionConfig(audio=Audio(output=AudioOutput(voice=self.bot.models.card.voices[0])))

    async def resume(self, session_id: str, key: str) -> SavedConversation | None:
        """Takes the conversation of a dropped client from memory or from the store.

        Memory also holds audio, but another server may have continued the conversation in the meantime.
        """
        kept = self.resumable.take(session_id, key)
        if self.sessions is None:
            return kept
        stored = await take_stored(self.sessions, session_id, key, self.bot.models.vocabulary)
        if kept is None or (stored is not None and stored.revision != kept.revision + 1):
            return stored
        if stored is not None:
            kept.revision = stored.revision
        return kept

    async def tokenize(self, wav: NDArray[np.float32]) -> tuple[int, ...]:
        """Returns the speech tokens of wav (S,) at 16 kHz. Live conversations take precedence."""
        bot = self.bot
        return await tokenize(bot.models, bot.worker, wav, rates.LISTEN_SAMPLE_RATE, PATIENCE_S)

    async def admitted(self, parts: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """Yields the parts of a response, counted as one request while it lasts. Raises AdmissionError."""
        with self.admission.request():
            async with aclosing(parts):
                async for part in parts:
                    yield part

    async def generate_reply(
        self, route: str, mouth: Mouth, prompt: list[int], sampling: Sampling
    ) -> AsyncGenerator[Event, None]:
        """Yields the events of `mouth.speak` and counts the reply under a route's name. Closing it ends the reply."""
        status = "cancelled"
        stream = mouth.speak(prompt, sampling)
        try:
            async for event in stream:
                if isinstance(event, ReplyDone):
                    status = "completed" if event.reason is EndReason.END else "incomplete"
                    self.metrics.reply(route, status, event.timings)
                yield event
        except ValueError as error:
            status = "failed"
            raise ApiError(str(error), "request_failed") from None
        except Exception:
            status = "failed"
            raise
        finally:
            if status in ("cancelled", "failed"):
                self.metrics.replies.labels(status).inc()
            await stream.aclose()


def read_audio(data: bytes, max_s: float, param: str) -> NDArray[np.float32]:
    """Reads a sound file, (S,) float32 at 16 kHz. Call it in a thread; `max_s` bounds its memory.

    Raises:
        ApiError: the file is unreadable, empty, longer than `max_s` seconds, or not finite.
    """
    try:
        return load_audio(data, rates.LISTEN_SAMPLE_RATE, max_s, param)[0]
    except ValueError as error:
        code = "audio_too_long" if isinstance(error, AudioTooLong) else "invalid_audio"
        raise ApiError(str(error), code, param) from None


class StreamedResponse(StreamingResponse):
    """A streaming response that always closes its generator, even if nothing was sent."""

    def __init__(self, parts: AsyncGenerator[bytes, None], first: bytes, media_type: str) -> None:
        super().__init__(_prepend(first, parts), media_type=media_type, headers={"Cache-Control": "no-store"})
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._parts.aclose()


async def stream_response(parts: AsyncGenerator[bytes, None], media_type: str) -> StreamedResponse:
    """Waits for the first part before the response starts, so that an early error still gets its own status."""
    try:
        first = await anext(parts, b"")
    except BaseException:
        await parts.aclose()
        raise
    return StreamedResponse(parts, first, media_type)


async def _prepend(first: bytes, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for part in parts:
        yield part


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Returns the result of `work`; cancels it if the client disconnects. The request body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_for_disconnect(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
        return await task
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()


async def _wait_for_disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
