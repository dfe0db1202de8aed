"""The benches, tiny: what they measure is there, and their checks fail where the aim is missed."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import sessions, talk
from benchmarks.commit import CommitTimes, measure_commits
from benchmarks.decoder import DecoderBench, measure_decoder
from benchmarks.harness import AIMS, Spread
from benchmarks.sessions import Crowd, Exchange, Loudspeaker, SessionsBench, measure_sessions
from benchmarks.talk import measure_talk
from benchmarks.tokenizer import measure_tokenizer, random_tokenizer
from duologue.conversation.chatbot import Chatbot, load
from duologue.decoder.decoder import SpeechDecoder
from duologue.evaluation.report import Report, Row, format_table
from duologue.layers import Padded
from duologue.models import Decoder
from duologue.tokenizer.tokenizer import SpeechTokenizer


@pytest.fixture(scope="module")
def bot(tiny_folder: Path) -> Chatbot:
    return load(tiny_folder)


def aims(result: Any) -> list[Row]:
    return [row for row in result.rows() if row.group == AIMS]


def oks(result: Any) -> dict[str, bool]:
    return {row.name: bool(row.met) for row in aims(result)}


def table(result: Any) -> str:
    return format_table(Report("bench", {}, {}, tuple(result.rows())))


def drawn(result: Any) -> bool:
    figure = Figure()
    result.draw(figure)
    return all(axes.has_data() for axes in figure.axes)


def slowed(monkeypatch: pytest.MonkeyPatch, stage: type, delay: Callable[[int], None]) -> None:
    """Every step of a stage costs more, by the number of the step."""
    count, step = 0, stage.step  # type: ignore[attr-defined]

    def slow(self: Any, x: Padded, state: Any) -> Padded:
        nonlocal count
        count += 1
        delay(count)
        return step(self, x, state)  # type: ignore[no-any-return]

    monkeypatch.setattr(stage, "step", slow)


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def noise(seconds: float) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(int(16_000 * seconds))).astype(np.float32)


# Tokenizer -----------------------------------------------------------------------------------------------------------


def test_bench_tokenizer(bot: Chatbot) -> None:
    tokenizer = bot.models.tokenizer
    block_s = tokenizer.block_tokens / 12.5
    result = measure_tokenizer(tokenizer, 6 * block_s, repetitions=1, warm_up=0)
    assert [one.chunk_ms for one in result.streamed] == [20, 40, 100]
    if tokenizer.config.features.floor == "fixed":
        assert [one.num_differing for one in result.streamed] == [0, 0, 0]
    assert len(result.block_ms) == 5
    assert result.baseline_block_ms[-1][0] == 5
    assert list(result.commit_ms) == [f"open block {share} % full" for share in (10, 50, 100)]
    fixed, utterance = result.floors
    assert (fixed.floor, utterance.floor) == ("fixed", "utterance")
    assert fixed.num_differing == 0
    assert fixed.num_tokens == utterance.num_tokens > 100
    assert 0 <= utterance.rate <= 1
    assert result.state_mb > 0
    worst = max(one.over_offline for one in result.streamed)
    assert {row.name: row.value for row in aims(result)} == {
        "tokenizer.stream_over_offline": worst,
        "tokenizer.flat": result.last_over_first,
    }
    assert "chunks of 40 ms" in table(result)
    assert drawn(result)


def test_bench_tokenizer_sees_what_is_too_dear(bot: Chatbot, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 8 * bot.models.tokenizer.block_tokens / 12.5
    num_chunks = int(seconds * 25)
    monkeypatch.setattr("benchmarks.tokenizer.questions", lambda: [noise(1.0)])
    slowed(monkeypatch, SpeechTokenizer, lambda count: burn(2e-5 * (count % num_chunks)))
    result = measure_tokenizer(bot.models.tokenizer, seconds, repetitions=1, warm_up=0, chunks_ms=(40,))
    assert oks(result) == {"tokenizer.stream_over_offline": False, "tokenizer.flat": False}
    for wrong in ({"seconds": 0.1}, {"repetitions": 0}, {"warm_up": -1}):
        with pytest.raises(ValueError, match="too short|at least 1"):
            measure_tokenizer(bot.models.tokenizer, **{"seconds": seconds, **wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="glm-4-voice-9b"):
        random_tokenizer("glm-5")


# Decoder -------------------------------------------------------------------------------------------------------------


def tiny_decoder_bench(bot: Chatbot) -> DecoderBench:
    decoder: Decoder = bot.models.decoder
    return measure_decoder(decoder, bot.models.vocabulary.codebook_size, 8.0, repetitions=3, num_replies=1)


def test_bench_decoder(bot: Chatbot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder whose steps cost by what they decode: what else the machine does has no part in the comparison."""
    step = SpeechDecoder.step

    def by_length(self: Decoder, x: Padded, state: Any) -> Padded:
        burn(2e-3 * x.values.shape[1])
        return step(self, x, state)

    monkeypatch.setattr(SpeechDecoder, "step", by_length)
    result = tiny_decoder_bench(bot)
    assert [(one.num_tokens, len(one.block_ms)) for one in result.streamed] == [(10, 10), (25, 4)]
    assert result.audio_s == pytest.approx(8.0, abs=0.1)
    assert [index for index, _ in result.baseline.block_ms] == [1, 2, 3, 4]
    assert result.baseline.last_over_first > 1
    assert result.baseline.reply_s == pytest.approx(sum(ms for _, ms in result.baseline.block_ms) / 1000)
    (check,) = aims(result)
    assert check.name == "decoder.pocket.last_over_second"
    assert check.value == max(one.last_over_second for one in result.streamed)
    assert "last/second" in table(result)
    assert drawn(result)
    with pytest.raises(ValueError, match="four blocks"):
        measure_decoder(bot.models.decoder, 32, 5.0)


