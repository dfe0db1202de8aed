"""The straight path is what sessions are equal to: the oracle."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import duologue
from duologue.conversation.answer import answer
from duologue.conversation.chatbot import Chatbot
from duologue.conversation.events import EndReason, TextDelta
from duologue.language.sampling import GREEDY, Sampling
from duologue.pcm import Pcm, from_int16
from duologue.sound_files import load_audio
from tests.tiny import write_tiny_chatbot

SAMPLED = dataclasses.replace(GREEDY, temperature=1.0, top_p=0.9, seed=3)


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> Chatbot:
    return duologue.load(write_tiny_chatbot(tmp_path_factory.mktemp("answer")))


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("seconds", "rate", "chunk"), [(1.0, 16000, 16000), (3.3, 16000, 700), (2.1, 44100, 4410)])
def test_a_session_gives_the_ids_and_the_sound_of_the_straight_path(
    bot: Chatbot, sampling: Sampling, seconds: float, rate: int, chunk: int
) -> None:
    wav, sampling = noise(int(seconds * rate), rate), dataclasses.replace(sampling, max_tokens=150)
    expected = answer(bot.models, wav, rate, sampling=sampling)
    session = bot.session(sampling=sampling)
    for start in range(0, len(wav), chunk):
        session.feed(wav[start : start + chunk], rate)
    reply = session.reply_now()
    assert len(expected.speech_tokens) > 20
    assert (reply.speech_tokens, reply.text, reply.reason) == (
        expected.speech_tokens,
        expected.text,
        expected.reason,
    )
    assert len(reply.audio) == len(expected.audio)
    np.testing.assert_allclose(reply.audio, expected.audio, atol=1e-4, rtol=0)


def test_the_shipped_model_gives_the_same_either_way() -> None:
    bot = duologue.load("pocket")
    sampling = dataclasses.replace(bot.models.card.sampling, temperature=0.0, speech_temperature=None)
    wav, rate = load_audio(Path(duologue.__file__).parent / "pocket" / "question.wav")
    expected = bot.chat(wav, rate, sampling=sampling)
    session = bot.session(sampling=sampling)
    session.feed(wav, rate)
    reply = session.reply_now()
    assert expected.reason is EndReason.END
    assert (reply.text, reply.speech_tokens) == (expected.text, expected.speech_tokens)
    np.testing.assert_allclose(reply.audio, expected.audio, atol=1e-4, rtol=0)


def test_a_written_question_and_a_written_answer(bot: Chatbot) -> None:
    session = bot.session()
    session.write("What is seven plus five?")
    reply, expected = session.reply_now(text_only=True), bot.chat(text="What is seven plus five?", text_only=True)
    assert (expected.text, expected.audio.size, expected.speech_tokens) == (reply.text, 0, ())
    assert expected.timings.num_text_tokens == reply.timings.num_text_tokens > 0


def test_who_wants_events_gets_the_same_answer(bot: Chatbot) -> None:
    events: list[object] = []
    wav = noise(20000)
    reply, expected = bot.chat(wav, 16000, on_event=events.append), bot.chat(wav, 16000)
    assert reply.speech_tokens == expected.speech_tokens
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == expected.text


def test_every_kind_of_samples_is_the_same_question(bot: Chatbot) -> None:
    integers = (noise(16000) * 32768).astype("<i2")
    kinds: list[Pcm] = [integers, integers.tobytes(), from_int16(integers), integers.astype(">i2")]
    assert len({bot.chat(pcm, 16000).speech_tokens for pcm in kinds}) == 1


@pytest.mark.parametrize(
    ("pcm", "said"),
    [
        (noise(100).astype(np.int32), "float32, int16 or bytes .* not int32"),
        (b"\x00\x00\x00", "whole 16-bit samples, got 3 bytes"),
        ([0.0, 0.1], "not list"),
        (noise(100).reshape(2, 50), "one dimension"),
        (np.zeros(0, np.int16), "no samples"),
    ],
)
def test_what_is_no_sound_is_refused_at_every_door(bot: Chatbot, pcm: Pcm, said: str) -> None:
    for door in (bot.chat, bot.session().feed, lambda pcm, rate: answer(bot.models, pcm, rate)):
        with pytest.raises((ValueError, TypeError), match=said):
            door(pcm, 16000)


def test_nothing_asked(bot: Chatbot) -> None:
    with pytest.raises(ValueError, match="nothing was said"):
        answer(bot.models)
    with pytest.raises(ValueError, match="nothing was said"):
        bot.chat(text="")
