"""The ear: what the user says becomes speech tokens while it is being said.

    pcm -> resampled to 16 kHz -> whole attention blocks -> worker -> speech tokens -> engine.warm

The tokenizer gives the tokens of an attention block when the block is closed, so it is called when one is, and for the
open one at the end of speech. What is settled of the prompt goes to the engine at once (listen-ahead): at the end of
speech only the open block remains, however long the speech and the history are.

An `Ear` lasts as long as its conversation. Each turn in it is one `TurnTokenizer`, with one `PromptPrefetcher`.
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
"""When work for which the user waits is due: behind playback that runs dry sooner, before all that has time."""

MAX_BEHIND_S = 10.0
"""Sound that may wait for the tokenizer before `Ear.hear` waits too."""

PATIENT_BEHIND_S = 2.0
"""The same where the work may wait for others: short steps, so that those never wait for a long one."""


class SpokenTurn(NamedTuple):
    """What was said in one turn.

    Attributes:
        codes: its speech tokens, in [0, codebook_size).
        seconds: of work between the end of the turn and the last token.
    """

    codes: tuple[int, ...]
    seconds: float


class Ear:
    """Hears the user of one conversation, turn by turn, also while a reply is produced.

    The heavy work is done by the worker and the engine, in their own threads.

    Args:
        context: gives the conversation before the open turn, None while it depends on a reply in progress. It is called
            in the event loop each time the next prompt is prefilled. Without it nothing is prefilled.
        patience_s: seconds that the work may wait for that of live conversations.

    Attributes:
        num_samples: samples that were fed, over all turns.
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
        """Has the turn begun that the next `finish` ends?"""
        return self._turn is not None

    def feed(self, pcm: Pcm, sample_rate: int = rates.LISTEN_SAMPLE_RATE) -> None:
        """Takes more of the turn and returns at once; the worker makes tokens of what is complete.

        Raises:
            ValueError: unusable samples, or a rate that changes in the middle of a turn.
        """
        self._feed(check_wav(pcm, sample_rate, "the pcm that was fed"), sample_rate)

    async def hear(self, pcm: Pcm, sample_rate: int = rates.LISTEN_SAMPLE_RATE) -> None:
        """Takes more of the turn as `feed` does, and prefills the next prompt with what is settled.

        Waits only when the tokenizer has fallen far behind. Raises ValueError as `feed`.
        """
        wav = check_wav(pcm, sample_rate, "the pcm that was heard")
        max_behind_s = PATIENT_BEHIND_S if self._patience_s else MAX_BEHIND_S
        for start in range(0, len(wav), sample_rate):  # by the second: a long piece does not keep the event loop
            if start:
                await asyncio.sleep(0)
            turn = self._feed(wav[start : start + sample_rate], sample_rate)
            if self._prefetcher is not None:
                self._prefetcher.start()
            while turn.seconds_behind > max_behind_s and (step := turn.step) is not None:
                await asyncio.wait([asyncio.wrap_future(step)])

    def finish(self) -> asyncio.Future[SpokenTurn]:
        """Ends the turn now; what is fed from here on belongs to the next one. Needs a running event loop.

        Raises:
            WorkerFull: the device has too much to do; the turn is lost.
        """
        turn = self._close()
        if turn is not None:
            return asyncio.wrap_future(turn.end())
        nothing: asyncio.Future[SpokenTurn] = asyncio.get_running_loop().create_future()
        nothing.set_result(SpokenTurn((), 0.0))
        return nothing

    def discard(self) -> None:
        """Forgets the open turn."""
        turn = self._close()
        if turn is not None:
            turn.drop()

    def context_changed(self) -> None:
        """The conversation before the open turn is another one now. From any thread."""
        if self._prefetcher is not None:
            self._prefetcher.notify()

    def close(self) -> None:
        """The conversation is over: forgets the open turn and where the context came from."""
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
        """The settled beginning of the next prompt; None while it is unknown."""
        context = None if self._context is None else self._context()
        if self._turn is None or context is None:
            return None
        return open_prompt(self.models, context, self._turn.codes)


async def tokenize(
    models: Models, worker: Worker, pcm: Pcm, sample_rate: int, patience_s: float = 0.0
) -> tuple[int, ...]:
    """Speech tokens of samples (S,), made by the worker step by step; see `Ear` for the arguments and errors."""
    ear = Ear(models, worker, patience_s=patience_s)
    await ear.hear(pcm, sample_rate)
    return (await ear.finish()).codes


class TurnTokenizer:
    """Speech tokens of one turn. One step of the tokenizer is under way at most; what comes meanwhile goes along with
    the next one. Methods may be called from any thread.

    Args:
        on_settled: called in the worker's thread when more tokens are settled.
        patience_s: seconds by which the work is due later.
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
        with torch.inference_mode():
            self._state = tokenizer.init_state(1)
        self._lock = threading.RLock()
        self._waiting = np.zeros(0, np.float32)
        self._num_stepped = 0
        self._codes: list[int] = []
        self._step: Future[StepResult] | None = None
        self._ending = False
        self._ended: Future[SpokenTurn] = Future()
        self._ended.set_running_or_notify_cancel()  # who waits for it may give up, it itself is never cancelled
        self._seconds = 0.0

    @property
    def codes(self) -> tuple[int, ...]:
        """Settled so far."""
        with self._lock:
            return tuple(self._codes)

    @property
    def step(self) -> Future[StepResult] | None:
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

    def end(self) -> Future[SpokenTurn]:
        """Ends the turn; the future gives all of it. Raises WorkerFull when the device has too much to do."""
        with self._lock:
            if not self._ending:
                rest = self._resampler.step(np.zeros(0, np.float32), last=True)
                self._waiting = np.concatenate([self._waiting, rest])
                self._ending, self._seconds = True, 0.0
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
        """How many of the first `num_samples` samples suffice for every token that can already be final."""
        tokenizer = self._tokenizer
        piece, rest = divmod(num_samples, tokenizer.piece_samples)
        block = tokenizer.block_tokens * rates.SAMPLES_PER_TOKEN
        edge = LogMel.edge - rates.LISTEN_HOP  # the last frame of a block sees so far beyond it
        num_blocks = max(rest - edge, 0) // block
        return piece * tokenizer.piece_samples + (num_blocks * block + edge if num_blocks else 0)


class PromptPrefetcher:
    """Prefills the engine with the settled beginning of the next prompt.

    One request is in flight at most; a newer beginning replaces one that waits.

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
