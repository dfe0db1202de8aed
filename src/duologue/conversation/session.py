"""Session: one conversation for Python code, made of an ear, a mouth per reply and the history.

    pcm -> Ear -> speech tokens -> prompt -> Mouth -> text and audio

A session owns states and ids, no weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing
from pathlib import Path
from types import NoneType

import numpy as np

from duologue import rates
from duologue.config import check_type
from duologue.conversation.answer import Reply, recognition
from duologue.conversation.block_policy import BlockPolicy
from duologue.conversation.ear import Ear
from duologue.conversation.events import AudioDelta, Event, Interrupted, ReplyDone
from duologue.conversation.history import heard_part, reply_prompt, turn_of
from duologue.conversation.mouth import Mouth
from duologue.conversation.worker import Worker
from duologue.interleave import Kind
from duologue.language.sampling import Sampling
from duologue.models import Models
from duologue.pcm import Pcm
from duologue.turns import Conversation, Role, Turn


class Session:
    """One conversation.

    `feed` and `hear` also work during a reply; the samples then belong to the next turn. The heavy work runs in the
    threads of worker and engine.

    Args:
        conversation: earlier turns; a new conversation by default.
        policy: creates the block policy of a reply.

    Raises:
        ValueError: an unknown voice, or a conversation in another vocabulary.
        TypeError: an argument of another type.
    """

    def __init__(
        self,
        models: Models,
        worker: Worker,
        conversation: Conversation | None = None,
        *,
        language: str = "",
        voice: str = "",
        sampling: Sampling | None = None,
        policy: Callable[[], BlockPolicy] = BlockPolicy,
    ) -> None:
        check_type("language", language, str)
        check_type("voice", voice, str)
        check_type("sampling", sampling, Sampling, NoneType)
        card, vocabulary = models.card, models.vocabulary.hash
        if voice and voice not in card.voices:
            raise ValueError(f"{card.name} has no voice {voice!r}; it has {', '.join(card.voices)}")
        self._conversation = conversation or Conversation(vocabulary=vocabulary)
        if self._conversation.vocabulary != vocabulary:
            raise ValueError(f"the conversation uses another vocabulary than {card.name}")
        self.models, self.worker = models, worker
        self.language, self.voice = language, voice
        self.sampling = sampling or card.sampling
        self.ear = Ear(models, worker, self._context)
        self._policy = policy
        self._written = ""
        self._mouth: Mouth | None = None

    def __repr__(self) -> str:
        return f"Session({self.models.card.name}, {len(self._conversation.turns)} turns)"

    @property
    def conversation(self) -> Conversation:
        """The completed turns."""
        return self._conversation

    def feed(self, pcm: Pcm, sample_rate: int = rates.LISTEN_SAMPLE_RATE) -> None:
        """Appends audio to the user's turn without waiting: float32 (S,) in [-1, 1], int16 (S,) or bytes of
        little-endian int16.

        Raises:
            ValueError: unusable samples, or a sample rate that changes within the turn.
        """
        self.ear.feed(pcm, sample_rate)

    async def hear(self, pcm: Pcm, sample_rate: int = rates.LISTEN_SAMPLE_RATE) -> None:
        """Appends audio as `feed` does, and prefills settled tokens in the background.

        Waits only while the tokenizer is far behind. Raises ValueError as `feed`.
        """
        await self.ear.hear(pcm, sample_rate)

    def write(self, text: str) -> None:
        """Appends text to the user's turn. Raises TypeError for anything but str."""
        check_type("text", text, str)
        self._written += text

    def discard(self) -> None:
        """Discards the open turn."""
        self._written = ""
        self.ear.discard()

    async def commit(self) -> Turn:
        """Ends the user's turn without a reply and returns it.

        Raises:
            ValueError: the turn is empty.
            WorkerFull: the device is overloaded; the turn is lost.
        """
        turn, _ = await self._commit()
        return turn

    async def reply(self, *, text_only: bool = False, max_tokens: int | None = None) -> AsyncGenerator[Event, None]:
        """Ends the open user turn, if any, and yields the events of the reply; `ReplyDone` is last.

        Args:
            max_tokens: maximum ids of this reply, within the limit of the sampling.

        Raises:
            ValueError: the turn is empty, a reply is in progress, or the turn is too long.
        """
        if self._mouth is not None:
            raise ValueError("a reply is in progress in this session; interrupt it first")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        sampling = dataclasses.replace(
            self.sampling, max_tokens=min(self.sampling.max_tokens, max_tokens or self.sampling.max_tokens)
        )
        mouth = self._mouth = Mouth(self.models, self.worker, text_only=text_only, policy=self._policy())
        try:
            question, question_s = await self._question()
            try:
                prompt, sampling = reply_prompt(self.models, self._conversation, mouth.modality, sampling)
            except ValueError:
                if question_s is not None:  # drops a question that cannot be answered
                    self._replace(turn for turn in self._conversation if turn is not question)
                raise
            async with aclosing(mouth.speak(prompt, sampling, question_s or 0.0)) as events:
                async for event in events:
                    if isinstance(event, Interrupted | ReplyDone) and self._mouth is mouth:
                        self._add_reply(mouth.turn, question)
                        self._dismiss(mouth)  # the reply is over before its last events are read
                    yield event
        finally:
            self._dismiss(mouth)

    def reply_now(self, *, text_only: bool = False, on_event: Callable[[Event], None] | None = None) -> Reply:
        """Returns the complete reply; for code without an event loop."""
        parts = []
        for event in self.events(text_only=text_only):
            if on_event:
                on_event(event)
            if isinstance(event, AudioDelta):
                parts.append(event.wav)
            if isinstance(event, ReplyDone):
                done = event
        audio = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        vocabulary = self.models.vocabulary
        question = next(turn for turn in reversed(self._conversation.turns) if turn.role is not Role.ASSISTANT)
        spoken = (token for token in question.ids if vocabulary.kind(token) is Kind.SPEECH)
        recognize = recognition(self.models, vocabulary.speech_codes(spoken))
        return Reply(done.text, audio, rates.SPEAK_SAMPLE_RATE, done.tokens, done.reason, done.timings, recognize)

    def events(self, *, text_only: bool = False) -> Iterator[Event]:
        """Yields the events of `reply` in code without an event loop; a thread produces them.

        The thread has ended when the iteration ends. An iteration that is left early cancels the reply.
        """
        events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
        loop = asyncio.new_event_loop()

        async def produce() -> None:
            async with aclosing(self.reply(text_only=text_only)) as reply:
                async for event in reply:
                    events.put(event)

        producing = loop.create_task(produce())

        def work() -> None:
            try:
                with asyncio.Runner(loop_factory=lambda: loop) as runner:
                    runner.get_loop().run_until_complete(producing)
                events.put(None)
            except BaseException as error:
                events.put(error)

        # A thread that runs while the interpreter shuts down can abort it.
        thread = threading.Thread(target=work, name="reply")
        thread.start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the reply is complete
                loop.call_soon_threadsafe(producing.cancel)
            thread.join()

    def interrupt(self, played_ms: float) -> None:
        """Interrupts the reply; the history keeps the heard part. Thread-safe, also after the reply is complete.

        Args:
            played_ms: milliseconds of the reply's audio that were played.
        """
        check_type("played_ms", played_ms, int, float)
        if played_ms < 0:
            raise ValueError(f"played_ms must not be negative, got {played_ms}")
        num_samples = int(played_ms * rates.SPEAK_SAMPLE_RATE / 1000)
        turns = self._conversation.turns
        if (mouth := self._mouth) is not None:
            mouth.interrupt(num_samples)
        elif turns and turns[-1].role is Role.ASSISTANT:
            heard = heard_part(turns[-1], num_samples, self.models.vocabulary, finished=True)
            self._replace((*turns[:-1], heard.turn))
            self.ear.context_changed()

    def save(self, path: str | Path) -> None:
        """Writes the conversation as versioned JSON of token ids, see `turns.Conversation`."""
        self._conversation.save(path)

    @classmethod
    def load(cls, models: Models, worker: Worker, path: str | Path) -> Session:
        """Continues a saved conversation. Raises ValueError for another vocabulary."""
        return cls(models, worker, Conversation.load(path))

    def _context(self) -> Conversation | None:
        return None if self._mouth is not None else self._conversation

    def _dismiss(self, mouth: Mouth) -> None:
        if self._mouth is mouth:
            self._mouth = None
            self.ear.context_changed()

    async def _question(self) -> tuple[Turn, float | None]:
        """Returns the turn to answer, and the seconds of its tokenization; None if it was committed before."""
        turns = self._conversation.turns
        is_open = self.ear.is_open or bool(self._written)
        if turns and turns[-1].role in (Role.USER, Role.OBSERVATION) and not is_open:
            return turns[-1], None
        return await self._commit()

    async def _commit(self) -> tuple[Turn, float]:
        """Returns the user's turn and the seconds of its tokenization."""
        written, self._written = self._written, ""
        ended = self.ear.finish()

        async def finish() -> tuple[Turn, float]:
            spoken = await ended
            return self._add_turn(spoken.codes, written), spoken.seconds

        # The turn is kept even if the reply is cancelled.
        return await asyncio.shield(asyncio.create_task(finish()))

    def _add_turn(self, codes: tuple[int, ...], written: str) -> Turn:
        vocabulary = self.models.vocabulary
        ids = [*vocabulary.speech_ids(codes), *vocabulary.encode_text(written)]
        if not ids:
            raise ValueError("nothing was said: feed speech or write text before asking for a reply")
        turn = turn_of(Role.USER, ids, vocabulary, self.language)
        self._conversation = self._conversation.plus(turn)
        return turn

    def _add_reply(self, reply: Turn, question: Turn) -> None:
        """Inserts a reply after its question; the next user turn may already exist."""
        turns = self._conversation.turns
        reply = dataclasses.replace(reply, language=question.language, voice=self.voice)
        place = max((i + 1 for i, turn in enumerate(turns) if turn is question), default=len(turns))
        self._replace((*turns[:place], reply, *turns[place:]))

    def _replace(self, turns: Iterable[Turn]) -> None:
        self._conversation = dataclasses.replace(self._conversation, turns=tuple(turns))
