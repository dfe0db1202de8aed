"""Many sessions at once: each hears, says and remembers what it would alone, whoever joins, leaves or interrupts."""

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import duologue
from duologue.conversation.chatbot import Chatbot
from duologue.conversation.ear import PromptPrefetcher
from duologue.conversation.events import AudioDelta, EndReason, Interrupted, ReplyDone, TextDelta
from duologue.conversation.history import reply_prompt
from duologue.conversation.session import Session
from duologue.conversation.worker import Worker
from duologue.interleave import legal_prefix
from duologue.language.engine import PlainEngine
from duologue.language.sampling import Sampling
from duologue.layers import Padded
from duologue.rates import SAMPLES_PER_TOKEN
from duologue.turns import Conversation, Modality, Role, Turn
from tests.tiny import write_tiny_chatbot

TOLERANCE = 1e-4
GIVE_UP_S = 300.0  # a busy machine is not a failing test


@dataclass(frozen=True)
class Script:
    """What one user does: how long the two questions are, in how large pieces they come, and when he interrupts."""

    seed: int
    seconds: tuple[float, float]
    piece: int
    ahead: bool
    interrupt_after: int | None = None  # sounds of the first reply


SCRIPTS = [
    Script(0, (2.0, 0.7), 800, ahead=True),
    Script(1, (0.3, 3.1), 16000, ahead=False),
    Script(2, (1.3, 1.0), 1600, ahead=True, interrupt_after=2),
    Script(3, (2.6, 0.2), 320, ahead=True),
    Script(4, (1.7, 1.7), 5000, ahead=False),
]


@dataclass
class Result:
    """Of both turns."""

    heard: list[tuple[int, ...]] = field(default_factory=list)
    said: list[tuple[int, ...]] = field(default_factory=list)
    waves: list[np.ndarray] = field(default_factory=list)


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> Chatbot:
    made = duologue.load(write_tiny_chatbot(tmp_path_factory.mktemp("together"), max_tokens=150))
    made.worker = Worker(max_batch_s=math.inf)  # batches as large as can be, on a busy machine too
    tokenizer = made.models.tokenizer
    with torch.no_grad():  # random codes lie far from what is heard; these tell sounds apart
        heard = torch.from_numpy(speech(30.0, 99))[None]
        vectors = tokenizer.encode_piece(Padded.full(heard), tokenizer.encoder.init_state(1)).values[0]
        tokenizer.quantizer.codebook.weight.copy_(vectors[torch.randperm(len(vectors))[:32]])
    return made


def speech(seconds: float, seed: int) -> np.ndarray:
    """Tones that change every eighth of a second in pitch and level, with a little noise."""
    rng = np.random.default_rng(seed)
    size, parts = int(seconds * 16000), int(seconds * 8) + 1
    pitch, level = (np.repeat(rng.uniform(low, high, parts), 2000)[:size] for low, high in ((80, 4000), (0, 0.5)))
    wav = level * np.sin(2 * np.pi * np.cumsum(pitch) / 16000) + 0.01 * rng.standard_normal(size)
    return wav.astype(np.float32)


async def hear(session: Session, wav: np.ndarray, piece: int, ahead: bool) -> None:
    for start in range(0, len(wav), piece):
        if ahead:
            await session.hear(wav[start : start + piece])
        else:
            session.feed(wav[start : start + piece])
        await asyncio.sleep(0)


async def answer(session: Session, interrupt_after: int | None = None) -> tuple[list[np.ndarray], ReplyDone]:
    sounds = []
    async for event in session.reply():
        if isinstance(event, AudioDelta):
            sounds.append(event.wav)
            if len(sounds) == interrupt_after:
                session.interrupt(played_ms=600)
    assert isinstance(event, ReplyDone)
    return sounds, event


