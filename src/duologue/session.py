"""Session: one conversation. It hears the user, asks the engine, and speaks while the engine goes on.

    pcm -> SpeechTokenizer -> speech tokens -> Engine -> interleaved ids -> text | SpeechDecoder -> pcm

A session owns states and ids and no weights.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from duologue import rates
from duologue.audio import StreamingResampler, check_wav
from duologue.events import AudioDelta, EndReason, Event, Interrupted, ReplyDone, SpeechDelta, TextDelta, Timings
from duologue.interleave import INTERLEAVED, TEXT_ONLY, InterleaveState, Kind, legal_prefix
from duologue.language.sampling import Sampling
from duologue.layers import Padded
from duologue.models import Models
from duologue.tokenizer.tokenizer import SpeechTokenizer
from duologue.turns import Conversation, Modality, Role, Turn
from duologue.vocabulary import TextStream
from duologue.worker import Worker

MIN_REPLY_TOKENS = 64

Pcm = NDArray[np.float32] | NDArray[np.int16] | bytes


@dataclass(frozen=True, eq=False)
class Reply:
    """A whole answer.

    Attributes:
        audio: float32 (S,) in [-1, 1]; empty for a reply in text alone.
        speech_tokens: codes in [0, codebook_size).
    """

    text: str
    audio: NDArray[np.float32]
    sample_rate: int
    speech_tokens: tuple[int, ...]
    reason: EndReason
    timings: Timings


class Session:
    """One conversation: what was said, as ids, and the state of listening.

    `feed` may be called at any time, also while a reply is being produced: what is said then belongs to the next turn.
    Time counts in samples of what was fed and produced, never by a clock.
    """

    _request_ids = itertools.count()

    def __init__(
        self,
        models: Models,
        worker: Worker,
        conversation: Conversation | None = None,
        *,
        language: str = "",
        voice: str = "",
        sampling: Sampling | None = None,
    ) -> None:
        card, vocabulary = models.card, models.vocabulary.hash
        if voice and voice not in card.voices:
            raise ValueError(f"{card.name} has no voice {voice!r}; it has {', '.join(card.voices)}")
        self.conversation = conversation or Conversation(vocabulary=vocabulary)
        if self.conversation.vocabulary != vocabulary:
            raise ValueError(
                f"the conversation was held in another vocabulary than that of {card.name}; its ids mean nothing"
            )
        self.models, self.worker = models, worker
        self.language, self.voice = language, voice
        self.sampling = sampling or card.sampling
        self.num_samples_fed = 0
        self._listening: _Listening | None = None
        self._written = ""
        self._replying = False
        self._cut_at: int | None = None

    def feed(self, pcm: Pcm, sample_rate: int = rates.LISTEN_SAMPLE_RATE) -> None:
        """Hears more of the user: float32 (S,) in [-1, 1], int16 (S,), or the bytes of little-endian int16.

        Raises:
            ValueError: unusable samples, or a rate that changes in the middle of a turn.
        """
        wav = check_wav(_as_float(pcm), sample_rate, "the pcm that was fed")
        if self._listening is None:
            self._listening = _Listening(self.models.tokenizer, sample_rate)
        self._listening.feed(wav, sample_rate)
        self.num_samples_fed += len(wav)

    async def hear(self, pcm: Pcm, sample_rate: int = rates.LISTEN_SAMPLE_RATE) -> None:
        """Hears more of the user as `feed` does, and prepares the reply while the user goes on."""
        self.feed(pcm, sample_rate)

    def write(self, text: str) -> None:
        """Takes more of the user's turn in writing."""
        self._written += text

    def discard(self) -> None:
        """Forgets what was said and written since the last turn."""
        self._listening, self._written = None, ""

    async def commit(self) -> Turn:
        """Ends the user's turn without a reply and returns it. Raises ValueError when nothing was said."""
        turn, _ = await self.worker.submit(self.end_user_turn)
        return turn

    async def question(self) -> tuple[Turn, float]:
        """The turn that a reply answers, and the seconds that ending it took."""
        turns = self.conversation.turns
        if self._listening is None and not self._written and turns and turns[-1].role is not Role.ASSISTANT:
            return turns[-1], 0.0
        return await self.worker.submit(self.end_user_turn)

    async def reply(self, *, text_only: bool = False, max_tokens: int | None = None) -> AsyncIterator[Event]:
        """Ends the user's turn, if something was said since the last one, and answers it; `ReplyDone` comes last.

        Args:
            max_tokens: ids of this reply at most, below the sampling's own bound.
        Raises:
            ValueError: nothing was said, a reply is under way, or the turn is longer than the model can hold.
        """
        if self._replying:
            raise ValueError("a reply is under way in this session; interrupt it first")
        self._replying, self._cut_at = True, None
        try:
            speaker = _Speaker(self, text_only, max_tokens)
            async for event in speaker.events():
                yield event
        finally:
            self._replying = False

    def reply_now(self, *, text_only: bool = False, on_event: Callable[[Event], None] | None = None) -> Reply:
        """The whole reply at once, without an event loop of one's own."""
        parts = []
        for event in self.events(text_only=text_only):
            if on_event:
                on_event(event)
            if isinstance(event, AudioDelta):
                parts.append(event.wav)
            if isinstance(event, ReplyDone):
                done = event
        audio = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        return Reply(done.text, audio, rates.SPEAK_SAMPLE_RATE, done.tokens, done.reason, done.timings)

    def events(self, *, text_only: bool = False) -> Iterator[Event]:
        """The events of `reply` for code without an event loop; they are produced in a thread."""
        events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()

        async def produce() -> None:
            async for event in self.reply(text_only=text_only):
                events.put(event)

        def work() -> None:
            try:
                asyncio.run(produce())
                events.put(None)
            except BaseException as error:
                events.put(error)

        threading.Thread(target=work, name="reply", daemon=True).start()
        while (event := events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event

    def interrupt(self, played_ms: float) -> None:
        """The user speaks into the reply: it ends, and the history keeps what was heard.

        Args:
            played_ms: how much of the reply's sound had been played. The reply may be under way or just done.
        """
        if played_ms < 0:
            raise ValueError(f"played_ms must not be negative, got {played_ms}")
        played = int(played_ms * rates.SPEAK_SAMPLE_RATE / 1000)
        if self._replying:
            self._cut_at = played
        elif self.conversation.turns and self.conversation.turns[-1].role is Role.ASSISTANT:
            self.cut_last_reply(played)

    def cut_last_reply(self, num_samples_played: int) -> int:
        """Shortens the last turn to what was heard; returns the speech tokens that stay."""
        *before, last = self.conversation.turns
        heard = rates.tokens_heard(num_samples_played, rates.SPEAK_SAMPLE_RATE)
        kinds = [self.models.vocabulary.kind(token) for token in last.ids]
        kept = last.ids[: legal_prefix(kinds, heard)]
        if len(kept) < len(last.ids):
            last = dataclasses.replace(last, ids=kept, interrupted=True)
        self.conversation = dataclasses.replace(self.conversation, turns=(*before, last))
        return sum(self.models.vocabulary.kind(token) is Kind.SPEECH for token in kept)

    def save(self, path: str | Path) -> None:
        """Writes the conversation as versioned JSON of token ids; see `turns.Conversation`."""
        self.conversation.save(path)

    @classmethod
    def load(cls, models: Models, worker: Worker, path: str | Path) -> Session:
        """Goes on with a saved conversation. Raises ValueError when it was held in another vocabulary."""
        return cls(models, worker, Conversation.load(path))

    def end_user_turn(self) -> Turn:
        """Makes a turn of what was said and written since the last one."""
        vocabulary = self.models.vocabulary
        spoken = [] if self._listening is None else vocabulary.speech_ids(self._listening.end())
        written = vocabulary.encode_text(self._written)
        self._listening, self._written = None, ""
        if not spoken and not written:
            raise ValueError("nothing was said: feed speech or write text before asking for a reply")
        modality = Modality.SPEECH if not written else Modality.INTERLEAVED if spoken else Modality.TEXT
        turn = Turn(Role.USER, modality, (*spoken, *written), self.language)
        self.conversation = self.conversation.plus(turn)
        return turn

    def prompt(self, reply: Modality) -> tuple[list[int], int]:
        """The prompt's ids, without the oldest turns where they do not fit, and the room for the reply."""
        size = self.models.engine.max_positions
        turns = self.conversation.turns
        while True:
            shortened = dataclasses.replace(self.conversation, turns=turns)
            prompt = self.models.vocabulary.prompt_ids(shortened, reply)
            if len(prompt) + MIN_REPLY_TOKENS <= size:
                return prompt, min(self.sampling.max_tokens, size - len(prompt))
            oldest = next((i for i, turn in enumerate(turns[:-1]) if turn.role is not Role.SYSTEM), None)
            if oldest is None:
                self.conversation = dataclasses.replace(self.conversation, turns=self.conversation.turns[:-1])
                seconds = size / rates.TOKEN_RATE
                raise ValueError(
                    f"the question is too long: its {len(prompt)} tokens do not fit the {size} positions of "
                    f"{self.models.card.name} (at most about {seconds:.0f} seconds of speech)"
                )
            turns = turns[:oldest] + turns[oldest + 1 :]

    @property
    def cut_at(self) -> int | None:
        """Samples of the reply that had been played when the user interrupted it; None while nobody did."""
        return self._cut_at

    def new_request_id(self) -> str:
        return f"reply-{next(self._request_ids)}"


class _Listening:
    """The user's turn while it is being said."""

    def __init__(self, tokenizer: SpeechTokenizer, sample_rate: int) -> None:
        self._tokenizer = tokenizer
        self._sample_rate = sample_rate
        self._resampler = StreamingResampler(sample_rate, rates.LISTEN_SAMPLE_RATE)
        with torch.inference_mode():
            self._state = tokenizer.init_state(1)
        self._codes: list[int] = []

    def feed(self, wav: NDArray[np.float32], sample_rate: int) -> None:
        if sample_rate != self._sample_rate:
            raise ValueError(f"the sample rate changed from {self._sample_rate} to {sample_rate} Hz within one turn")
        self._step(self._resampler.step(wav))

    def end(self) -> list[int]:
        """All codes of the turn."""
        self._step(self._resampler.step(np.zeros(0, np.float32), last=True))
        with torch.inference_mode():
            self._codes += self._tokenizer.flush(self._state).rows()[0].tolist()
        return self._codes

    def _step(self, wav: NDArray[np.float32]) -> None:
        device = self._state.features.buffer.values.device
        with torch.inference_mode():
            codes = self._tokenizer.step(Padded.full(torch.from_numpy(wav)[None].to(device)), self._state)
        self._codes += codes.rows()[0].tolist()


class _Speaker:
    """One reply while it is produced: ids from the engine, sound by the worker while the next ids are made."""

    def __init__(self, session: Session, text_only: bool, max_tokens: int | None) -> None:
        self._session, self._models, self._worker = session, session.models, session.worker
        self._max_tokens = max_tokens
        self._modality = Modality.TEXT if text_only else Modality.INTERLEAVED
        self._schedule = TEXT_ONLY if text_only else INTERLEAVED
        self._ids: list[int] = []
        self._codes: list[int] = []
        self._text = TextStream(self._models.vocabulary)
        self._transcript = ""
        self._interleave = InterleaveState(self._schedule)
        self._blocks: deque[asyncio.Future[tuple[NDArray[np.float32], float]]] = deque()
        self._num_decoded = 0
        self._num_samples = 0
        self._start = time.perf_counter()
        self._timings = Timings()
        self._stages = {"tokenizer": 0.0, "language": 0.0, "decoder": 0.0}

    async def events(self) -> AsyncIterator[Event]:
        session, models = self._session, self._models
        turn, self._stages["tokenizer"] = await session.question()
        self._note(tokenize_s=self._stages["tokenizer"])
        prompt, max_tokens = session.prompt(self._modality)
        max_tokens = min(max_tokens, self._max_tokens or max_tokens)
        sampling = dataclasses.replace(session.sampling, max_tokens=max_tokens)
        card = models.card
        with torch.inference_mode():
            self._state = models.decoder.init_state(1, card.num_steps, card.guidance_scale, sampling.seed)
        request_id = session.new_request_id()
        stream = models.engine.generate(prompt, sampling, self._schedule, request_id)
        reason = EndReason.LENGTH
        asked = time.perf_counter()
        try:
            async for token in stream:
                self._stages["language"] += time.perf_counter() - asked
                self._note_once("prefill_s", self._stages["language"])
                if session.cut_at is not None:
                    reason = EndReason.INTERRUPTED
                    break
                kind = models.vocabulary.kind(token)
                self._interleave.advance(kind)
                if kind is Kind.END:
                    reason = EndReason.END
                    break
                self._ids.append(token)
                yield self._take_text(token) if kind is Kind.TEXT else self._take_speech(token)
                while self._blocks and self._blocks[0].done():
                    yield await self._sound()
                asked = time.perf_counter()
        finally:
            models.engine.cancel(request_id)
            await stream.aclose()  # type: ignore[attr-defined]
        if rest := self._text.flush():
            self._transcript += rest
            yield TextDelta(rest)
        if self._codes and reason is not EndReason.INTERRUPTED:
            self._decode(last=True)
        while self._blocks and session.cut_at is None:
            yield await self._sound()
        interrupted = self._end_turn(turn)
        if interrupted:
            reason = EndReason.INTERRUPTED
            yield interrupted
        self._note(
            total_s=time.perf_counter() - self._start,
            audio_s=self._num_samples / rates.SPEAK_SAMPLE_RATE,
            num_text_tokens=self._interleave.num_text,
            num_speech_tokens=self._interleave.num_speech,
            stages=self._stages,
        )
        yield ReplyDone(self._transcript, tuple(self._codes), reason, self._timings)

    def _take_text(self, token: int) -> TextDelta:
        text = self._text.push([token])
        self._note_once("first_text_s", time.perf_counter() - self._start)
        self._transcript += text
        return TextDelta(text, (token,))

    def _take_speech(self, token: int) -> SpeechDelta:
        code = self._models.vocabulary.speech_code(token)
        self._codes.append(code)
        if len(self._codes) - self._num_decoded == rates.BLOCK_TOKENS:
            self._decode(last=False)
        return SpeechDelta((code,))

    def _decode(self, last: bool) -> None:
        """Starts the worker on the codes that have come since the last block."""
        codes = torch.tensor([self._codes[self._num_decoded :]], dtype=torch.int64, device=self._device)
        self._num_decoded = len(self._codes)

        def work() -> NDArray[np.float32]:
            wav = self._models.decoder.step(Padded.full(codes), self._state)
            if last:
                wav = Padded.concat([wav, self._models.decoder.flush(self._state)])
            return wav.rows()[0].clamp(-1.0, 1.0).float().cpu().numpy()

        self._blocks.append(self._worker.submit(work))

    async def _sound(self) -> AudioDelta:
        wav, seconds = await self._blocks.popleft()
        self._stages["decoder"] += seconds
        self._note_once("first_audio_s", time.perf_counter() - self._start)
        self._num_samples += len(wav)
        return AudioDelta(wav, rates.SPEAK_SAMPLE_RATE, self._num_samples - len(wav))

    def _end_turn(self, user: Turn) -> Interrupted | None:
        """Adds the reply to the history, cut to what was heard if the user interrupted it."""
        session = self._session
        turn = Turn(Role.ASSISTANT, self._modality, tuple(self._ids), user.language, session.voice)
        session.conversation = session.conversation.plus(turn)
        if session.cut_at is None:
            return None
        return Interrupted(session.cut_at, session.cut_last_reply(session.cut_at))

    @property
    def _device(self) -> torch.device:
        return next(self._models.decoder.parameters()).device

    def _note(self, **values: object) -> None:
        self._timings = dataclasses.replace(self._timings, **values)  # type: ignore[arg-type]

    def _note_once(self, name: str, seconds: float) -> None:
        if not getattr(self._timings, name):
            self._note(**{name: seconds})


def _as_float(pcm: Pcm) -> NDArray[np.float32]:
    if isinstance(pcm, bytes):
        if len(pcm) % 2:
            raise ValueError(f"pcm must hold whole 16-bit samples, got {len(pcm)} bytes")
        pcm = np.frombuffer(pcm, "<i2")
    if pcm.dtype == np.int16:
        return pcm.astype(np.float32) / 32768.0
    if pcm.dtype != np.float32:
        raise ValueError(f"pcm must be float32, int16 or bytes of int16, not {pcm.dtype}")
    return pcm  # type: ignore[return-value]
