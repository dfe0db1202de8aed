"""What the benches share."""

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks.harness import AIMS, Spread, peak_memory_mb, repeat, run, timed
from benchmarks.plots import draw_lines, draw_stack
from duologue.evaluation.report import Row, format_table


@dataclass(frozen=True)
class Counted:
    """A result of no bench."""

    count: int
    ratio: float

    def rows(self) -> list[Row]:
        return [Row("counted", "count", float(self.count)), Row(AIMS, "c", 1.0, aim=2.0)]

    def draw(self, figure: Any) -> None:
        figure.subplots().plot([self.count])


def test_an_aim_is_met_on_its_side() -> None:
    def met(aim_is: str, aim: float, *values: float) -> list[bool | None]:
        return [Row(AIMS, "a", value, aim=aim, aim_is=aim_is).met for value in values]

    assert met("at most", 1.5, 1.4, 1.5, 1.6) == [True, True, False]
    assert met("at least", 6.0, 5.9, 6.0, 7.0) == [False, True, True]
    assert met("below", 1.5, 1.4, 1.5) == [True, False]
    with pytest.raises(ValueError, match="nan is no result"):
        met("below", 1.5, math.nan)


def test_spread() -> None:
    spread = Spread.of([3.0, 1.0, 2.0])
    assert (spread.median, spread.least, spread.num) == (2.0, 1.0, 3)
    assert 2.0 < spread.p95 <= 3.0
    assert spread.scaled(1000).median == 2000.0
    with pytest.raises(ValueError, match="nothing was measured"):
        Spread.of([])


def test_warm_up_is_run_and_not_counted() -> None:
    rounds: list[int] = []
    seconds = repeat(rounds.append, repetitions=3, warm_up=2)
    assert rounds == [0, 1, 2, 3, 4]
    assert len(seconds) == 3
    assert all(second >= 0 for second in seconds)
    assert timed(lambda: sum(range(100_000))) > 0
    for repetitions, warm_up in ((0, 0), (1, -1)):
        with pytest.raises(ValueError, match="at least 1"):
            repeat(rounds.append, repetitions, warm_up)


def test_a_record_is_plain_json() -> None:
    report = run("counted", "duologue bench counted", {"name": "m"}, lambda: Counted(3, math.nan))
    saved = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert (saved["bench"], saved["command"], saved["model"]) == ("counted", "duologue bench counted", {"name": "m"})
    assert "count" in format_table(report)
    assert saved["results"] == {"count": 3, "ratio": None}
    assert saved["checks"] == [{"name": "c", "value": 1.0, "aim": 2.0, "ok": True}]
    assert saved["peak_memory_mb"] == pytest.approx(peak_memory_mb(), rel=0.2)
    assert saved["duration_s"] >= 0
    assert saved["machine"]["threads"] >= 1


def test_curves_and_stacks_are_drawn_where_their_values_are() -> None:
    figure = Figure()
    left, right, stack = figure.subplots(1, 3)
    draw_lines(left, {"a": ([0, 1], [10.0, 1000.0])}, "title", "x", "y", log=True)
    draw_lines(right, {"a": ([0, 1], [10.0, 1000.0])}, "title", "x", "y")
    low, high = left.get_ylim()
    assert 1 < low < 10 < 1000 < high
    assert right.get_ylim()[0] == 0
    draw_stack(stack, {"first": 2.0, "second": 3.0}, "title", "ms")
    assert [(bar.get_x(), bar.get_width()) for bar in stack.patches] == [(0.0, 2.0), (2.0, 3.0)]