async def converse(bot: Chatbot, script: Script) -> Result:
    session = bot.session(sampling=Sampling(temperature=1.0, top_p=1.0, max_tokens=150, seed=script.seed))
    result = Result()
    for turn, seconds in enumerate(script.seconds):
        await hear(session, speech(seconds, 10 * script.seed + turn), script.piece, script.ahead)
        sounds, _ = await answer(session, script.interrupt_after if turn == 0 else None)
        result.waves.append(np.concatenate(sounds) if sounds else np.zeros(0, np.float32))
    result.heard = [turn.ids for turn in session.conversation.turns[::2]]
    result.said = [turn.ids for turn in session.conversation.turns[1::2]]
    return result


def test_sessions_at_once_equal_those_alone(bot: Chatbot) -> None:
    alone = [asyncio.run(converse(bot, script)) for script in SCRIPTS]
    before = bot.worker.stats().batch_sizes
    begun, go = threading.Event(), threading.Event()

    def hold_up() -> bool:  # so that steps wait together
        begun.set()
        return go.wait(GIVE_UP_S)

    async def together() -> list[Result]:
        bot.worker.submit(hold_up)
        assert begun.wait(GIVE_UP_S)
        talks = [asyncio.create_task(converse(bot, script)) for script in SCRIPTS]
        await settled(lambda: bot.worker.stats().num_waiting == len(SCRIPTS))
        go.set()
        return await asyncio.gather(*talks)

    for script, one, many in zip(SCRIPTS, alone, asyncio.run(together()), strict=True):
        assert many.heard == one.heard
        assert many.said == one.said
        for a, b in zip(one.waves, many.waves, strict=True):
            # How much was decoded before an interruption is a matter of time.
            size = min(len(a), len(b)) if script.interrupt_after else len(a)
            assert script.interrupt_after or len(a) == len(b)
            np.testing.assert_allclose(b[:size], a[:size], atol=TOLERANCE, rtol=0)
    after = bot.worker.stats().batch_sizes
    assert sum(count - before.get(size, 0) for size, count in after.items() if size > 1) > 0


def test_interrupted_is_truncated(bot: Chatbot) -> None:
    """History and the next reply are those of a conversation that was cut at what was heard."""
    vocabulary = bot.models.vocabulary

    async def talk() -> None:
        whole, cut = bot.session(), bot.session()
        for session in (whole, cut):
            session.feed(speech(1.0, 5))
        sounds, done = await answer(whole)
        _, interrupted = await answer(cut, interrupt_after=1)
        assert sum(map(len, sounds)) > 0.6 * 22050
        full = whole.conversation.turns[-1]
        last = cut.conversation.turns[-1]
        heard = legal_prefix(map(vocabulary.kind, full.ids), 8)  # 600 ms are 7.5 tokens
        assert last.interrupted
        assert last.ids == full.ids[:heard]
        assert interrupted.reason is EndReason.INTERRUPTED
        assert interrupted.tokens == done.tokens[:8]
        assert interrupted.text_is_estimate
        assert not done.text_is_estimate
        assert done.text.startswith(interrupted.text)
        whole.interrupt(played_ms=600)  # the same when the reply is over
        assert whole.conversation == cut.conversation
        for session in (whole, cut):
            session.feed(speech(0.5, 6))
        (_, first), (_, second) = await answer(whole), await answer(cut)
        assert first.tokens == second.tokens

    asyncio.run(talk())


def test_an_interruption_ends_engine_and_worker_within_a_step(bot: Chatbot) -> None:
    async def talk() -> None:
        session = bot.session()
        session.feed(speech(1.0, 5))
        events = session.reply()
        async for event in events:
            if isinstance(event, AudioDelta):
                break
        session.interrupt(played_ms=100)
        await settled(lambda: bot.models.engine.running == 0)  # nobody reads the events
        assert bot.worker.stats().num_waiting == 0
        rest = [event async for event in events]
        assert [type(event) for event in rest[-2:]] == [Interrupted, ReplyDone]
        assert not any(isinstance(event, AudioDelta) for event in rest)

    asyncio.run(talk())


