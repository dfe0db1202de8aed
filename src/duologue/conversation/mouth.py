"""The mouth: one reply in production. The engine generates ids; the worker decodes blocks of them to audio."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import torch

from duologue import rates
from duologue.conversation.block_policy import BlockPolicy
from duologue.conversation.ear import RESPONSE_S
from duologue.conversation.events import (
    AudioDelta,
    EndReason,
    Event,
    Interrupted,
    ReplyDone,
    SpeechDelta,
    TextDelta,
    Timings,
)
from duologue.conversation.history import HeardPart, heard_part
from duologue.conversation.worker import StepResult, Worker
from duologue.decoder.decoder import SpeechDecoderState
from duologue.interleave import INTERLEAVED, TEXT_ONLY, InterleaveState, Kind
from duologue.language.sampling import Sampling
from duologue.models import Models
from duologue.turns import Modality, Role, Turn
from duologue.vocabulary import TextStream

_LEAST_WAIT_S = 0.001  # a clock may not move within a shorter wait, which would be asked for again and again


class Mouth:
    """One reply: a stream of events, and finally the assistant's turn.

    Args:
        text_only: produces a written reply.
        asked_at: end of the question on the event loop's clock, now by default; origin of all timings.

    Attributes:
        modality: of the reply.
        codes: speech tokens so far.
        text: transcript so far.
        reason: why the model stopped.
    """

    _request_ids = itertools.count()

    def __init__(
        self,
        models: Models,
        worker: Worker,
        *,
        text_only: bool = False,
        policy: BlockPolicy | None = None,
        asked_at: float | None = None,
    ) -> None:
        self.models, self._worker = models, worker
        self.modality = Modality.TEXT if text_only else Modality.INTERLEAVED
        self._loop = asyncio.get_running_loop()
        self._policy = policy or BlockPolicy(self._loop.time)
        self._text = TextStream(models.vocabulary)
        self._interleave = InterleaveState(TEXT_ONLY if text_only else INTERLEAVED)
        self._start = self._loop.time() if asked_at is None else asked_at
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._block: asyncio.Future[StepResult] | None = None  # with the worker
        self._state: SpeechDecoderState | None = None
        self._seed = self._num_decoded = self._num_samples = 0
        self._is_flushed = False
        self._request_id = f"reply-{next(self._request_ids)}"
        self._is_asked = False
        self._cut_at: int | None = None
        self._heard: HeardPart | None = None
        self._ids: list[int] = []
        self.codes: list[int] = []
        self.text = ""
        self.reason = EndReason.LENGTH
        self._timings = Timings()
        self._stages = {"tokenizer": 0.0, "language": 0.0, "decoder": 0.0}

    @property
    def turn(self) -> Turn:
        """The reply's ids so far without the end id; after an interrupt the heard part."""
        reply = Turn(Role.ASSISTANT, self.modality, tuple(self._ids))
        return reply if self._heard is None else self._heard.turn

    def stop(self) -> None:
        """Cancels the engine's request and the waiting block. Thread-safe."""
        try:
            self._loop.call_soon_threadsafe(self._stop)
        except RuntimeError:
            return  # the loop is closed, and the reply with it

    def interrupt(self, num_samples_played: int) -> None:
        """Stops the reply and truncates it to the samples played. Thread-safe."""
        self._cut_at = num_samples_played
        self.stop()

    async def speak(
        self, prompt: list[int], sampling: Sampling, question_s: float = 0.0
    ) -> AsyncGenerator[Event, None]:
        """Yields text, speech tokens and audio until the reply is complete or stopped; `ReplyDone` is last.

        Args:
            question_s: seconds of tokenization after the end of the question.

        Raises:
            ValueError, EngineFull, RuntimeError, WorkerFull: as `Engine.generate` and `Worker.step`.
        """
        models = self.models
        self._stages["tokenizer"] = question_s
        self._note(tokenize_s=question_s)
        self._seed = sampling.seed
        stream = models.engine.generate(prompt, sampling, self._interleave.schedule, self._request_id)
        self._is_asked = not self._stopped.done()
        coming = asyncio.create_task(_next(stream)) if self._is_asked else None
        asked = self._loop.time()
        try:
            while not self._stopped.done() and (coming is not None or not self._is_complete):
                self._go_on(ended=coming is None)
                await self._wait(coming)
                if self._block is not None and self._block.done() and not self._stopped.done():
                    yield self._take_sound(self._block)
                if coming is None or not coming.done() or self._stopped.done() or self._hold_s > 0:
                    continue
                self._stages["language"] += self._loop.time() - asked
                self._note_once("prefill_s", self._stages["language"])
                event = self._take_id(coming.result())
                coming = None if event is None else asyncio.create_task(_next(stream))
                if event is not None:
                    yield event
                elif rest := self._text.flush():
                    self.text += rest
                    yield TextDelta(rest)
                asked = self._loop.time()
        finally:
            self._stop()
            if coming is not None:
                coming.cancel()
                await asyncio.wait([coming])
            await stream.aclose()  # type: ignore[attr-defined]
            self._finish()
        text, codes, reason, is_estimate = self.text, tuple(self.codes), self.reason, False
        if (cut_at := self._cut_at) is not None:
            heard = self._heard = heard_part(self.turn, cut_at, models.vocabulary, finished=reason is EndReason.END)
            text, codes, reason = heard.text(text), codes[: heard.num_speech], EndReason.INTERRUPTED
            is_estimate = self.modality is not Modality.TEXT
            yield Interrupted(cut_at, len(codes), text, is_estimate)
        yield ReplyDone(text, codes, reason, self._timings, is_estimate)

    def _stop(self) -> None:
        if self._is_asked:
            self.models.engine.cancel(self._request_id)
        if self._block is not None:
            self._block.cancel()
        if not self._stopped.done():
            self._stopped.set_result(None)

    async def _wait(self, coming: asyncio.Task[int | None] | None) -> None:
        """Waits for an id, audio, a stop or the deadline of the next block."""
        waited: set[asyncio.Future[Any]] = {self._stopped}
        timeout = None
        if coming is not None and (hold_s := self._hold_s) > 0:
            timeout = max(hold_s, _LEAST_WAIT_S)
        elif coming is not None:
            waited.add(coming)
        if self._block is not None:
            waited.add(self._block)
        elif coming is not None and self._num_waiting >= rates.BLOCK_TOKENS:
            wait_s = max(self._policy.wait_s(self._num_waiting, self._num_ids_to_next), _LEAST_WAIT_S)
            timeout = wait_s if timeout is None else min(wait_s, timeout)
        await asyncio.wait(waited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)

    def _take_id(self, token: int | None) -> TextDelta | SpeechDelta | None:
        """Returns the event of an id; None at the end of the stream."""
        if token is None:
            return None
        kind = self.models.vocabulary.kind(token)
        self._interleave.advance(kind)
        if kind is Kind.END:
            self.reason = EndReason.END
            return None
        self._policy.took_id()
        self._ids.append(token)
        if kind is Kind.TEXT:
            text = self._text.push([token])
            self._note_once("first_text_s", self._loop.time() - self._start)
            self.text += text
            return TextDelta(text, (token,))
        code = self.models.vocabulary.speech_code(token)
        self.codes.append(code)
        return SpeechDelta((code,))

    @property
    def _num_waiting(self) -> int:
        return len(self.codes) - self._num_decoded

    @property
    def _hold_s(self) -> float:
        return self._policy.hold_s(self._num_waiting)

    @property
    def _is_complete(self) -> bool:
        """Whether all audio was emitted."""
        return self._block is None and (self._is_flushed or not self.codes)

    @property
    def _num_ids_to_next(self) -> int:
        """Number of ids until the next whole block of ten speech tokens, text runs included."""
        num_speech = rates.BLOCK_TOKENS - self._num_waiting % rates.BLOCK_TOKENS
        state, schedule = self._interleave, self._interleave.schedule
        if state.text_finished:
            return num_speech
        if state.run is Kind.TEXT:
            return num_speech + schedule.text_run - state.run_length
        return num_speech + (schedule.text_run if num_speech > schedule.speech_run - state.run_length else 0)

    def _go_on(self, ended: bool) -> None:
        """Gives the worker a block according to the policy; the last block flushes the decoder."""
        if self._block is not None or self._is_complete:
            return
        size = self._policy.block_size(self._num_waiting, None if ended else self._num_ids_to_next)
        last = ended and size == self._num_waiting
        if not size and not last:
            return
        codes = torch.tensor(self.codes[self._num_decoded : self._num_decoded + size], dtype=torch.int64)
        runs_dry_at = self._policy.runs_dry_at
        due = self._start + RESPONSE_S if runs_dry_at is None else runs_dry_at
        if self._state is None:
            self._state = self._new_state()
        step = self._worker.step(self.models.decoder, codes, self._state, last, due)
        self._block = asyncio.wrap_future(step)
        self._policy.gave_block(size)
        self._num_decoded += size
        self._is_flushed = last

    def _new_state(self) -> SpeechDecoderState:
        """Returns the decoder's state for this reply, whose first id may choose a style."""
        models, card = self.models, self.models.card
        style = models.vocabulary.style(self._ids)
        with torch.inference_mode(), self._worker.on_stream():
            return models.decoder.init_state(1, card.num_steps, card.guidance_scale, self._seed, style=style)

    def _take_sound(self, block: asyncio.Future[StepResult]) -> AudioDelta:
        self._block = None
        values, seconds = block.result()
        wav = values.clamp(-1.0, 1.0).float().numpy()
        self._policy.took_sound(len(wav) / rates.SPEAK_SAMPLE_RATE)
        self._stages["decoder"] += seconds
        self._note_once("first_audio_s", self._loop.time() - self._start)
        self._num_samples += len(wav)
        return AudioDelta(wav, rates.SPEAK_SAMPLE_RATE, self._num_samples - len(wav))

    def _finish(self) -> None:
        self._note(
            total_s=self._loop.time() - self._start,
            audio_s=self._num_samples / rates.SPEAK_SAMPLE_RATE,
            num_text_tokens=self._interleave.num_text,
            num_speech_tokens=self._interleave.num_speech,
            stages=self._stages,
        )

    def _note(self, **values: object) -> None:
        self._timings = dataclasses.replace(self._timings, **values)  # type: ignore[arg-type]

    def _note_once(self, name: str, seconds: float) -> None:
        if not getattr(self._timings, name):
            self._note(**{name: seconds})


async def _next(stream: AsyncIterator[int]) -> int | None:
    return await anext(stream, None)
