"""The bench of the engine, tiny."""

import pytest
from matplotlib.figure import Figure

from benchmarks.engine import measure_engine
from tests.tiny_language import tiny_model, tiny_vocabulary


def test_the_engine_is_measured_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = tiny_vocabulary()
    monkeypatch.setattr("benchmarks.engine.PREFIX_TOKENS", 300)
    result = measure_engine(tiny_model(vocabulary), vocabulary, (1, 3), 20, 8, 1)
    assert [load.num_requests for load in result.together] == [1, 3]
    assert result.together[1].first_ms.num == 3
    assert all(load.tokens_per_s.median > 0 for load in result.together)
    assert result.cached_tokens > 300
    assert {row.name for row in result.rows() if row.aim is not None} == {
        "engine.plain.batch_gain",
        "engine.plain.second_over_first",
    }
    assert "prompt of 300 ids" in {row.group for row in result.rows()}
    figure = Figure()
    result.draw(figure)
    assert all(axes.has_data() for axes in figure.axes)
