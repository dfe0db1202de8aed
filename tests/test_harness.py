"""What the benches share."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from duologue.bench.harness import (
    Check,
    Spread,
    at_least,
    at_most,
    below,
    format_checks,
    peak_memory_mb,
    repeat,
    run,
    timed,
)
from duologue.bench.plots import draw_lines, draw_stack


@dataclass(frozen=True)
class Counted:
    """A result of no bench."""

    count: int
    ratio: float
    checks: tuple[Check, ...] = ()

    def table(self) -> str:
        return f"{self.count}"

    def draw(self, figure: Any) -> None:
        figure.subplots().plot([self.count])


def test_a_check_is_met_on_its_side_of_the_aim_and_by_numbers_only() -> None:
    assert [at_most("a", value, 1.5).ok for value in (1.4, 1.5, 1.6, math.nan)] == [True, True, False, False]
    assert [at_least("a", value, 6.0).ok for value in (5.9, 6.0, 7.0, math.nan)] == [False, True, True, False]
    assert [below("a", value, 1.5).ok for value in (1.4, 1.5, math.nan)] == [True, False, False]
    lines = format_checks([at_most("x.y", 2.0, 1.5), at_most("x.z", 1.0, 1.5)]).splitlines()
    assert lines == ["x.y: 2, aim 1.5: NOT met", "x.z: 1, aim 1.5: met"]


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


def test_a_record_is_plain_json(tmp_path: Path) -> None:
    record = run(
        "counted", "duologue bench counted", {"name": "m"}, lambda: Counted(3, math.nan, (at_most("c", 1, 2),))
    )
    path = record.save(tmp_path / "results")
    assert path.name == "counted.json"
    saved = json.loads(path.read_text())
    assert saved == json.loads(json.dumps(record.to_json()))
    assert saved["results"] == {"count": 3, "ratio": None}
    assert saved["checks"] == [{"name": "c", "value": 1, "aim": 2, "ok": True}]
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
