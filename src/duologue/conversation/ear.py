"""The ear: speech becomes tokens while the user speaks.

    pcm -> resampled to 16 kHz -> whole attention blocks -> worker -> speech tokens -> engine.warm

The tokenizer runs when an attention block closes, and at the end of the turn. Settled tokens are prefilled at once, so
only the open block remains at the end of the turn. An `Ear` serves a conversation; each turn has one `TurnTokenizer`
and one `PromptPrefetcher`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from duologue import rates
from duologue.audio import LogMel, StreamingResampler, check_wav
from duologue.conversation.history import open_prompt
from duologue.conversation.worker import StepResult, Worker, WorkerFull
from duologue.language.engine import Engine
from duologue.models import Models
from duologue.pcm import Pcm
from duologue.tokenizer.tokenizer import SpeechTokenizer
from duologue.turns import Conversation

RESPONSE_S = 0.5
"""Deadline of work for which the user waits; imminent playback underruns come first."""

MAX_BEHIND_S = 10.0
"""Backlog of the tokenizer, in seconds, at which `Ear.hear` waits."""

PATIENT_BEHIND_S = 2.0
"""The same limit for patient work: short steps never delay live conversations for long."""


class SpokenTurn(NamedTuple):
    """The result of one spoken turn.

    Attributes:
        codes: its speech tokens, in [0, codebook_size).
        seconds: work between the end of the turn and the last token.
    """

    codes: tuple[int, ...]
    seconds: float


class Ear:
    """Hears the user of one conversation turn by turn, also during a reply.

    The heavy work runs in the threads of worker and engine.

    Args:
        context: returns the conversation before the open turn, None while a reply is in progress. The event loop calls
            it before each prefill. Without it there is no prefill.
        patience_s: seconds by which live conversations take precedence.

    Attributes:
        num_samples: samples fed, over all turns.
    """

    def __init__(
        self,
        models: Models,
        worker: Worker,
        context: Callable[[], Conversation | None] | None = None,
        *,
        patience_s: float = 0.0,
    ) -> None:
        self.models, self.num_samples = models, 0
        self._worker, self._context, self._patience_s = worker, context, patience_s
        self._turn: TurnTokenizer | None = None
        self._prefetcher: PromptPrefetcher | None = None

    @property
    def is_open(self) -> bool:
        """Whether a turn is open that `finish` would end."""
        return self._turn is not None

    def feed(self, pcm: Pcm, sample_rate: int = rates.LISTEN_SAMPLE_RATE) -> None:
        """Appends samples to the turn without waiting.

        Raises:
            ValueError: unusable samples, or a sample rate that changes within the turn.
        """
        self._feed(check_wav(pcm, sample_rate, "the pcm that was fed"), sample_rate)

    async def hear(self, pcm: Pcm, sample_rate: int = rates.LISTEN_SAMPLE_RATE) -> None:
        """Appends samples as `feed` does and prefills the settled prompt.

        Waits only while the tokenizer is far behind. Raises ValueError as `feed`.
        """
        wav = check_wav(pcm, sample_rate, "the pcm that was heard")
        max_behind_s = PATIENT_BEHIND_S if self._patience_s else MAX_BEHIND_S
        for start in range(0, len(wav), sample_rate):  # one second at a time, to yield to the event loop
            if start:
                await asyncio.sleep(0)
            turn = self._feed(wav[start : start + sample_rate], sample_rate)
            if self._prefetcher is not None:
                self._prefetcher.start()
            while turn.seconds_behind > max_behind_s and (step := turn.step) is not None:
                await asyncio.wait([asyncio.wrap_future(step)])

    def finish(self) -> asyncio.Future[SpokenTurn]:
        """Ends the turn; later samples belong to the next one. Needs a running event loop.

        Raises:
            WorkerFull: the device is overloaded; the turn is lost.
        """
        turn = self._close()
        if turn is not None:
            return asyncio.wrap_future(turn.end())
        nothing: asyncio.Future[SpokenTurn] = asyncio.get_running_loop().create_future()
        nothing.set_result(SpokenTurn((), 0.0))
        return nothing

    def discard(self) -> None:
        """Discards the open turn."""
        turn = self._close()
        if turn is not None:
            turn.drop()

    def context_changed(self) -> None:
        """Reports a change of the conversation before the open turn. Thread-safe."""
        if self._prefetcher is not None:
            self._prefetcher.notify()

    def close(self) -> None:
        """Ends the conversation and discards the open turn."""
        self.discard()
        self._context = None

    def _feed(self, wav: NDArray[np.float32], sample_rate: int) -> TurnTokenizer:
        turn = self._turn
        if turn is None:
            if self._context is not None:
                self._prefetcher = PromptPrefetcher(self.models.engine, self._open_prompt)
            turn = TurnTokenizer(
                self.models.tokenizer, self._worker, sample_rate, self.context_changed, patience_s=self._patience_s
            )
            self._turn = turn
        turn.feed(wav, sample_rate)
        self.num_samples += len(wav)
        return turn

    def _close(self) -> TurnTokenizer | None:
        if self._prefetcher is not None:
            self._prefetcher.stop()
        turn, self._turn, self._prefetcher = self._turn, None, None
        return turn

    def _open_prompt(self) -> list[int] | None:
        """Returns the settled beginning of the next prompt; None while it is unknown."""
        context = None if self._context is None else self._context()
        if self._turn is None or context is None:
            return None
        return open_prompt(self.models, context, self._turn.codes)


async def tokenize(
    models: Models, worker: Worker, pcm: Pcm, sample_rate: int, patience_s: float = 0.0
) -> tuple[int, ...]:
    """Tokenizes samples (S,) step by step on the worker; see `Ear` for arguments and errors."""
    ear = Ear(models, worker, patience_s=patience_s)
    await ear.hear(pcm, sample_rate)
    return (await ear.finish()).codes


class TurnTokenizer:
    """Speech tokens of one turn. At most one tokenizer step is in flight; newer samples wait for the next. Thread-safe.

    Args:
        on_settled: called in the worker's thread when more tokens are settled.
        patience_s: seconds added to the deadlines.
    """

    def __init__(
        self,
        tokenizer: SpeechTokenizer,
        worker: Worker,
        sample_rate: int,
        on_settled: Callable[[], None],
        patience_s: float = 0.0,
    ) -> None:
        self._tokenizer, self._worker, self._sample_rate = tokenizer, worker, sample_rate
        self._on_settled, self._patience_s = on_settled, patience_s
        self._resampler = StreamingResampler(sample_rate, rates.LISTEN_SAMPLE_RATE)
        with torch.inference_mode(), worker.on_stream():
            self._state = tokenizer.init_state(1)
        self._lock = threading.RLock()
        self._waiting = np.zeros(0, np.float32)
        self._num_stepped = 0
        self._codes: list[int] = []
        self._step: Future[StepResult] | None = None
        self._ending = False
        self._ended: Future[SpokenTurn] = Future()
        self._ended.set_running_or_notify_cancel()  # waiters cannot cancel it
        self._seconds = 0.0

    @property
    def codes(self) -> tuple[int, ...]:
        """Settled tokens."""
        with self._lock:
            return tuple(self._codes)

    @property
    def step(self) -> Future[StepResult] | None:
        """The step in flight."""
        return self._step

    @property
    def seconds_behind(self) -> float:
        """Seconds of audio that could be tokenized but are not."""
        with self._lock:
            num_heard = self._num_stepped + len(self._waiting)
            return max(self._num_settled(num_heard) - self._num_stepped, 0) / rates.LISTEN_SAMPLE_RATE

    def feed(self, wav: NDArray[np.float32], sample_rate: int) -> None:
        """Appends samples (S,) float32.

        Raises:
            ValueError: the sample rate changed within the turn.
        """
        if sample_rate != self._sample_rate:
            raise ValueError(f"the sample rate changed from {self._sample_rate} to {sample_rate} Hz within one turn")
        with self._lock:
            self._waiting = np.concatenate([self._waiting, self._resampler.step(wav)])
            with suppress(WorkerFull):  # samples are kept; the next call tries again
                self._go_on()

    def end(self) -> Future[SpokenTurn]:
        """Ends the turn and returns a future of the result. Raises WorkerFull if the device is overloaded."""
        with self._lock:
            if not self._ending:
                rest = self._resampler.step(np.zeros(0, np.float32), last=True)
                self._waiting = np.concatenate([self._waiting, rest])
                self._ending, self._seconds = True, 0.0
                self._go_on()
        return self._ended

    def drop(self) -> None:
        """Discards the turn and cancels a step that has not started."""
        with self._lock:
            self._waiting = np.zeros(0, np.float32)
            if self._step is not None:
                self._step.cancel()

    def _go_on(self) -> None:
        """Starts a step if none is in flight and a block closed or the turn ended. Needs the lock."""
        if self._step is not None or self._ended.done():
            return
        num_heard = self._num_stepped + len(self._waiting)
        count = (num_heard if self._ending else self._num_settled(num_heard)) - self._num_stepped
        if count <= 0 and not self._ending:
            return
        last = self._ending
        due = time.monotonic() + self._patience_s
        due += RESPONSE_S if last else self._tokenizer.block_tokens / rates.TOKEN_RATE
        self._step = self._worker.step(self._tokenizer, torch.from_numpy(self._waiting[:count]), self._state, last, due)
        self._waiting = self._waiting[count:]
        self._num_stepped += count
        self._step.add_done_callback(lambda step: self._take_in(step, last))

    def _take_in(self, step: Future[StepResult], last: bool) -> None:
        with self._lock:
            self._step = None
            if step.cancelled():
                return
            if (error := step.exception()) is not None:
                self._ended.set_exception(error)
                return
            self._codes += step.result().values.tolist()
            self._seconds += step.result().seconds
            if last:
                self._ended.set_result(SpokenTurn(tuple(self._codes), self._seconds))
                return
            try:
                self._go_on()
            except WorkerFull as error:
                if self._ending:
                    self._ended.set_exception(error)
        self._on_settled()

    def _num_settled(self, num_samples: int) -> int:
        """Returns how many of the first `num_samples` samples suffice for every token that can already be final."""
        tokenizer = self._tokenizer
        piece, rest = divmod(num_samples, tokenizer.piece_samples)
        block = tokenizer.block_tokens * rates.SAMPLES_PER_TOKEN
        edge = LogMel.edge - rates.LISTEN_HOP  # lookahead of the last frame of a block
        num_blocks = max(rest - edge, 0) // block
        return piece * tokenizer.piece_samples + (num_blocks * block + edge if num_blocks else 0)


class PromptPrefetcher:
    """Prefills the KV cache with the settled prefix of the next prompt.

    One request is in flight; a newer prefix replaces a waiting one.

    Args:
        prompt: returns the ids, None while they are unknown; called in the event loop.
    """

    def __init__(self, engine: Engine, prompt: Callable[[], Sequence[int] | None]) -> None:
        self._engine, self._prompt = engine, prompt
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._stale = self._stopped = False

    def start(self) -> None:
        """Starts in the running event loop."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._wake()

    def notify(self) -> None:
        """Reports a longer prefix. Thread-safe."""
        if self._loop is not None and not self._stopped:
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:
                self._stopped = True  # the loop is closed

    def stop(self) -> None:
        """Stops new requests; the one in flight completes, because the reply needs its result."""
        self._stopped = True

    def _wake(self) -> None:
        self._stale = True
        if self._loop is not None and not self._stopped and (self._task is None or self._task.done()):
            self._task = self._loop.create_task(self._warm())

    async def _warm(self) -> None:
        while self._stale and not self._stopped:
            self._stale = False
            try:
                if (ids := self._prompt()) is None:
                    return
                await self._engine.warm(ids)
            except (ValueError, RuntimeError):
                # The prompt is too long or has no room now; the reply reports it.
                self._stopped = True
