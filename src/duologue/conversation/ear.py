"""Listening: the user's turn while it is being said.

    pcm -> resampled to 16 kHz -> whole attention blocks -> worker -> speech tokens -> engine.warm

The tokenizer gives the tokens of an attention block when the block is closed, so it is called when one is, and for the
open one at the end of speech. What is settled of the prompt goes to the engine at once (listen-ahead): at the end of
speech only the open block remains, however long the speech and the history are.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from duologue import rates
from duologue.audio import LogMel, StreamingResampler
from duologue.conversation.worker import Stepped, Worker, WorkerFull
from duologue.language.engine import Engine
from duologue.tokenizer.tokenizer import SpeechTokenizer

RESPONSE_S = 0.5
"""When work for which the user waits is due: behind playback that runs dry sooner, before all that has time."""

MAX_BEHIND_S = 10.0
"""Sound that may wait for the tokenizer before `Session.hear` waits too."""


class Listening:
    """Speech tokens of one turn. One step of the tokenizer is under way at most; what comes meanwhile goes along with
    the next one. Methods may be called from any thread.

    Args:
        on_settled: called in the worker's thread when more tokens are settled.
    """

    def __init__(
        self, tokenizer: SpeechTokenizer, worker: Worker, sample_rate: int, on_settled: Callable[[], None]
    ) -> None:
        self._tokenizer, self._worker, self._sample_rate = tokenizer, worker, sample_rate
        self._on_settled = on_settled
        self._resampler = StreamingResampler(sample_rate, rates.LISTEN_SAMPLE_RATE)
        with torch.inference_mode():
            self._state = tokenizer.init_state(1)
        self._lock = threading.RLock()
        self._waiting = np.zeros(0, np.float32)
        self._num_stepped = 0
        self._codes: list[int] = []
        self._step: Future[Stepped] | None = None
        self._ending = False
        self._ended: Future[list[int]] = Future()
        self._ended.set_running_or_notify_cancel()  # who waits for it may give up, it itself is never cancelled
        self.seconds = 0.0

    @property
    def codes(self) -> tuple[int, ...]:
        """Settled so far."""
        with self._lock:
            return tuple(self._codes)

    @property
    def step(self) -> Future[Stepped] | None:
        """What is under way for this turn."""
        return self._step

    @property
    def seconds_behind(self) -> float:
        """Sound that could be tokenized and is not yet, in seconds."""
        with self._lock:
            num_heard = self._num_stepped + len(self._waiting)
            return max(self._num_settled(num_heard) - self._num_stepped, 0) / rates.LISTEN_SAMPLE_RATE

    def feed(self, wav: NDArray[np.float32], sample_rate: int) -> None:
        """Takes samples (S,) float32.

        Raises:
            ValueError: the rate changed within the turn.
        """
        if sample_rate != self._sample_rate:
            raise ValueError(f"the sample rate changed from {self._sample_rate} to {sample_rate} Hz within one turn")
        with self._lock:
            self._waiting = np.concatenate([self._waiting, self._resampler.step(wav)])
            with suppress(WorkerFull):  # the samples are kept, and the next ones or the end try again
                self._go_on()

    def end(self) -> Future[list[int]]:
        """Ends the turn; the future gives all its codes. Raises WorkerFull when the device has too much to do."""
        with self._lock:
            if not self._ending:
                rest = self._resampler.step(np.zeros(0, np.float32), last=True)
                self._waiting = np.concatenate([self._waiting, rest])
                self._ending, self.seconds = True, 0.0
                self._go_on()
        return self._ended

    def drop(self) -> None:
        """Forgets the turn: a step that has not begun is cancelled."""
        with self._lock:
            self._waiting = np.zeros(0, np.float32)
            if self._step is not None:
                self._step.cancel()

    def _go_on(self) -> None:
        """Starts a step, if none is under way and a block is closed or the turn has ended. Under the lock."""
        if self._step is not None or self._ended.done():
            return
        num_heard = self._num_stepped + len(self._waiting)
        count = (num_heard if self._ending else self._num_settled(num_heard)) - self._num_stepped
        if count <= 0 and not self._ending:
            return
        last = self._ending
        due = time.monotonic() + (RESPONSE_S if last else self._tokenizer.block_tokens / rates.TOKEN_RATE)
        self._step = self._worker.step(self._tokenizer, torch.from_numpy(self._waiting[:count]), self._state, last, due)
        self._waiting = self._waiting[count:]
        self._num_stepped += count
        self._step.add_done_callback(lambda step: self._take_in(step, last))

    def _take_in(self, step: Future[Stepped], last: bool) -> None:
        with self._lock:
            self._step = None
            if step.cancelled():
                return
            if (error := step.exception()) is not None:
                self._ended.set_exception(error)
                return
            self._codes += step.result().values.tolist()
            self.seconds += step.result().seconds
            if last:
                self._ended.set_result(self._codes)
                return
            try:
                self._go_on()
            except WorkerFull as error:
                if self._ending:
                    self._ended.set_exception(error)
        self._on_settled()

    def _num_settled(self, num_samples: int) -> int:
        """Of so many samples of the turn, those that a step must hold to give all tokens that can be final."""
        tokenizer = self._tokenizer
        piece, rest = divmod(num_samples, tokenizer.piece_samples)
        block = tokenizer.block_tokens * rates.SAMPLES_PER_TOKEN
        edge = LogMel.edge - rates.LISTEN_HOP  # the last frame of a block sees so far beyond it
        num_blocks = max(rest - edge, 0) // block
        return piece * tokenizer.piece_samples + (num_blocks * block + edge if num_blocks else 0)


class Ahead:
    """Keeps the engine warm with what is certain of the next prompt; asks once at a time, with the newest.

    Args:
        prompt: gives the ids, None while they are unknown; called in the event loop.
    """

    def __init__(self, engine: Engine, prompt: Callable[[], Sequence[int] | None]) -> None:
        self._engine, self._prompt = engine, prompt
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._stale = self._stopped = False

    def start(self) -> None:
        """Begins, in the event loop that is running."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._wake()

    def notify(self) -> None:
        """More is known; from any thread."""
        if self._loop is not None and not self._stopped:
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:
                self._stopped = True  # that loop is closed, so nobody hears ahead in it any more

    def stop(self) -> None:
        """No more requests; one that is under way ends by itself, since the reply needs what it computes."""
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
                # Too long a prompt, or no room for it now: the reply will say so. Nothing was promised here.
                self._stopped = True
