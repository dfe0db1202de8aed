"""What the routes share: the chatbot, its limits, and the ways from a request to the models and back."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import numpy as np
import soundfile
from fastapi import Request, Security
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from numpy.typing import NDArray
from starlette.types import Receive, Scope, Send

from duologue import rates
from duologue.audio import StreamingResampler, check_wav
from duologue.conversation.chatbot import Chatbot
from duologue.conversation.ear import tokenize
from duologue.conversation.events import EndReason, Event, ReplyDone
from duologue.conversation.mouth import Mouth
from duologue.language.sampling import Sampling
from duologue.serving.admission import Admission, ResumeStore
from duologue.serving.errors import ApiError
from duologue.serving.metrics import Metrics
from duologue.serving.objects import FOREIGN_VOICES, VoiceId
from duologue.serving.settings import Settings

Result = TypeVar("Result")

PATIENCE_S = 5.0  # what is not live may wait so long for what is
FRAMES_AT_ONCE = 65_536
MAX_CHANNELS = 8
_BEARER = HTTPBearer(auto_error=False, description="One of the server's API keys, where it has any.")


@dataclass(eq=False)
class Service:
    """One chatbot as it is served."""

    bot: Chatbot
    settings: Settings
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.admission = Admission(self.settings, self.metrics)
        self.resumable = ResumeStore(self.settings.resume_s, self.settings.max_sessions)
        worker, watch = self.bot.worker, self.metrics.watch
        watch("sessions_kept", "Dropped conversations that can be resumed.", lambda: len(self.resumable))
        watch("tasks", "Tasks of the event loop.", lambda: len(asyncio.all_tasks()))
        watch("worker_waiting", "Jobs that wait for the device.", lambda: worker.stats().num_waiting)
        watch("worker_batch_size", "Rows of a batch of steps on average.", lambda: worker.stats().mean_batch_size)
        watch("worker_busy_seconds", "Work of the device so far.", lambda: worker.stats().busy_s)
        engine = self.bot.models.engine
        watch("engine_running", "Replies that the engine makes now.", lambda: engine.running)
        watch("engine_cached_tokens", "Ids whose keys and values are kept.", lambda: engine.cached_tokens)

    def key(
        self, request: Request, bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)] = None
    ) -> str:
        """The name of the caller's key, "" where there are no keys; a dependency of the guarded routes."""
        return self.admission.check_key(request.headers.get("authorization"))

    @property
    def model(self) -> str:
        """The name that clients see. Any other name that they ask for is taken as this one."""
        return self.bot.models.card.name

    def voice(self, asked: str | VoiceId | None, param: str) -> str:
        """The model's voice for what a client asks for; voices of other servers are its own first one.

        Raises:
            ApiError: there is no such voice.
        """
        name = asked.id if isinstance(asked, VoiceId) else asked or ""
        voices = self.bot.models.card.voices
        if name in voices:
            return name
        if name and name not in FOREIGN_VOICES:
            raise ApiError(f"{self.model} has no voice {name!r}; it has {', '.join(voices)}", param=param)
        return ""

    async def tokenize(self, wav: NDArray[np.float32]) -> tuple[int, ...]:
        """Speech tokens of wav (S,) at 16 kHz, in steps that wait for live conversations."""
        bot = self.bot
        return await tokenize(bot.models, bot.worker, wav, rates.LISTEN_SAMPLE_RATE, PATIENCE_S)

    async def replying(
        self, route: str, mouth: Mouth, prompt: list[int], sampling: Sampling
    ) -> AsyncGenerator[Event, None]:
        """`mouth.speak`, counted under a route's name; ended at once when it is closed."""
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


def read_sound(data: bytes, max_s: float, param: str) -> NDArray[np.float32]:
    """The first channel of a sound file, (S,) float32 at 16 kHz. Work for a thread: memory is bounded by `max_s`.

    Raises:
        ApiError: not a sound file that can be read, empty, longer than `max_s` seconds, or not finite.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.channels > MAX_CHANNELS or not 4000 <= file.samplerate <= 384_000:
                raise ApiError(
                    f"{param} has {file.channels} channels at {file.samplerate} Hz; up to {MAX_CHANNELS} channels at "
                    "4000 to 384000 Hz are taken",
                    "invalid_audio",
                    param,
                )
            resampler, parts, seconds = StreamingResampler(file.samplerate, rates.LISTEN_SAMPLE_RATE), [], 0.0
            while len(block := file.read(FRAMES_AT_ONCE, dtype="float32", always_2d=True)[:, 0]):
                seconds += len(block) / file.samplerate
                if seconds > max_s:
                    raise ApiError(f"{param} is longer than {max_s:.0f} s; cut it first", "audio_too_long", param)
                parts.append(resampler.step(block))
            parts.append(resampler.step(np.zeros(0, np.float32), last=True))
        return check_wav(np.concatenate(parts), rates.LISTEN_SAMPLE_RATE, param)
    except (soundfile.LibsndfileError, MemoryError):
        text = f"{param} is not a sound file that can be read: WAV, FLAC, OGG and MP3 are taken"
        raise ApiError(text, "invalid_audio", param) from None
    except ValueError as error:
        raise ApiError(str(error), "invalid_audio", param) from None


class StreamedFile(StreamingResponse):
    """Sends what a generator gives, and closes it whatever happens, also when nothing was ever sent."""

    def __init__(self, parts: AsyncGenerator[bytes, None], first: bytes, media_type: str) -> None:
        super().__init__(_behind(first, parts), media_type=media_type, headers={"Cache-Control": "no-store"})
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._parts.aclose()


async def streamed(parts: AsyncGenerator[bytes, None], media_type: str) -> StreamedFile:
    """A response that begins with the first part: what fails before it still gets a status of its own."""
    try:
        first = await anext(parts, b"")
    except BaseException:
        await parts.aclose()
        raise
    return StreamedFile(parts, first, media_type)


async def _behind(first: bytes, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for part in parts:
        yield part


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of work that is cancelled when the client goes away. The request's body has been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
        return await task
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
