"""Reading aloud: the given text, in the runs of a reply, whatever the model would have said."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

import pytest

from duologue.conversation.chatbot import Chatbot, load
from duologue.interleave import INTERLEAVED, SPEECH_ONLY, TEXT_ONLY, Kind, Schedule, split
from duologue.language.reading import ReadingEngine
from duologue.language.sampling import Sampling
from duologue.vocabulary import Vocabulary
from tests.tiny import write_tiny_chatbot

LONG = "The capital of France is Paris. Seven plus five is twelve. Hello, how are you? What is seven plus five?"


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> Chatbot:
    return load(write_tiny_chatbot(tmp_path_factory.mktemp("tiny")))


@dataclass
class ScriptedEngine:
    """Says speech code 0 until, at the given calls, it ends early."""

    vocabulary: Vocabulary
    ends_after: dict[int, int] = field(default_factory=dict)
    prompts: list[list[int]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    max_positions: int = 1000
    max_sessions: int = 4
    cached_tokens: int = 0
    running: int = 0

    async def warm(self, prompt_ids: Sequence[int]) -> None: ...

    def cached_prefix(self, prompt_ids: Sequence[int]) -> int:
        return 0

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        schedule: Schedule = INTERLEAVED,
        request_id: str | None = None,
    ) -> AsyncIterator[int]:
        assert schedule == SPEECH_ONLY
        self.prompts.append(list(prompt_ids))
        end = self.ends_after.get(len(self.prompts), sampling.max_tokens)
        for index in range(sampling.max_tokens):
            if request_id in self.cancelled:
                return
            yield self.vocabulary.speech_id(0) if index < end else self.vocabulary.end_id
            if index == end:
                return


def read(engine: ReadingEngine, sampling: Sampling, prompt: Sequence[int] = (1,)) -> list[int]:
    async def work() -> list[int]:
        return [token async for token in engine.generate(prompt, sampling, INTERLEAVED, "one")]

    return asyncio.run(work())


def test_a_reply_holds_the_given_text_in_the_runs_of_a_reply(bot: Chatbot) -> None:
    vocabulary = bot.models.vocabulary
    text = vocabulary.encode_text(LONG)
    assert len(text) > 2 * INTERLEAVED.text_run
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=400)
    ids = read(ReadingEngine(bot.models.engine, vocabulary, tuple(text)), sampling, [vocabulary.end_id])
    parts = split(ids, vocabulary.kind)  # raises where a kind stands in a wrong place
    assert vocabulary.decode_text(parts.text) == LONG
    assert len(parts.speech) >= INTERLEAVED.min_speech(len(text))


def test_the_models_prompt_grows_by_what_was_read(bot: Chatbot) -> None:
    vocabulary = bot.models.vocabulary
    text = vocabulary.encode_text(LONG)
    engine = ScriptedEngine(vocabulary)
    ids = read(ReadingEngine(engine, vocabulary, tuple(text)), Sampling(max_tokens=300), [5, 6])
    assert len(ids) == 300
    for prompt in engine.prompts:
        assert prompt == [5, 6, *ids[: len(prompt) - 2]]
    assert len(engine.prompts) == -(-len(text) // INTERLEAVED.text_run)


def test_an_end_before_the_text_is_over_is_not_taken(bot: Chatbot) -> None:
    vocabulary = bot.models.vocabulary
    text = vocabulary.encode_text(LONG)
    engine = ScriptedEngine(vocabulary, ends_after={1: 5, 2: 3})
    ids = read(ReadingEngine(engine, vocabulary, tuple(text)), Sampling(max_tokens=300))
    first = split(ids, vocabulary.kind).runs[1]
    assert (first.kind, first.stop - first.start) == (Kind.SPEECH, INTERLEAVED.speech_run)
    assert vocabulary.end_id not in ids
    with pytest.raises(RuntimeError, match="before the end of the text"):
        read(ReadingEngine(ScriptedEngine(vocabulary, dict.fromkeys(range(200), 0)), vocabulary, tuple(text)), SAMPLING)


SAMPLING = Sampling(max_tokens=300)


def test_the_end_behind_the_text_ends_the_reply(bot: Chatbot) -> None:
    vocabulary = bot.models.vocabulary
    engine = ScriptedEngine(vocabulary, ends_after={1: 4})
    ids = read(ReadingEngine(engine, vocabulary, tuple(vocabulary.encode_text("Hi"))), SAMPLING)
    assert ids[-1] == vocabulary.end_id
    assert len(split(ids, vocabulary.kind).speech) == 4


def test_cancelling_ends_the_stream_and_no_part_begins_again(bot: Chatbot) -> None:
    vocabulary = bot.models.vocabulary
    inner = ScriptedEngine(vocabulary)
    engine = ReadingEngine(inner, vocabulary, tuple(vocabulary.encode_text(LONG)))

    async def work() -> int:
        count = 0
        async for token in engine.generate([1], SAMPLING, INTERLEAVED, "one"):
            count += vocabulary.kind(token) is Kind.SPEECH
            if count == 3:
                engine.cancel("one")
        return count

    assert asyncio.run(work()) == 3
    assert len(inner.prompts) == 1
    assert not engine._running


def test_what_cannot_be_read_is_refused(bot: Chatbot) -> None:
    vocabulary = bot.models.vocabulary
    engine = ReadingEngine(ScriptedEngine(vocabulary), vocabulary, tuple(vocabulary.encode_text(LONG)))

    async def work(sampling: Sampling, schedule: Schedule) -> None:
        async for _ in engine.generate([1], sampling, schedule):
            pass

    with pytest.raises(ValueError, match="needs a reply of text and speech"):
        asyncio.run(work(SAMPLING, TEXT_ONLY))
    with pytest.raises(ValueError, match="do not fit a reply of 20 ids"):
        asyncio.run(work(replace(SAMPLING, max_tokens=20), INTERLEAVED))


def test_a_session_says_the_text(bot: Chatbot) -> None:
    """The reading engine stands where the model's own engine stands: the session turns its reply into sound."""
    models = bot.models
    engine = ReadingEngine(models.engine, models.vocabulary, tuple(models.vocabulary.encode_text("Hello.")))
    session = type(bot.session())(replace(models, engine=engine), bot.worker)
    session.write("say Hello.")
    reply = session.reply_now()
    assert reply.text == "Hello."
    assert reply.audio.size > 0
