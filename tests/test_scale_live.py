"""`duologue scale` with Ray: `make test-scale`. Skips where Ray is not installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from benchmarks.scale import measure_scale
from tests.tiny import write_tiny_chatbot

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: run make test-scale"),
    pytest.mark.skipif(sys.platform != "linux", reason="the processes of Ray are found in /proc"),
]


def test_a_killed_cell(tmp_path: Path) -> None:
    model = write_tiny_chatbot(tmp_path / "model", max_tokens=60)
    result = measure_scale(str(model), "cpu", conversations=16, audio_s=0.0, max_tokens=40)
    assert result.errors == ()
    assert sum(result.sessions_per_cell) == 16
    assert max(result.sessions_per_cell) - min(result.sessions_per_cell) <= 2
    # The clients of the killed cell come back to their conversations; the others notice nothing.
    assert 7 <= len(result.returns) <= 9
    assert result.untouched == 16 - len(result.returns)
    assert all(one.resumed for one in result.returns)
    for one in result.returns:
        assert one.num_known >= 4  # two questions and their answers
        # An item is stored while the client hears of it; the kill can come between.
        assert one.num_known - one.num_restored <= 1
    assert result.replaced_s < 120.0
    assert result.exit_code == 0