def test_bench_decoder_sees_growth(bot: Chatbot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder whose steps cost more the more it has said."""
    step = SpeechDecoder.step

    def slow(self: Decoder, x: Padded, state: Any) -> Padded:
        burn(2e-4 * int(state.flow.encoder.start))
        return step(self, x, state)

    monkeypatch.setattr(SpeechDecoder, "step", slow)
    assert oks(tiny_decoder_bench(bot)) == {"decoder.pocket.last_over_second": False}


# Sessions ------------------------------------------------------------------------------------------------------------


def test_bench_sessions(bot: Chatbot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "PAUSE_S", (0.0, 0.1))
    result = measure_sessions(bot, (1, 3), 0.3, asked=[noise(0.5)])
    alone, crowd = result.crowds
    assert (alone.num_sessions, crowd.num_sessions) == (1, 3)
    assert {one.session for one in crowd.exchanges} == {0, 1, 2}
    for one in crowd.exchanges:
        assert one.said_at - one.asked_at == pytest.approx(0.5, abs=1e-6)  # of the clock, however late the chunks were
        assert one.heard_at >= one.said_at + (one.first_audio_s or 0) + one.audio_s - 1e-3
    assert crowd.audio_s == pytest.approx(sum(one.audio_s for one in crowd.exchanges))
    assert crowd.cpu_per_audio is not None
    assert sum(size * num for size, num in crowd.batch_sizes.items()) > 0
    assert set(oks(result)) == {"sessions.p95_ttfa_s", "sessions.underruns", "sessions.unanswered"}
    assert "sessions" in table(result)
    assert drawn(result)


def test_bench_sessions_sees_late_and_interrupted_sound(bot: Chatbot, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block comes too late, and the next one when the first has been played for long."""
    monkeypatch.setattr(sessions, "PAUSE_S", (0.0, 0.1))
    step = SpeechDecoder.step

    def slow(self: Decoder, x: Padded, state: Any) -> Padded:
        time.sleep(1.7)
        return step(self, x, state)

    monkeypatch.setattr(SpeechDecoder, "step", slow)
    result = measure_sessions(bot, (1,), 0.1, asked=[noise(0.2)])
    assert result.crowds[0].first_audio_s is not None
    assert result.crowds[0].first_audio_s.median > 1.6
    assert not oks(result)["sessions.p95_ttfa_s"]
    assert oks(result)["sessions.unanswered"]


def test_a_loudspeaker_counts_the_moments_without_sound() -> None:
    now = 10.0
    loudspeaker = Loudspeaker(lambda: now)
    loudspeaker.add(22_050, 22_050)
    now = 10.5
    loudspeaker.add(11_025, 22_050)
    assert (loudspeaker.started_at, loudspeaker.dry_at, loudspeaker.underruns_s) == (10.0, 11.5, [])
    now = 12.0
    loudspeaker.add(22_050, 22_050)
    assert (loudspeaker.dry_at, loudspeaker.underruns_s) == (13.0, [0.5])


def test_underruns_and_silence_do_not_pass() -> None:
    heard = Exchange(0, 0.0, 1.0, 0.5, 3.0, 1.5, (0.2,))
    silent = Exchange(0, 0.0, 1.0, None, 1.0, 0.0)
    counts: Any = {"num_sessions": 1, "duration_s": 3.0, "audio_s": 1.5, "cpu_per_audio": 1.0, "load": 0.5}
    rest: Any = {**counts, "batch_sizes": {1: 4}, "longest_queue": 1, "memory_mb": 100.0}
    dry = Crowd(exchanges=(heard,), first_audio_s=Spread.of([0.5]), num_underruns=1, underrun_s=0.2, unanswered=0,
                refused=(), **rest)  # fmt: skip
    assert [row.met for row in sessions.judge(dry)] == [True, False, True]
    mute = Crowd(exchanges=(silent,), first_audio_s=None, num_underruns=0, underrun_s=0.0, unanswered=1,
                 refused=("full",), **rest)  # fmt: skip
    assert [row.met for row in sessions.judge(mute)] == [None, True, False]
    rows = {row.name: row for row in SessionsBench((mute,)).rows()}
    assert rows["questions without sound"].value == 1.0
    assert rows["refused"].note == "full"


def test_bench_talk_goes_beyond_the_positions_and_counts_what_nobody_heard(
    bot: Chatbot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(talk, "NUM_COMPARED", 2)
    monkeypatch.setattr(talk, "INTERRUPTED_SHARE", 1.0)
    monkeypatch.setattr(talk, "questions", lambda: [noise(0.5)])
    monkeypatch.setattr(talk, "STOP_AFTER_S", (0.05, 0.1))
    result = measure_talk(bot, 0.1, 2, (0.5,))
    assert len(result.turns) >= 2
    assert result.turns[-1].minute >= 0.1
    unlimited, limited = result.interruptions
    assert unlimited.ahead_s is None
    assert unlimited.num_interrupted == limited.num_interrupted == 2
    assert 0 < limited.generated <= unlimited.generated
    assert limited.heard < limited.generated
    assert set(oks(result)) == {"talk.slower_at_the_end", "talk.memory_growth_mb"}
    assert drawn(result)
    slow = tuple(dataclasses.replace(one, first_audio_s=9.0, memory_mb=1e6) for one in result.turns[-2:])
    worse = dataclasses.replace(result, turns=(*result.turns, *slow))
    assert oks(worse) == {"talk.slower_at_the_end": False, "talk.memory_growth_mb": False}


def test_sessions_of_nobody_or_no_time(bot: Chatbot) -> None:
    for counts, seconds in (((), 1.0), ((0,), 1.0), ((1,), 0.0)):
        with pytest.raises(ValueError, match="from 1 on|positive"):
            measure_sessions(bot, counts, seconds)


# Commit to first token -----------------------------------------------------------------------------------------------


def test_commit_to_first_token(bot: Chatbot) -> None:
    times = measure_commits(bot, repetitions=1, warm_up=0, speech_s=(1.0, 6.0), num_turns=2)
    assert [seconds for seconds, _ in times.by_speech] == [1.0, 6.0]
    assert [turn for turn, _ in times.by_turn] == [1, 2]
    assert all(0 < spread.median < math.inf for _, spread in (*times.by_speech, *times.by_turn))
    block_s = bot.models.tokenizer.block_tokens / 12.5
    assert times.open_block_s == ((1.0, 1.0 % block_s), (6.0, 6.0 % block_s))
    assert {row.name for row in times.aims()} == {
        "latency.commit.long_over_short_speech",
        "latency.commit.last_over_first_turn",
    }


def test_waiting_that_grows_with_speech_or_history_does_not_pass() -> None:
    def times(short: float, long: float, first: float, last: float) -> list[bool]:
        by_speech = ((2.5, Spread.of([short])), (29.0, Spread.of([long])))
        by_turn = ((1, Spread.of([first])), (10, Spread.of([last])))
        return [bool(row.met) for row in CommitTimes(by_speech, by_turn, ()).aims()]

    assert times(20.0, 29.0, 20.0, 29.0) == [True, True]
    assert times(20.0, 31.0, 20.0, 31.0) == [False, False]
