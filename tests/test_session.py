"""Chatbot and Session with random weights: events, history, interruption, files."""

import asyncio
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

import duologue
from duologue.conversation.block_policy import BlockPolicy
from duologue.conversation.chatbot import Chatbot
from duologue.conversation.events import AudioDelta, EndReason, Interrupted, ReplyDone, SpeechDelta, TextDelta
from duologue.conversation.history import reply_prompt
from duologue.conversation.session import Session
from duologue.interleave import TEXT_ONLY, split
from duologue.language.sampling import Sampling
from duologue.models import Models
from duologue.pcm import Pcm
from duologue.rates import speak_samples_for_tokens, tokens_for_samples
from duologue.turns import Modality, Role
from tests.tiny import write_tiny_chatbot


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chatbot(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def bot(folder: Path) -> Chatbot:
    return duologue.load(folder)


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


def test_reply_is_whole_and_legal(bot: Chatbot) -> None:
    session = bot.session()
    session.feed(noise(20000))
    events = list(session.events())
    done = events[-1]
    assert isinstance(done, ReplyDone)
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == done.text
    assert tuple(t for e in events if isinstance(e, SpeechDelta) for t in e.tokens) == done.tokens
    audio = [e for e in events if isinstance(e, AudioDelta)]
    assert sum(len(e.wav) for e in audio) == speak_samples_for_tokens(len(done.tokens))
    position = 0
    for event in audio:
        assert event.first_sample == position
        position += len(event.wav)
    user, reply = session.conversation.turns
    assert (user.role, user.modality, len(user.ids)) == (Role.USER, Modality.SPEECH, tokens_for_samples(20000))
    parts = split(reply.ids, bot.models.vocabulary.kind)
    assert bot.models.vocabulary.speech_codes(parts.speech) == list(done.tokens)
    assert done.timings.num_text_tokens == len(parts.text)
    assert done.timings.first_audio_s is not None


def test_chat_is_stateless_and_seeded(bot: Chatbot) -> None:
    first, second = (bot.chat(noise(16000), 16000) for _ in range(2))
    assert first.speech_tokens == second.speech_tokens
    # How many tokens a block takes depends on the load of the machine, and rounding depends on that.
    np.testing.assert_allclose(first.audio, second.audio, rtol=0, atol=1e-4)


def test_chunks_do_not_matter(bot: Chatbot) -> None:
    wav = noise(44100, 1)
    whole, pieces = bot.session(), bot.session()
    whole.feed(wav, 44100)
    for start in range(0, len(wav), 1234):
        pieces.feed(wav[start : start + 1234], 44100)
    assert asyncio.run(whole.commit()) == asyncio.run(pieces.commit())


def test_pcm_of_any_kind(bot: Chatbot) -> None:
    integers = (noise(16000) * 32768).astype("<i2")
    turns = []
    kinds: list[Pcm] = [integers, integers.tobytes(), integers.astype(np.float32) / np.float32(32768)]
    for pcm in kinds:
        session = bot.session()
        session.feed(pcm)
        turns.append(asyncio.run(session.commit()))
    assert turns[0] == turns[1] == turns[2]


def test_text_in_and_text_out(bot: Chatbot) -> None:
    reply = bot.chat(text="What is seven plus five?", text_only=True)
    assert reply.text
    assert not reply.audio.size
    assert not reply.speech_tokens
    session = bot.session()
    session.write("Hello")
    session.reply_now(text_only=True)
    last = session.conversation.turns[-1]
    assert last.modality is Modality.TEXT
    split(last.ids, bot.models.vocabulary.kind, TEXT_ONLY)


def test_feeding_during_a_reply_belongs_to_the_next_turn(bot: Chatbot) -> None:
    async def talk() -> None:
        session = bot.session()
        session.feed(noise(16000))
        fed = False
        async for _ in session.reply():
            if not fed:
                session.feed(noise(8000, 2))
                fed = True
        assert len(session.conversation) == 2
        async for _ in session.reply():
            pass
        assert [len(turn.ids) for turn in session.conversation.turns[::2]] == [13, 7]
        assert session.ear.num_samples == 24000

    asyncio.run(talk())


def test_interrupt_cuts_the_history_at_what_was_heard(bot: Chatbot) -> None:
    async def talk() -> list[object]:
        session = bot.session()
        session.feed(noise(16000))
        events: list[object] = []
        async for event in session.reply():
            events.append(event)
            if isinstance(event, AudioDelta):
                session.interrupt(played_ms=400)
        turn = session.conversation.turns[-1]
        kinds = split(turn.ids, bot.models.vocabulary.kind)
        assert turn.interrupted
        assert len(kinds.speech) == 5
        session.feed(noise(16000, 3))
        async for event in session.reply():
            assert event
        return events

    events = asyncio.run(talk())
    assert isinstance(events[-2], Interrupted)
    assert events[-2].num_tokens_heard == 5
    assert isinstance(events[-1], ReplyDone)
    assert events[-1].reason is EndReason.INTERRUPTED


def test_a_reply_far_ahead_of_its_playback_waits_for_it(bot: Chatbot) -> None:
    """While the clock of the playback stands, two seconds of speech exist; then the reply goes on to its end."""
    now = [0.0]

    def policy() -> BlockPolicy:
        return BlockPolicy(clock=lambda: now[0], max_ahead_s=2.0)

    async def talk() -> tuple[int, int]:
        session = Session(bot.models, bot.worker, sampling=Sampling(max_tokens=200, seed=1), policy=policy)
        session.feed(noise(16000))
        stream, num_tokens, held_at = session.reply(), 0, 0
        while True:
            coming = asyncio.ensure_future(anext(stream, None))
            await asyncio.wait({coming}, timeout=None if held_at or not num_tokens else 3.0)
            if not coming.done():
                held_at = num_tokens
            if held_at:
                now[0] += 10.0
            event = await coming
            if event is None:
                return held_at, num_tokens
            num_tokens += isinstance(event, SpeechDelta)

    held_at, num_tokens = asyncio.run(talk())
    assert 20 <= held_at <= 26  # of 80 ms each
    assert num_tokens > 100


def test_interrupt_after_the_reply_is_done(bot: Chatbot) -> None:
    session = bot.session()
    session.feed(noise(16000))
    reply = session.reply_now()
    session.interrupt(played_ms=0)
    assert reply.speech_tokens
    assert session.conversation.turns[-1].ids == ()
    with pytest.raises(ValueError, match="negative"):
        session.interrupt(-1)


def test_the_next_prompt_begins_with_the_last(bot: Chatbot) -> None:
    session = bot.session()
    session.feed(noise(16000))
    asyncio.run(session.commit())
    before, _ = reply_prompt(bot.models, session.conversation, Modality.INTERLEAVED, session.sampling)
    session.feed(noise(16000, 5))  # a second turn of the user without a reply between
    session.reply_now()
    session.feed(noise(16000, 6))
    asyncio.run(session.commit())
    after, _ = reply_prompt(bot.models, session.conversation, Modality.INTERLEAVED, session.sampling)
    assert after[: len(before) - 1] == before[:-1]


def test_save_and_load(bot: Chatbot, tmp_path: Path) -> None:
    session = bot.session()
    session.feed(noise(16000))
    session.reply_now()
    session.save(tmp_path / "talk.json")
    again = bot.load_session(tmp_path / "talk.json")
    assert again.conversation == session.conversation
    other = duologue.load(write_tiny_chatbot(tmp_path / "other"))
    assert other.load_session(tmp_path / "talk.json").conversation == session.conversation


def test_long_conversations_lose_the_oldest_turns_only_in_the_prompt(tmp_path: Path) -> None:
    bot = duologue.load(write_tiny_chatbot(tmp_path, max_positions=200, max_tokens=60))
    session = bot.session()
    for seed in range(5):
        session.feed(noise(24000, seed))
        session.reply_now()
    assert len(session.conversation) == 10
    session.feed(noise(16000 * 20))
    with pytest.raises(ValueError, match="too long"):
        session.reply_now()
    assert len(session.conversation) == 10


def test_refusals(bot: Chatbot, folder: Path) -> None:
    with pytest.raises(ValueError, match="nothing was said"):
        bot.session().reply_now()
    with pytest.raises(ValueError, match="no voice 'robot'"):
        bot.session(voice="robot")
    with pytest.raises(ValueError, match="either as audio or as text"):
        bot.chat()
    with pytest.raises(ValueError, match="sample_rate"):
        bot.chat(noise(100))
    with pytest.raises(ValueError, match="NaN"):
        bot.chat(np.full(100, np.nan, np.float32), 16000)
    session = bot.session()
    session.feed(noise(100))
    with pytest.raises(ValueError, match="rate changed"):
        session.feed(noise(100), 8000)
    with pytest.raises(ValueError, match="no model 'nowhere'"):
        duologue.load("nowhere")


@pytest.mark.parametrize("part", ["language", "flow"])
def test_a_sibling_of_another_tokenizer_is_refused(folder: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(folder, tmp_path / "mixed")
    if part == "flow":
        flow = tmp_path / "mixed" / "decoder" / "flow" / "config.json"
        flow.write_text(json.dumps({**json.loads(flow.read_text()), "extra": {"tokenizer": "0" * 64}}))
        with pytest.raises(ValueError, match="the flow in .* was made with another tokenizer"):
            Models.load(tmp_path / "mixed")
        return
    config = tmp_path / "mixed" / "tokenizer" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ValueError, match="another tokenizer"):
        Models.load(tmp_path / "mixed")


def test_a_name_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def give(name: str, allow_patterns: list[str]) -> str:
        if name == "someone/nothing":
            raise LocalEntryNotFoundError("cannot find it")
        asked[name] = allow_patterns
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", give)
    assert duologue.load("someone/tiny").models.card.name == "tiny"
    assert "*.py" not in asked["someone/tiny"]
    with pytest.raises(ValueError, match=r"no folder 'someone/nothing' here.*cannot find it"):
        duologue.load("someone/nothing")
