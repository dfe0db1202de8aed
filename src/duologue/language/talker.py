"""A text model answers and a talker reads its text aloud while it is being written (Qwen2.5-Omni, arXiv:2503.20215).

    prompt ids -> messages -> text model -> text -> talker -> speech ids
                                              |                  |
                                              +--- interleave ---+--> reply ids

`TalkerEngine` is an engine: sessions cannot tell its replies from those of a spoken language model. It takes the
user's words from the recognizer of the speech tokens.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

import regex

from duologue.interleave import INTERLEAVED, SPEECH_ONLY, InterleaveState, Kind, Schedule
from duologue.language.engine import Engine
from duologue.language.messages import chat_messages, read_turns
from duologue.language.reading import MAX_CHUNK_IDS, max_ids, prepare_reading
from duologue.language.sampling import Sampling
from duologue.language.text_models import ChatMessage, TextModel, TextModelError
from duologue.language.tools import ToolUse
from duologue.spoken_text import chunks, speakable, write_out_numbers
from duologue.text import heard_text
from duologue.turns import Modality, Turn
from duologue.vocabulary import Task, Vocabulary

INSTRUCTIONS = "You are in a spoken conversation. Answer briefly, in one to three plain sentences, without lists."
TOOL_INSTRUCTIONS = "Before you call a function, say in a few words what you do."
NOT_HEARD = "Sorry, I did not hear you."
MAX_POSITIONS = 65536  # ids of a prompt; the text model limits it further
MAX_REMEMBERED = 1024  # replies and transcripts
MAX_UNREAD = 64  # speech ids that the talker generates ahead of its reader
_SENTENCE_ENDS = regex.compile(r"[.!?;:…][\"'”’)\]]*\s|[。！？；：]|\n")
_CLAUSE_ENDS = regex.compile(r",\s|[，、]|\s[-–—]\s")
_WORD_ENDS = regex.compile(r"\s|(?<=\p{Han})")
_LOOSE_MARKS = regex.compile(r"[*_`#~]+")


class Talker(Protocol):
    """Turns a piece of text into speech."""

    def speak(self, text: str, sampling: Sampling, request_id: str) -> AsyncGenerator[int, None]:
        """Yields the speech ids of a text of at most `MAX_CHUNK_IDS` text ids. Closing it ends the work."""
        ...


@dataclass(frozen=True, eq=False)
class ReadingTalker:
    """A spoken chat model as talker: it answers "say ..." with the given text, see `reading.py`."""

    engine: Engine
    vocabulary: Vocabulary

    async def speak(self, text: str, sampling: Sampling, request_id: str) -> AsyncGenerator[int, None]:
        reading, prompt, sampling = prepare_reading(self.engine, self.vocabulary, text, sampling)
        stream = reading.generate(prompt, sampling, INTERLEAVED, request_id)
        async with aclosing(_speech(stream, self.vocabulary)) as speech:
            async for token in speech:
                yield token


@dataclass(frozen=True, eq=False)
class TextToTokenTalker:
    """A text-to-token model as talker (arXiv:2411.17607): the task READ alone, from `duologue train text-to-token`."""

    engine: Engine
    vocabulary: Vocabulary

    async def speak(self, text: str, sampling: Sampling, request_id: str) -> AsyncGenerator[int, None]:
        ids = self.vocabulary.encode_text(text)
        prompt = self.vocabulary.task_prompt(Task.READ, ids)
        sampling = dataclasses.replace(sampling, max_tokens=max_ids(len(ids)) - len(ids))
        stream = self.engine.generate(prompt, sampling, SPEECH_ONLY, request_id)
        async with aclosing(_speech(stream, self.vocabulary)) as speech:
            async for token in speech:
                yield token


async def _speech(stream: AsyncIterator[int], vocabulary: Vocabulary) -> AsyncGenerator[int, None]:
    try:
        async for token in stream:
            if vocabulary.kind(token) is Kind.SPEECH:
                yield token
    finally:
        await stream.aclose()  # type: ignore[attr-defined]


@dataclass(eq=False)
class WrittenText:
    """The text of an answer while it is being written; the talker takes it in pieces.

    Args:
        vocabulary: counts text ids.
        first: ids after which the first piece is taken.
        limit: maximum ids of a piece.
    """

    vocabulary: Vocabulary
    first: int = INTERLEAVED.text_run
    limit: int = MAX_CHUNK_IDS
    text: str = ""
    is_over: bool = False
    _taken: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, piece: str) -> None:
        self.text += piece
        self._changed.set()

    def end(self) -> None:
        self.is_over = True
        self._changed.set()

    async def take(self) -> str:
        """Returns the next piece to speak, as soon as it is long enough; "" at the end."""
        while True:
            self._changed.clear()
            if piece := self._piece():
                return piece
            if self.is_over:
                return ""
            await self._changed.wait()

    def _piece(self) -> str:
        """Returns a piece that ends with a sentence, else with a clause, else with a word."""
        rest = self.text[self._taken :]
        if not rest.strip():
            return ""
        if self.is_over and self._count(rest) <= self.limit:
            self._taken = len(self.text)
            return rest
        # A whole sentence is spoken at once, however short; longer ones in pieces.
        for ends, least in ((_SENTENCE_ENDS, 1), (_CLAUSE_ENDS, self.first), (_WORD_ENDS, self.first)):
            places = [match.end() for match in ends.finditer(rest)]
            counts = [(place, self._count(rest[:place])) for place in places]
            fitting = [place for place, count in counts if least <= count <= self.limit]
            if fitting:
                self._taken += fitting[-1]
                return rest[: fitting[-1]]
        if self._count(rest) <= self.limit:
            return ""
        piece = chunks(rest, self._count, self.limit)[0]  # one long word
        self._taken += rest.index(piece) + len(piece)
        return piece

    def _count(self, text: str) -> int:
        return len(self.vocabulary.encode_text(text.strip()))


@dataclass(eq=False)
class SaidReply:
    """The ids of a reply, and whether it was produced to its end.

    Attributes:
        context: hash of the turns that it answers; equal in one session only, but for sessions that are equal so far.
        question: the last of these turns.
    """

    context: int
    question: Turn | None
    ids: list[int] = field(default_factory=list)
    finished: bool = False


@dataclass(eq=False)
class _Memory:
    """Replies, the newest last, and transcripts by speech codes."""

    replies: OrderedDict[int, SaidReply] = field(default_factory=OrderedDict)
    transcripts: OrderedDict[tuple[int, ...], str] = field(default_factory=OrderedDict)


@dataclass(frozen=True, eq=False)
class TalkerEngine:
    """An engine whose text comes from a text model and whose speech comes from a talker.

    Attributes:
        engine: of the talker; it also counts the cached ids.
        recognize: returns the text of the speech codes of a turn.
        tools: of the next replies, see `with_tools`.
    """

    engine: Engine
    talker: Talker
    vocabulary: Vocabulary
    text_model: TextModel
    recognize: Callable[[Sequence[int]], Awaitable[str]]
    english: bool = True
    tools: ToolUse | None = None
    _running: dict[str, _Reply] = field(default_factory=dict)
    _memory: _Memory = field(default_factory=_Memory)

    @property
    def max_positions(self) -> int:
        return MAX_POSITIONS

    @property
    def cached_tokens(self) -> int:
        return self.engine.cached_tokens

    @property
    def running(self) -> int:
        return len(self._running)

    def cached_prefix(self, prompt_ids: Sequence[int]) -> int:
        return 0

    async def warm(self, prompt_ids: Sequence[int]) -> None:
        """Does nothing: the text model sees whole messages only."""

    def cancel(self, request_id: str) -> None:
        if (reply := self._running.get(request_id)) is not None:
            reply.cancel()
        else:
            self.engine.cancel(request_id)

    def with_tools(self, tools: ToolUse) -> TalkerEngine:
        """Returns this engine for one reply with these tools; calls are added to `tools.calls`."""
        return dataclasses.replace(self, tools=tools)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        schedule: Schedule = INTERLEAVED,
        request_id: str | None = None,
    ) -> AsyncIterator[int]:
        """Yields a reply as `Engine.generate`. A reply of calls alone has no ids.

        Raises:
            ValueError: a prompt without turns, or a request that is running.
            TextModelError: the text model failed or wrote nothing.
        """
        if not schedule.text_run:  # speech alone is work of the talker's engine
            own = self.engine.generate(prompt_ids, sampling, schedule, request_id)
            try:
                async for token in own:
                    yield token
            finally:
                await own.aclose()  # type: ignore[attr-defined]
            return
        asked = tuple(read_turns(prompt_ids, self.vocabulary))
        said = SaidReply(hash(asked), asked[-1] if asked else None)
        reply = _Reply(self, sampling, schedule, request_id or f"talker-{id(said)}")
        if reply.request_id in self._running:
            raise ValueError(f"the request {reply.request_id!r} is running")
        self._running[reply.request_id] = reply
        memory = self._memory.replies
        memory[id(said)] = said
        while len(memory) > MAX_REMEMBERED:
            memory.popitem(last=False)
        try:
            async for token in reply.ids(asked):
                if self.vocabulary.kind(token) is Kind.END:
                    said.finished = True
                else:
                    said.ids.append(token)
                yield token
        finally:
            self._running.pop(reply.request_id, None)
            await reply.close()

    async def messages(self, turns: Sequence[Turn]) -> tuple[list[ChatMessage], bool]:
        """Returns the messages of a conversation: what was heard of the user, and what the user heard. The second value
        is false if the last turn is speech without words.

        Raises:
            ValueError: there is no turn.
        """
        if not turns:
            raise ValueError("the prompt holds no turn to answer")
        messages = await chat_messages(turns, self.vocabulary, self._transcript, self._heard)
        was_heard = turns[-1].modality is Modality.TEXT or bool(messages and messages[-1]["role"] == "user")
        if not messages or messages[0]["role"] != "system":
            texts = [INSTRUCTIONS, *([TOOL_INSTRUCTIONS] if self.tools and self.tools.definitions else [])]
            messages.insert(0, {"role": "system", "content": " ".join(texts)})
        return messages, was_heard

    async def _transcript(self, codes: tuple[int, ...]) -> str:
        known = self._memory.transcripts
        if codes not in known:
            known[codes] = await self.recognize(codes)
            while len(known) > MAX_REMEMBERED:
                known.popitem(last=False)
        return known[codes]

    def _heard(self, before: Sequence[Turn], ids: tuple[int, ...]) -> str:
        """Returns the text of a reply's ids. Of a truncated reply it is the share of its speech, as
        `history.heard_part` estimates it.

        Another session may have got a reply that begins with the same ids. The turns before tell them apart, or the
        last of them if earlier ones were dropped.
        """
        if not ids:
            return ""
        known = [one for one in reversed(self._memory.replies.values()) if tuple(one.ids[: len(ids)]) == ids]
        context = hash(tuple(before))
        same = [one for one in known if one.context == context]
        same = same or [one for one in known if before and one.question == before[-1]]
        said = same[0] if same else None
        whole = list(ids) if said is None else said.ids
        kinds = [self.vocabulary.kind(token) for token in whole]
        text_ids = [token for token, kind in zip(whole, kinds, strict=True) if kind is Kind.TEXT]
        text = self.vocabulary.decode_text(text_ids).strip()
        if said is None or len(said.ids) == len(ids):
            return text
        num_speech = kinds.count(Kind.SPEECH)
        if not said.finished:
            num_speech = max(num_speech, len(text_ids) * INTERLEAVED.speech_run // INTERLEAVED.text_run)
        return heard_text(text, kinds[: len(ids)].count(Kind.SPEECH) / max(num_speech, 1))


class _Reply:
    """One reply: a task writes the text, a task speaks it, and `ids` interleaves both."""

    def __init__(self, engine: TalkerEngine, sampling: Sampling, schedule: Schedule, request_id: str) -> None:
        self.request_id = request_id
        self._engine, self._sampling, self._schedule = engine, sampling, schedule
        self._text: asyncio.Queue[int | BaseException | None] = asyncio.Queue()
        self._speech: asyncio.Queue[int | BaseException | None] = asyncio.Queue(MAX_UNREAD)
        self._written = WrittenText(engine.vocabulary)
        self._tasks: list[asyncio.Task[None]] = []
        self._cancelled = asyncio.Event()

    def cancel(self) -> None:
        self._cancelled.set()
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def ids(self, turns: Sequence[Turn]) -> AsyncGenerator[int, None]:
        """Yields the ids of the reply to these turns in the order of the schedule."""
        engine, has_speech = self._engine, self._schedule.speech_run > 0
        messages, was_heard = await engine.messages(turns)
        self._start(self._write(messages) if was_heard else self._say_not_heard(), self._text)
        if has_speech:
            self._start(self._speak(), self._speech)
        state, room = InterleaveState(self._schedule), self._sampling.max_tokens
        is_written, last_sound = False, 0
        while not self._cancelled.is_set():
            token: int | None = None
            if state.allowed.text and not is_written:
                if room > self._needed(state):
                    token = await self._next(self._text)
                    is_written = token is None
                elif state.run_length == 0 or not has_speech:
                    return
            if token is None and has_speech:
                if room <= 1:
                    return
                token = await self._next(self._speech)
                # Rare: the text is ahead of all speech, and the schedule wants more; the last sound goes on.
                if token is None and last_sound and (self._text.qsize() > 1 or not state.allowed.end):
                    token = last_sound
            if token is None:
                break
            kind = engine.vocabulary.kind(token)
            state.advance(kind)
            last_sound = token if kind is Kind.SPEECH else last_sound
            room -= 1
            yield token
        if not is_written:
            await self._next(self._text)  # raises the error of the text model
        if self._cancelled.is_set():
            return
        if not state.num_text and not (engine.tools and engine.tools.calls):
            raise TextModelError(f"the text model {engine.text_model.name} wrote nothing")
        if state.allowed.end and state.num_text:
            yield engine.vocabulary.end_id

    def _needed(self, state: InterleaveState) -> int:
        """Returns the ids that must remain after a text id: a later text run begins only if its speech has room."""
        if not self._schedule.speech_run:
            return 0
        is_new = state.num_text > 0 and state.run_length == 0
        return self._schedule.text_run + self._schedule.speech_run if is_new else 2

    async def _next(self, queue: asyncio.Queue[int | BaseException | None]) -> int | None:
        """Returns the next id; None at the end and after a cancellation. Raises the error of the writing task."""
        getting, cancelled = asyncio.ensure_future(queue.get()), asyncio.ensure_future(self._cancelled.wait())
        try:
            await asyncio.wait((getting, cancelled), return_when=asyncio.FIRST_COMPLETED)
            if self._cancelled.is_set():
                return None
            item = getting.result()
        finally:
            getting.cancel()
            cancelled.cancel()
        if isinstance(item, BaseException):
            raise item
        if item is None:
            queue.put_nowait(None)  # the end can be read again
        return item

    def _start(self, work: Coroutine[Any, Any, None], queue: asyncio.Queue[int | BaseException | None]) -> None:
        async def run() -> None:
            try:
                await work
            except Exception as error:
                self._written.end()
                await queue.put(error)
            else:
                await queue.put(None)

        self._tasks.append(asyncio.create_task(run()))

    async def _write(self, messages: list[ChatMessage]) -> None:
        engine = self._engine
        stream = engine.text_model.stream(messages, engine.tools, self._sampling.max_tokens)
        unsent = ""
        async with aclosing(stream) as pieces:
            async for piece in pieces:
                if not isinstance(piece, str):
                    if engine.tools is not None:
                        engine.tools.calls.append(piece)
                    continue
                self._written.add(piece)
                # Ids are those of whole words, as if the text had been encoded at once.
                unsent += piece
                whole = max(unsent.rfind(" "), unsent.rfind("\n"))
                if whole > 0:
                    self._send(unsent[:whole])
                    unsent = unsent[whole:]
        self._send(unsent.rstrip())
        self._written.end()

    async def _say_not_heard(self) -> None:
        self._written.add(NOT_HEARD)
        self._send(NOT_HEARD)
        self._written.end()

    def _send(self, text: str) -> None:
        for token in self._engine.vocabulary.encode_text(text):
            self._text.put_nowait(token)

    async def _speak(self) -> None:
        engine, number = self._engine, 0
        while piece := await self._written.take():
            spoken = _LOOSE_MARKS.sub("", speakable(piece)).strip()
            if engine.english:
                spoken = write_out_numbers(spoken)
            for part in chunks(spoken, lambda text: len(engine.vocabulary.encode_text(text)), MAX_CHUNK_IDS):
                number += 1
                sampling = dataclasses.replace(self._sampling, seed=self._sampling.seed + number)
                async with aclosing(engine.talker.speak(part, sampling, f"{self.request_id}/{number}")) as speech:
                    async for token in speech:
                        await self._speech.put(token)
