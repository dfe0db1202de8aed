"""`duologue evaluate conversation`: calls in simulated time, with a model of random weights."""

import asyncio
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import duologue
from duologue.cli import main
from duologue.client.connection import WIRE_RATE
from duologue.conversation.block_policy import BlockPolicy
from duologue.conversation.mouth import Mouth
from duologue.evaluation import turn_taking
from duologue.evaluation.bundled import load_bundled
from duologue.evaluation.disturbances import DISTURBANCES, cough
from duologue.evaluation.duplex import speech_spans
from duologue.evaluation.long_talk import TalkedTurn, talk_scores
from duologue.evaluation.scores import read_scores
from duologue.evaluation.simulated_time import run_simulated
from duologue.evaluation.turn_taking import Question
from duologue.language.engine import PlainEngine
from duologue.language.sampling import Sampling
from duologue.pcm import from_int16
from duologue.turns import Conversation, Modality, Role, Turn


def test_an_hour_passes_at_once_and_computation_takes_no_time() -> None:
    async def work() -> tuple[float, float]:
        clock = asyncio.get_running_loop().time
        start = clock()
        await asyncio.sleep(3600)
        slept = clock() - start
        late = asyncio.create_task(asyncio.sleep(0.001))
        await asyncio.to_thread(time.sleep, 0.02)
        assert not late.done()
        computed = clock() - start - slept
        await late
        return slept, computed

    began = time.monotonic()
    assert run_simulated(work(), lambda: False) == pytest.approx((3600, 0))
    assert time.monotonic() - began < 60

    async def wait_for_ever() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="has no next moment"):
        run_simulated(wait_for_ever(), lambda: False)


def test_the_clock_waits_for_the_threads_that_are_named() -> None:
    busy = [True]

    async def work() -> float:
        loop = asyncio.get_running_loop()
        found = loop.create_future()

        def compute() -> None:
            time.sleep(0.02)
            loop.call_soon_threadsafe(found.set_result, None)
            busy[0] = False

        start = loop.time()
        threading.Thread(target=compute).start()
        await asyncio.wait_for(found, 0.001)
        return loop.time() - start

    assert run_simulated(work(), lambda: busy[0]) == 0


def test_a_hold_shorter_than_the_clock_can_tell_ends(tiny_folder: Path) -> None:
    """Times near 1000 s are 1e-13 s apart, so a shorter wait ends at the time at which it began."""

    class Policy(BlockPolicy):
        num_asked = 0

        def hold_s(self, num_waiting: int) -> float:
            self.num_asked += 1
            assert self.num_asked < 10_000, "the reply is held for ever"
            self.since = getattr(self, "since", self._clock())
            return 1e-15 if self._clock() == self.since else 0.0

    bot = duologue.load(tiny_folder)
    engine = bot.models.engine
    assert isinstance(engine, PlainEngine)
    prompt = bot.models.vocabulary.prompt_ids(
        Conversation((Turn(Role.USER, Modality.TEXT, (5, 6, 7)),), bot.models.vocabulary.hash)
    )

    async def work() -> str:
        mouth = Mouth(bot.models, bot.worker, policy=Policy(asyncio.get_running_loop().time))
        events = [event async for event in mouth.speak(prompt, Sampling(max_tokens=60))]
        return type(events[-1]).__name__

    assert run_simulated(work(), lambda: engine.busy or bot.worker.busy) == "ReplyDone"


def test_a_pause_is_put_into_the_question_at_a_quiet_place() -> None:
    question = Question.of(load_bundled()[0])
    pcm, end = question.with_pause(1.0)
    assert len(pcm) == len(question.pcm) + WIRE_RATE
    assert end == question.end + WIRE_RATE
    quiet = [
        span.end for span in speech_spans(from_int16(pcm), WIRE_RATE, 0.5) if span.end * WIRE_RATE < end - WIRE_RATE / 2
    ]
    place = quiet[0] * WIRE_RATE - question.start
    assert 0.2 < place / (question.end - question.start) < 0.8
    assert question.with_pause(0.0) == (question.pcm, question.end)