def test_a_reply_that_nobody_reads_to_its_end_leaves_nothing_behind(bot: Chatbot) -> None:
    async def talk() -> None:
        session = bot.session()
        session.feed(speech(1.0, 5))
        events = session.reply()
        await anext(events)
        await events.aclose()
        assert bot.models.engine.running == 0
        assert len(session.conversation) == 1
        _, done = await answer(session)  # the question is still open
        assert done.tokens
        assert len(session.conversation) == 2

    asyncio.run(talk())


def test_hear_is_feed(bot: Chatbot) -> None:
    async def talk() -> None:
        turns = []
        for ahead, piece in ((True, 333), (False, 333), (True, 40000), (False, 40000)):
            session = bot.session()
            await hear(session, speech(31.0, 7), piece, ahead)  # over the border of two pieces
            turns.append(await session.commit())
        assert len(turns[0].ids) == -(-31 * 16000 // SAMPLES_PER_TOKEN)
        assert len(set(turns[0].ids)) > 8
        assert turns[0] == turns[1] == turns[2] == turns[3]

    asyncio.run(talk())


async def settled(condition: Callable[[], bool]) -> None:
    """Until background work has come to rest."""
    deadline = time.monotonic() + GIVE_UP_S
    while not condition():
        assert time.monotonic() < deadline, "the background work did not come to rest"
        await asyncio.sleep(0.01)


async def computed(bot: Chatbot, work: Callable[[], Awaitable[object]]) -> int:
    """Ids that the engine runs for something."""
    engine = bot.models.engine
    assert isinstance(engine, PlainEngine)
    before = engine.num_computed
    await work()
    return engine.num_computed - before


async def rested(session: Session) -> None:
    """Until all that is settled was prefilled."""
    listening, ahead = session.ear._turn, session.ear._prefetcher
    assert listening is not None
    assert isinstance(ahead, PromptPrefetcher)
    await settled(lambda: listening.step is None and (ahead._task is None or (ahead._task.done() and not ahead._stale)))
    await asyncio.sleep(0.01)
    await settled(lambda: ahead._task is None or (ahead._task.done() and not ahead._stale))


@pytest.mark.parametrize("interrupted", [False, True])
def test_at_the_commit_only_the_open_block_remains(bot: Chatbot, interrupted: bool) -> None:
    """Whatever the length of speech and history: the ids that are run until the first one of the reply are bounded."""
    block = bot.models.tokenizer.block_tokens
    template = 6  # end of the sound and the opening of the reply

    async def talk() -> None:
        session = bot.session()
        for turn, seconds in enumerate((2.5, 3.9, 10.0, 1.0, 0.9)):
            await hear(session, speech(seconds, turn), 1600, ahead=True)
            await rested(session)

            async def first_id(session: Session = session) -> None:
                async for _ in session.reply(max_tokens=1):
                    pass

            assert await computed(bot, first_id) <= block + template
            session.write("and")
            sounds, _ = await answer(session, interrupt_after=1 if interrupted else None)
            assert sounds

    asyncio.run(talk())


def test_without_listening_ahead_the_whole_question_remains(bot: Chatbot) -> None:
    async def talk() -> None:
        session = bot.session()
        await hear(session, speech(10.0, 50), 1600, ahead=False)

        async def first_id() -> None:
            async for _ in session.reply(max_tokens=1):
                pass

        assert await computed(bot, first_id) > 100

    asyncio.run(talk())


def test_discard_and_commit(bot: Chatbot) -> None:
    async def talk() -> None:
        session = bot.session()
        await session.hear(speech(3.0, 1))
        session.write("never mind")
        session.discard()
        with pytest.raises(ValueError, match="nothing was said"):
            await session.commit()
        await session.hear(speech(0.5, 2), 16000)
        first = await session.commit()
        session.write("and this")
        second = await session.commit()
        assert session.conversation.turns == (first, second)
        assert len(first.ids) == 7
        _, done = await answer(session)  # nothing is open: the last turn is answered
        assert done.tokens
        assert len(session.conversation) == 3
        with pytest.raises(ValueError, match="nothing was said"):
            await answer(session)

    asyncio.run(talk())


def test_a_turn_that_ends_during_a_reply_stands_behind_it(bot: Chatbot) -> None:
    async def talk() -> None:
        session = bot.session()
        session.feed(speech(0.5, 2))
        committed = None
        async for event in session.reply():
            if isinstance(event, AudioDelta) and committed is None:
                await session.hear(speech(0.8, 3))
                committed = await session.commit()
        assert [turn.role.value for turn in session.conversation] == ["user", "assistant", "user"]
        assert session.conversation.turns[-1] == committed
        await answer(session)
        assert len(session.conversation) == 4

    asyncio.run(talk())


def test_an_interruption_at_the_last_event_cuts_too(bot: Chatbot) -> None:
    async def talk() -> None:
        session = bot.session()
        session.feed(speech(1.0, 5))
        async for event in session.reply():
            if isinstance(event, ReplyDone):
                session.interrupt(played_ms=80)
        assert session.conversation.turns[-1].interrupted
        session.write("And in writing?")
        async for event in session.reply(text_only=True):
            if isinstance(event, TextDelta):
                session.interrupt(played_ms=0)
        assert isinstance(event, ReplyDone)
        assert session.conversation.turns[-1].ids  # what was written was read
        assert not event.text_is_estimate
        assert session.conversation.turns[-1].interrupted

    asyncio.run(talk())


def test_prompts_of_a_long_conversation_begin_alike(tmp_path: Path) -> None:
    """Turns are left out by quarters of the positions, not with every turn."""
    bot = duologue.load(write_tiny_chatbot(tmp_path, max_positions=400))
    vocabulary, prompts = bot.models.vocabulary, []
    conversation = Conversation(vocabulary=vocabulary.hash)
    for turn in range(30):
        question = Turn(Role.USER, Modality.TEXT, tuple(vocabulary.encode_text(f"Question {turn}?")))
        conversation = conversation.plus(question)
        prompts.append(reply_prompt(bot.models, conversation, Modality.TEXT, bot.models.card.sampling)[0])
        assert len(prompts[-1]) <= 400 - 64
        conversation = conversation.plus(
            Turn(Role.ASSISTANT, Modality.TEXT, tuple(vocabulary.encode_text("An answer.")))
        )
    kept = [after[: len(before) - 1] == before[:-1] for before, after in pairwise(prompts)]
    full = kept.index(False)
    assert 3 <= kept.count(False) <= 0.5 * len(kept[full:])
    assert len(conversation) == 60


def test_a_bound_for_one_reply(bot: Chatbot) -> None:
    async def talk() -> None:
        session = bot.session()
        session.write("Hello")
        async for event in session.reply(max_tokens=20):
            last = event
        assert isinstance(last, ReplyDone)
        assert last.reason in (EndReason.LENGTH, EndReason.END)
        assert len(session.conversation.turns[-1].ids) <= 20
        with pytest.raises(ValueError, match="max_tokens"):
            await anext(session.reply(max_tokens=0))

    asyncio.run(talk())


def test_interrupt_from_another_thread_and_loop(bot: Chatbot) -> None:
    session = bot.session()
    session.feed(speech(1.0, 5))
    events = session.events()
    seen = []
    for event in events:
        seen.append(event)
        if isinstance(event, AudioDelta):
            session.interrupt(played_ms=240)
            break
    seen += list(events)
    assert isinstance(seen[-1], ReplyDone)
    assert seen[-1].reason is EndReason.INTERRUPTED
    assert len(seen[-1].tokens) == 3
