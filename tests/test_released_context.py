"""The curve over the window of past frames, from a small random flow."""

import dataclasses
from pathlib import Path

import pytest
import torch

from duologue.config import read_json, write_json
from duologue.layers import Padded
from recipes.released_context import measure as context
from tests.released_sizes import small_decoder, small_tokens


@pytest.fixture(scope="module")
def curve() -> context.Curve:
    flow = small_decoder().flow
    tokens = Padded.stack([small_tokens(80), small_tokens(61, 1)])
    with torch.inference_mode():
        mels = flow(tokens).rows()
    return context.measure(flow, tokens, mels, windows=(0, 60, 600), overlaps=(0, 12), num_steps=2)


def test_a_larger_window_is_nearer_to_the_full_context(curve: context.Curve) -> None:
    full, *windows = curve.windows
    assert full.window_frames is None
    assert full.to_full == full.block_to_full == 0.0
    assert [point.window_frames for point in windows] == [0, 60, 600]
    assert windows[2].to_full < 1e-4
    assert windows[2].block_to_full < 1e-4
    assert windows[0].block_to_full > windows[1].block_to_full > 1e-3
    assert all(point.to_recording > 0 for point in curve.windows)
    assert curve.other_noise > 0.01
    assert [point.overlap_frames for point in curve.overlaps] == [0, 12]
    assert curve.overlaps[0].seam != curve.overlaps[1].seam
    assert windows[1].frames_per_block == 172 + 12 + 60


def test_the_curve_is_written_and_drawn(curve: context.Curve, tmp_path: Path) -> None:
    write_json(tmp_path / "context.json", dataclasses.asdict(curve))
    assert read_json(tmp_path / "context.json")["num_replies"] == 2
    context.draw(curve, tmp_path / "context.png")
    assert (tmp_path / "context.png").stat().st_size > 1000
