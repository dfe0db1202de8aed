"""The suite `conversation`: turn taking and a long talk with a Realtime server, from the calls to the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duologue import machine
from duologue.client.connection import WIRE_RATE
from duologue.evaluation.bundled import load_bundled
from duologue.evaluation.caller import Connect
from duologue.evaluation.conversations import Waveform
from duologue.evaluation.long_talk import DISTANCES, REPEATED, SUBSET, TalkedTurn, talk, talk_scores
from duologue.evaluation.page import PageRow, write_rows
from duologue.evaluation.report import Report, Row, format_markdown
from duologue.evaluation.scores import MissingFigure, Scored, score_rows
from duologue.evaluation.suite import NAME, Listener
from duologue.evaluation.testset import spread
from duologue.evaluation.turn_taking import INTERRUPTION, Question, Trial, TurnTaking
from duologue.pcm import from_int16
from duologue.progress import bar

SUITE = "conversation"


@dataclass(frozen=True)
class ConversationSettings:
    """What is measured, and where the results go.

    Attributes:
        limit: bundled questions at most; None takes all.
        minutes: length of the long talk; 0 leaves it out.
        num_players: trials at most on the page.
    """

    output: Path
    limit: int | None = None
    minutes: float = 60.0
    num_players: int = 60


async def run_conversations(
    settings: ConversationSettings, connect: Connect, about: Mapping[str, Any], is_simulated: bool, listener: Listener
) -> Report:
    """Holds all conversations, one after the other, and writes scores.jsonl, the report and its page.

    Args:
        is_simulated: the clock stands still while models compute.

    Raises:
        ValueError: the server cannot be reached, or ends a conversation.
    """
    recordings = load_bundled()
    chosen = spread(recordings, settings.limit) if settings.limit else recordings
    questions = [Question.of(one) for one in chosen]
    taking = TurnTaking(connect, questions, is_simulated, listener.recognizer)
    with bar(len(taking.plan()), "part 1 of 2, turn taking", "conversations") as progress:
        async for _ in taking.run():
            progress.update()
    turns: list[TalkedTurn] = []
    if settings.minutes:
        with bar(round(settings.minutes), "part 2 of 2, long talk", "minutes") as progress:
            async for turn in talk(connect, questions, settings.minutes):
                turns.append(turn)
                progress.update(int(turn.minute) - progress.n)
    scored = Scored([score for trial in taking.trials for score in trial.scores], list(_missing(listener, turns)))
    scored.scores += talk_scores(turns)
    settings.output.mkdir(parents=True, exist_ok=True)
    scored.save(settings.output)
    rows = score_rows(scored, {"recognizer": listener.name, "judge": ""}, with_total=False)
    rows += [*_void_rows(taking.trials), *_length_rows(turns)]
    clock = (
        "simulated: it stands still while models compute, and latencies add the computation" if is_simulated else "real"
    )
    report = Report(
        SUITE,
        dict(about),
        machine.describe(),
        tuple(rows),
        {
            "data": f"{len(questions)} bundled questions",
            "clock": clock,
            "recognizer": listener.name or f"none: {listener.why_not}",
            "normalizer": "Whisper's English one with numbers in words",
            "interval": "95 %: Wilson for shares of items, bootstrap over items otherwise, seed 0",
            "load": machine.load(),
            "commit": machine.source_commit(),
        },
        tuple(vars(turn) for turn in turns),
    )
    report.save(settings.output, NAME)
    (settings.output / f"{NAME}.md").write_text(format_markdown(report), encoding="utf-8")
    shown = spread(taking.trials, settings.num_players)
    write_rows(settings.output, report, [_page_row(trial) for trial in shown], len(taking.trials))
    return report


def _missing(listener: Listener, turns: Sequence[TalkedTurn]) -> Iterator[MissingFigure]:
    if listener.recognizer is None:
        yield MissingFigure(INTERRUPTION, "words kept too many or too few", listener.why_not, "words")
    if not turns:
        yield MissingFigure(SUBSET, "all", "left out: --minutes 0")
        return
    scored = {score.measure for score in talk_scores(turns)}
    for distance in DISTANCES:
        name = f"right again after {distance} turn{'s' * (distance > 1)}"
        if name not in scored:
            yield MissingFigure(REPEATED, name, f"no question was asked again at that distance in {len(turns)} turns")


def _void_rows(trials: Sequence[Trial]) -> Iterator[Row]:
    for subset in dict.fromkeys(trial.subset for trial in trials):
        void = [trial.void for trial in trials if trial.subset == subset and trial.void]
        if void:
            yield Row(subset, "trials without a score", float(len(void)), num=len(void), note=void[0])


def _length_rows(turns: Sequence[TalkedTurn]) -> Iterator[Row]:
    if not turns:
        return
    yield Row(SUBSET, "length", turns[-1].minute, "min")
    yield Row(SUBSET, "turns", float(len(turns)))
    settled = turns[len(turns) // 10]  # the caches are full, and all code has run once
    growth = turns[-1].memory_mb - settled.memory_mb
    if growth == growth:  # NaN where the system does not say
        yield Row(SUBSET, "growth of memory", growth, "MB", note=f"from minute {settled.minute:.0f}, client included")


def _page_row(trial: Trial) -> PageRow:
    return PageRow(
        group=trial.subset,
        detail=trial.id,
        question=trial.asked,
        answer=trial.answered,
        heard=trial.heard_text,
        in_text=None if trial.void else not trial.is_wrong,
        is_wrong=trial.is_wrong,
        question_sound=Waveform(from_int16(trial.said), WIRE_RATE),
        answer_sound=Waveform(from_int16(trial.heard), WIRE_RATE),
        note=trial.void,
    )