def test_disturbances_are_the_same_every_time_and_as_loud_as_speech() -> None:
    for make in DISTURBANCES.values():
        pcm = make(np.random.default_rng(0))
        assert np.array_equal(pcm, make(np.random.default_rng(0)))
        assert 0.02 < np.abs(from_int16(pcm)).max() <= 1.0
    assert not np.array_equal(cough(np.random.default_rng(0)), cough(np.random.default_rng(1)))


def test_scores_of_a_long_talk() -> None:
    names = ["sum", "sum", "day"] * 4
    turns = [TalkedTurn(name, "", index != 1, index / 6, 0.1 * (index + 1), 100.0) for index, name in enumerate(names)]
    scores = list(talk_scores(turns))
    again = [one for one in scores if one.measure == "right again after 1 turn"]
    assert [(one.item, one.value) for one in again] == [("turn-0", 0.0), *((f"turn-{at}", 1.0) for at in (3, 6, 9))]
    # Ten turns later: 1 is wrong itself, so only the question of turn 0 counts.
    assert [one.item for one in scores if one.measure == "right again after 10 turns"] == ["turn-0"]
    first = [one.value for one in scores if one.measure.startswith("computation to the first audio, first")]
    assert first == pytest.approx([0.1 * number for number in range(1, 7)])


def test_a_whole_run(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no recognizer
    monkeypatch.setattr(turn_taking, "INTERRUPTED_AFTER_S", (0.4,))
    monkeypatch.setattr(turn_taking, "PAUSES_S", (0.0, 0.8))
    monkeypatch.setattr(turn_taking, "ECHOES_DB", (-20,))
    monkeypatch.setattr(turn_taking, "DISTURBANCES", {"cough": cough})
    command = ("evaluate", "conversation", "--model", str(tiny_folder), "--limit", "1", "--minutes", "0.2")
    assert main([*command, "-o", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {(row["group"], row["name"]): row for row in report["rows"]}

    # Silero needs two windows of 32 ms, and the client hears of it with the next chunk of 20 ms.
    assert rows["interruption", "stopped"]["value"] == 1
    assert 0.06 <= rows["interruption", "from the onset of speech to silence"]["value"] < 0.3
    assert rows["interruption", "words kept too many or too few"]["skipped"].startswith("there is no runs/")
    assert rows["false interruption: cough", "reply is cut"]["value"] in (0, 1)
    assert rows["false interruption: echo at -20 dB", "taken for speech"]["num"] == 1
    # A turn ends 0.5 s after speech: a pause of 0.8 s cuts it in two.
    assert rows["pause in the question: 0 s", "turn is kept whole"]["value"] == 1
    assert rows["pause in the question: 0.8 s", "turn is kept whole"]["value"] == 0
    assert 0.4 < rows["pause in the question: 0 s", "from the end of speech to the end of the turn"]["value"] < 0.7
    assert rows["pause in the question: 0 s", "from the end of speech to the first audio"]["value"] > 0.4
    assert rows["long talk", "length"]["value"] >= 0.2
    assert rows["long talk", "turns"]["value"] == len(report["samples"]) >= 2
    assert rows["repeated question", "right again after 100 turns"]["skipped"]
    assert report["settings"]["clock"].startswith("simulated")

    assert {one.subset for one in read_scores(tmp_path / "out")} <= {group for group, _ in rows}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<tr data-group") == 5
    assert len(list((tmp_path / "out" / "sounds").iterdir())) == 10
    assert "| interruption | stopped | 100.0 %" in (tmp_path / "out" / "report.md").read_text()


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "conversation", "--minutes", "-1"]) == 2
    assert "--minutes must be 0 or more" in capsys.readouterr().err
    assert main(["evaluate", "conversation", "--server", "http://127.0.0.1:9", "--limit", "1"]) == 2
    assert "there is no real-time server" in capsys.readouterr().err
