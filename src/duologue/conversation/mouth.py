"""Speaking: one reply while it is produced. The engine gives ids, the worker makes sound of blocks of them."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import torch

from duologue import rates
from duologue.conversation.block_policy import BlockPolicy
from duologue.conversation.ear import RESPONSE_S
from duologue.conversation.events import AudioDelta, EndReason, Event, SpeechDelta, TextDelta, Timings
from duologue.conversation.worker import Stepped, Worker
from duologue.interleave import InterleaveState, Kind, Schedule
from duologue.language.sampling import Sampling
from duologue.models import Models
from duologue.vocabulary import TextStream


class Speaker:
    """One reply: a stream of events, and what was said when it is over.

    Attributes:
        ids: of the reply so far, joint vocabulary, without the end id.
        codes: speech tokens so far.
        text: transcript so far.
        reason: why it ended.
        timings: from when the speaker was made.
    """

    def __init__(self, models: Models, worker: Worker, schedule: Schedule, policy: BlockPolicy | None = None) -> None:
        self._models, self._worker = models, worker
        self._policy = policy or BlockPolicy()
        self._text = TextStream(models.vocabulary)
        self._interleave = InterleaveState(schedule)
        self._start, self._due = time.perf_counter(), time.monotonic() + RESPONSE_S
        self._loop = asyncio.get_running_loop()
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._block: asyncio.Future[Stepped] | None = None  # with the worker
        self._num_decoded = self._num_samples = 0
        self._is_flushed = False
        self._request_id = ""
        self.ids: list[int] = []
        self.codes: list[int] = []
        self.text = ""
        self.reason = EndReason.LENGTH
        self.timings = Timings()
        self._stages = {"tokenizer": 0.0, "language": 0.0, "decoder": 0.0}

    def stop(self) -> None:
        """Ends the reply at once, from any thread: the engine's request and the block that waits are cancelled."""
        try:
            self._loop.call_soon_threadsafe(self._stop)
        except RuntimeError:
            return  # that loop is closed, and the reply with it

    @property
    def is_stopped(self) -> bool:
        return self._stopped.done()

    def took_question(self, seconds: float) -> None:
        """The user's turn is tokenized, which took so many seconds of work."""
        self._stages["tokenizer"] = seconds
        self._note(tokenize_s=seconds)

    async def events(self, prompt: list[int], sampling: Sampling, request_id: str) -> AsyncGenerator[Event, None]:
        """Text, speech tokens and sound as they come, until the reply is complete or stopped."""
        models, card = self._models, self._models.card
        if self.is_stopped:
            return
        with torch.inference_mode():
            self._state = models.decoder.init_state(1, card.num_steps, card.guidance_scale, sampling.seed)
        self._request_id = request_id
        stream = models.engine.generate(prompt, sampling, self._interleave.schedule, request_id)
        coming: asyncio.Task[int | None] | None = asyncio.create_task(_next(stream))
        asked = time.perf_counter()
        try:
            while not self.is_stopped and (coming is not None or not self._is_complete):
                self._go_on(ended=coming is None)
                await self._wait(coming)
                if self._block is not None and self._block.done() and not self.is_stopped:
                    yield self._take_sound(self._block)
                if coming is None or not coming.done() or self.is_stopped:
                    continue
                self._stages["language"] += time.perf_counter() - asked
                self._note_once("prefill_s", self._stages["language"])
                event = self._take_id(coming.result())
                coming = None if event is None else asyncio.create_task(_next(stream))
                if event is not None:
                    yield event
                elif rest := self._text.flush():
                    self.text += rest
                    yield TextDelta(rest)
                asked = time.perf_counter()
        finally:
            self._stop()
            if coming is not None:
                coming.cancel()
                await asyncio.wait([coming])
            await stream.aclose()  # type: ignore[attr-defined]
            self._finish()

    def _stop(self) -> None:
        if self._request_id:
            self._models.engine.cancel(self._request_id)
        if self._block is not None:
            self._block.cancel()
        if not self._stopped.done():
            self._stopped.set_result(None)

    async def _wait(self, coming: asyncio.Task[int | None] | None) -> None:
        """Until there is an id or sound, the reply is stopped, or a block must wait no longer."""
        waited: set[asyncio.Future[Any]] = {self._stopped}
        timeout = None
        if coming is not None:
            waited.add(coming)
        if self._block is not None:
            waited.add(self._block)
        elif coming is not None and self._num_waiting >= rates.BLOCK_TOKENS:
            timeout = max(self._policy.wait_s(self._num_waiting, self._num_ids_to_next), 0.001)
        await asyncio.wait(waited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)

    def _take_id(self, token: int | None) -> TextDelta | SpeechDelta | None:
        """The event of an id; None at the end of the stream."""
        if token is None:
            return None
        kind = self._models.vocabulary.kind(token)
        self._interleave.advance(kind)
        if kind is Kind.END:
            self.reason = EndReason.END
            return None
        self._policy.took_id()
        self.ids.append(token)
        if kind is Kind.TEXT:
            text = self._text.push([token])
            self._note_once("first_text_s", time.perf_counter() - self._start)
            self.text += text
            return TextDelta(text, (token,))
        code = self._models.vocabulary.speech_code(token)
        self.codes.append(code)
        return SpeechDelta((code,))

    @property
    def _num_waiting(self) -> int:
        return len(self.codes) - self._num_decoded

    @property
    def _is_complete(self) -> bool:
        """All sound is out."""
        return self._block is None and (self._is_flushed or not self.codes)

    @property
    def _num_ids_to_next(self) -> int:
        """Ids until ten more speech tokens make another whole block, with a text run where one may come between."""
        num_speech = rates.BLOCK_TOKENS - self._num_waiting % rates.BLOCK_TOKENS
        state, schedule = self._interleave, self._interleave.schedule
        if state.text_finished:
            return num_speech
        if state.run is Kind.TEXT:
            return num_speech + schedule.text_run - state.run_length
        return num_speech + (schedule.text_run if num_speech > schedule.speech_run - state.run_length else 0)

    def _go_on(self, ended: bool) -> None:
        """Gives the worker a block where the policy says so; at the end what the decoder holds back with the last."""
        if self._block is not None or self._is_complete:
            return
        size = self._policy.block_size(self._num_waiting, None if ended else self._num_ids_to_next)
        last = ended and size == self._num_waiting
        if not size and not last:
            return
        codes = torch.tensor(self.codes[self._num_decoded : self._num_decoded + size], dtype=torch.int64)
        runs_dry_at = self._policy.runs_dry_at
        due = self._due if runs_dry_at is None else runs_dry_at
        step = self._worker.step(self._models.decoder, codes, self._state, last, due)
        self._block = asyncio.wrap_future(step)
        self._policy.gave_block(size)
        self._num_decoded += size
        self._is_flushed = last

    def _take_sound(self, block: asyncio.Future[Stepped]) -> AudioDelta:
        self._block = None
        values, seconds = block.result()
        wav = values.clamp(-1.0, 1.0).float().numpy()
        self._policy.took_sound(len(wav) / rates.SPEAK_SAMPLE_RATE)
        self._stages["decoder"] += seconds
        self._note_once("first_audio_s", time.perf_counter() - self._start)
        self._num_samples += len(wav)
        return AudioDelta(wav, rates.SPEAK_SAMPLE_RATE, self._num_samples - len(wav))

    def _finish(self) -> None:
        self._note(
            total_s=time.perf_counter() - self._start,
            audio_s=self._num_samples / rates.SPEAK_SAMPLE_RATE,
            num_text_tokens=self._interleave.num_text,
            num_speech_tokens=self._interleave.num_speech,
            stages=self._stages,
        )

    def _note(self, **values: object) -> None:
        self.timings = dataclasses.replace(self.timings, **values)  # type: ignore[arg-type]

    def _note_once(self, name: str, seconds: float) -> None:
        if not getattr(self.timings, name):
            self._note(**{name: seconds})


async def _next(stream: AsyncIterator[int]) -> int | None:
    return await anext(stream, None)
