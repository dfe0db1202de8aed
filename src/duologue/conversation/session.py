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
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from duologue import rates
from duologue.audio import check_wav
from duologue.conversation.answer import Reply
from duologue.conversation.block_policy import BlockPolicy
from duologue.conversation.ear import MAX_BEHIND_S, Ahead, Listening
from duologue.conversation.events import AudioDelta, EndReason, Event, Interrupted, ReplyDone
from duologue.conversation.history import HeardPart, heard_part, open_prompt, reply_prompt, turn_of
from duologue.conversation.mouth import Speaker
from duologue.conversation.worker import Worker
from duologue.interleave import INTERLEAVED, TEXT_ONLY
from duologue.language.sampling import Sampling
from duologue.models import Models
from duologue.pcm import Pcm
from duologue.turns import Conversation, Modality, Role, Turn


class Session:
    """One conversation: what was said, as ids, and the state of listening.

    `feed` and `hear` may be called at any time, also while a reply is being produced: what is said then belongs to the
    next turn. What is heavy is done by the worker and the engine, in threads of their own.

    Args:
        policy: makes the block policy of a reply.

    Attributes:
        conversation: may be replaced between replies.
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
        policy: Callable[[], BlockPolicy] = BlockPolicy,
    ) -> None:
        card, vocabulary = models.card, models.vocabulary.hash
        if voice and voice not in card.voices:
            raise ValueError(f"{card.name} has no voice {voice!r}; it has {', '.join(card.voices)}")
        self.conversation = conversation or Conversation(vocabulary=vocabulary)
        if self.conversation.vocabulary != vocabulary:
            raise ValueError(
                f"the conversation was held in another vocabulary than that of {card.name}; its ids mean nothing"
            )
        self.models, self.worker, self.policy = models, worker, policy
        self.language, self.voice = language, voice
        self.sampling = sampling or card.sampling
        self.num_samples_fed = 0
        self._listening: Listening | None = None
        self._ahead: Ahead | None = None
        self._written = ""
        self._speaker: Speaker | None = None
        self._cut_at: int | None = None

    def feed(self, pcm: Pcm, sample_rate: int = rates.LISTEN_SAMPLE_RATE) -> None:
        """Hears more of the user: float32 (S,) in [-1, 1], int16 (S,), or the bytes of little-endian int16.

        Returns at once; the worker makes tokens of what is complete.

        Raises:
            ValueError: unusable samples, or a rate that changes in the middle of a turn.
        """
        self._feed(check_wav(pcm, sample_rate, "the pcm that was fed"), sample_rate)

    async def hear(self, pcm: Pcm, sample_rate: int = rates.LISTEN_SAMPLE_RATE) -> None:
        """Hears more of the user as `feed` does, and listens ahead: what is settled is prefilled in the background.

        Waits only when the tokenizer has fallen far behind. Raises ValueError as `feed`.
        """
        wav = check_wav(pcm, sample_rate, "the pcm that was heard")
        for start in range(0, len(wav), sample_rate):  # by the second, so that nobody waits for a long piece
            if start:
                await asyncio.sleep(0)
            listening, ahead = self._feed(wav[start : start + sample_rate], sample_rate)
            ahead.start()
            while listening.seconds_behind > MAX_BEHIND_S and (step := listening.step) is not None:
                await asyncio.wait([asyncio.wrap_future(step)])

    def _feed(self, wav: NDArray[np.float32], sample_rate: int) -> tuple[Listening, Ahead]:
        if self._listening is None or self._ahead is None:
            self._ahead = Ahead(self.models.engine, self._open_prompt)
            self._listening = Listening(self.models.tokenizer, self.worker, sample_rate, self._ahead.notify)
        self._listening.feed(wav, sample_rate)
        self.num_samples_fed += len(wav)
        return self._listening, self._ahead

    def write(self, text: str) -> None:
        """Takes more of the user's turn in writing."""
        self._written += text

    def discard(self) -> None:
        """Forgets what was said and written since the last turn."""
        listening, _ = self._close_turn()
        if listening is not None:
            listening.drop()

    async def commit(self) -> Turn:
        """Ends the user's turn without a reply and returns it.

        Raises:
            ValueError: nothing was said.
            WorkerFull: the device has too much to do; what was said is lost.
        """
        turn, _ = await self._commit()
        return turn

    def end_user_turn(self) -> Turn:
        """`commit` for code without an event loop."""
        listening, written = self._close_turn()
        return self._add_turn([] if listening is None else listening.end().result(), written)

    async def reply(self, *, text_only: bool = False, max_tokens: int | None = None) -> AsyncIterator[Event]:
        """Ends the user's turn, if something was said since the last one, and answers it; `ReplyDone` comes last.

        Args:
            max_tokens: ids of this reply at most, below the sampling's own bound.
        Raises:
            ValueError: nothing was said, a reply is under way, or the turn is longer than the model can hold.
        """
        if self._speaker is not None:
            raise ValueError("a reply is under way in this session; interrupt it first")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        schedule, modality = (TEXT_ONLY, Modality.TEXT) if text_only else (INTERLEAVED, Modality.INTERLEAVED)
        speaker = Speaker(self.models, self.worker, schedule, self.policy())
        self._speaker, self._cut_at = speaker, None
        try:
            async with aclosing(self._reply(speaker, modality, max_tokens)) as events:
                async for event in events:
                    yield event
        finally:
            self._dismiss(speaker)

    async def _reply(self, speaker: Speaker, modality: Modality, max_tokens: int | None) -> AsyncGenerator[Event, None]:
        question, is_new = await self._question(speaker)
        try:
            prompt, room = self.prompt(modality)
        except ValueError:
            if is_new:
                turns = tuple(turn for turn in self.conversation.turns if turn is not question)
                self.conversation = dataclasses.replace(self.conversation, turns=turns)
            raise
        sampling = dataclasses.replace(self.sampling, max_tokens=min(room, max_tokens or room))
        async with aclosing(speaker.events(prompt, sampling, f"reply-{next(self._request_ids)}")) as events:
            async for event in events:
                yield event
        text, codes, reason, cut_at = speaker.text, speaker.codes, speaker.reason, self._cut_at
        self._add_reply(Turn(Role.ASSISTANT, modality, tuple(speaker.ids), question.language, self.voice), question)
        is_estimate = cut_at is not None and modality is not Modality.TEXT
        if cut_at is not None:
            heard = self.cut_last_reply(cut_at, unfinished=reason is not EndReason.END)
            codes, text = codes[: heard.num_speech], heard.text(text)
            reason = EndReason.INTERRUPTED
        self._dismiss(speaker)  # the reply is over, whenever its last events are read
        if cut_at is not None:
            yield Interrupted(cut_at, len(codes), text, is_estimate)
        yield ReplyDone(text, tuple(codes), reason, speaker.timings, is_estimate)

    def _dismiss(self, speaker: Speaker) -> None:
        if self._speaker is speaker:
            self._speaker = None
            self._notify_ahead()

    async def _question(self, speaker: Speaker) -> tuple[Turn, bool]:
        """The turn that is answered, and whether it was ended just now."""
        turns = self.conversation.turns
        is_open = self._listening is not None or bool(self._written)
        if turns and turns[-1].role in (Role.USER, Role.OBSERVATION) and not is_open:
            return turns[-1], False
        question, seconds = await self._commit()
        speaker.took_question(seconds)
        return question, True

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
        """The user speaks into the reply: it ends, and the history keeps what was heard. From any thread, at any time.

        Args:
            played_ms: how much of the reply's sound had been played. The reply may be under way or just done.
        """
        if played_ms < 0:
            raise ValueError(f"played_ms must not be negative, got {played_ms}")
        played = int(played_ms * rates.SPEAK_SAMPLE_RATE / 1000)
        if (speaker := self._speaker) is not None:
            self._cut_at = played
            speaker.stop()
        elif self.conversation.turns and self.conversation.turns[-1].role is Role.ASSISTANT:
            self.cut_last_reply(played)
            self._notify_ahead()

    def cut_last_reply(self, num_samples_played: int, unfinished: bool = False) -> HeardPart:
        """Shortens the last reply to what was heard.

        Args:
            unfinished: the reply was not complete, so that it counts as interrupted even when all of it was heard.
        """
        turns = self.conversation.turns
        place = max(i for i, turn in enumerate(turns) if turn.role is Role.ASSISTANT)
        heard = heard_part(turns[place], num_samples_played, self.models.vocabulary, finished=not unfinished)
        self.conversation = dataclasses.replace(
            self.conversation, turns=(*turns[:place], heard.turn, *turns[place + 1 :])
        )
        return heard

    def save(self, path: str | Path) -> None:
        """Writes the conversation as versioned JSON of token ids; see `turns.Conversation`."""
        self.conversation.save(path)

    @classmethod
    def load(cls, models: Models, worker: Worker, path: str | Path) -> Session:
        """Goes on with a saved conversation. Raises ValueError when it was held in another vocabulary."""
        return cls(models, worker, Conversation.load(path))

    def prompt(self, reply: Modality) -> tuple[list[int], int]:
        """The prompt's ids, without the oldest turns where they do not fit, and the room for the reply.

        Raises:
            ValueError: the last turn alone does not fit.
        """
        prompt, sampling = reply_prompt(self.models, self.conversation, reply, self.sampling)
        return prompt, sampling.max_tokens

    def _open_prompt(self) -> list[int] | None:
        """What is certain of the next prompt while the user speaks; None while it depends on a reply under way."""
        if self._listening is None or self._speaker is not None:
            return None
        return open_prompt(self.models, self.conversation, self._listening.codes)

    def _notify_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.notify()

    def _close_turn(self) -> tuple[Listening | None, str]:
        """Takes what was said and written since the last turn; what comes from now on belongs to the next one."""
        if self._ahead is not None:
            self._ahead.stop()
        listening, written = self._listening, self._written
        self._listening, self._ahead, self._written = None, None, ""
        return listening, written

    async def _commit(self) -> tuple[Turn, float]:
        """The user's turn and the seconds of work that its end took."""
        listening, written = self._close_turn()
        if listening is None:
            return self._add_turn([], written), 0.0
        ended = asyncio.wrap_future(listening.end())

        async def finish() -> Turn:
            return self._add_turn(await ended, written)

        # What was said stays said, also when nobody waits for the reply any more.
        return await asyncio.shield(asyncio.create_task(finish())), listening.seconds

    def _add_turn(self, codes: list[int], written: str) -> Turn:
        vocabulary = self.models.vocabulary
        spoken, text = vocabulary.speech_ids(codes), vocabulary.encode_text(written)
        if not spoken and not text:
            raise ValueError("nothing was said: feed speech or write text before asking for a reply")
        turn = turn_of(Role.USER, [*spoken, *text], vocabulary, self.language)
        self.conversation = self.conversation.plus(turn)
        return turn

    def _add_reply(self, reply: Turn, question: Turn) -> None:
        """Behind its question: the user may have ended the next turn meanwhile."""
        turns = self.conversation.turns
        place = max((i + 1 for i, turn in enumerate(turns) if turn is question), default=len(turns))
        self.conversation = dataclasses.replace(self.conversation, turns=(*turns[:place], reply, *turns[place:]))
