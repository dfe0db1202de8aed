"""The bench of the released decoder at sizes for tests: all figures are there and make sense."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmarks import harness
from benchmarks.released_decoder import _parabola, measure_released_decoder
from duologue.cli import main
from duologue.released.random_weights import PRESETS
from tests.released_sizes import FLOW, HIFT


def test_released_decoder() -> None:
    record = harness.run(
        "released_decoder",
        "test",
        {},
        lambda: measure_released_decoder(FLOW, HIFT, 4.0, 10, 60, 6, num_steps=1, repetitions=1),
    )
    result = record.result
    names = [row.name for row in record.rows if row.aim is not None]
    assert names == ["decoder.released.last_over_first_full", "decoder.released.speedup"]
    found = json.loads(json.dumps(record.to_json()))["results"]
    assert (found["window_frames"], found["overlap_frames"], found["block_tokens"]) == (60, 6, 10)
    assert len(found["block_s"]) == 5
    assert (found["first_full"], found["last"]) == (2, 5)
    assert [index for index, _ in found["released_block_s"]] == [1, 2, 3, 4, 5]
    assert found["released_calls"] == [3] * 5
    assert found["speedup"] == pytest.approx(found["released_reply_s"] / found["reply_s"])
    assert 0 < found["vocoder_s"] < found["reply_s"]
    assert "bfloat16 gains" in {row.name for row in record.rows}
    result.draw(Figure())


def test_replies_too_short_for_a_full_window_are_refused() -> None:
    with pytest.raises(
        ValueError, match="a reply of 25 tokens has 2 blocks of 10; at least two must follow the window"
    ):
        measure_released_decoder(FLOW, HIFT, 2.0, 10, 60, 6)
    with pytest.raises(ValueError, match="repetitions must be at least 1, got 0"):
        measure_released_decoder(FLOW, HIFT, repetitions=0)


def test_the_parabola_goes_through_its_points() -> None:
    def cost(frames: float) -> float:
        return 2 + 3 * frames + 0.5 * frames**2

    places = [float(x) for x in range(1, 31)]
    points = [1.0, 8.0, 15.0, 22.0, 30.0]
    assert _parabola(points, [cost(x) for x in points], places) == pytest.approx(sum(map(cost, places)))


@pytest.mark.slow
def test_commands(tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "9b", PRESETS["tiny"])
    few = ("--seconds", "8", "--repetitions", "1", "--window", "30")
    assert main(["bench", "decoder", "--preset", "glm-4-voice-9b", *few, "--json"]) == 0
    printed = capsys.readouterr()
    assert "released mode, some blocks: 4 of 4 steps" in printed.err
    record = json.loads(printed.out)
    assert record["peak_memory_mb"] > 0
    assert (record["bench"], record["model"]["name"]) == ("decoder-glm-4-voice-9b", "glm-4-voice-9b")
    assert record["results"]["window_frames"] == 30
    assert {check["name"] for check in record["checks"]} == {
        "decoder.released.last_over_first_full",
        "decoder.released.speedup",
    }
