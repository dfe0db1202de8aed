"""How many past frames a block of the released architecture has to see, from a small flow that was trained for it.

    python -m recipes.released_context.measure [--run runs/released_context/flow] [--out runs/released_context]

Held-out clips, joined to long replies, are streamed in blocks of 25 tokens with windows of several sizes, and once with
all of the past. Two distances to the latter, from the same noise, as mean differences of natural-log mels: of whole
streams, each going on from what it said itself, and of single blocks, each going on from what the full context said.
A third one is that to the recordings. Written: `context.json` and `context.png`.

Shapes: B batch, T mel frames, M mels.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duologue import machine, rates
from duologue.checkpoint import load_component
from duologue.config import load_config, to_mapping, write_json
from duologue.layers import Padded
from duologue.released.decoder.blocks import Streaming, last_of
from duologue.released.decoder.flow import ReleasedFlow, ReleasedFlowConfig, ReleasedFlowState
from duologue.training.flow import FlowRecipe, FlowStage, TrainingUtterance, join

RUN = Path("runs/released_context/flow")
RECIPE = Path(__file__).parent / "flow.yaml"
WINDOWS = (0, 12, 25, 50, 75, 100, 150, 200, 300)
OVERLAPS = (0, 6, 12, 34)
BLOCK_TOKENS = 25


@dataclass(frozen=True)
class Point:
    """One way of streaming.

    Attributes:
        window_frames: None for the full context.
        to_full: distance of whole streams to full context, 0 for that itself.
        block_to_full: distance of single blocks, each with the mel of the full context before it.
        to_recording: distance to the recorded mel.
        seam: how much larger the step from frame to frame is at the borders of blocks than elsewhere.
        frames_per_block: that the U-Net runs over, once the window is full.
    """

    window_frames: int | None
    overlap_frames: int
    to_full: float
    block_to_full: float
    to_recording: float
    seam: float
    frames_per_block: int | None


@dataclass(frozen=True)
class Curve:
    """Attributes:
    windows, overlaps: the one with the overlap of the default, the other with its window.
    other_noise: distance of two streams with full context from unlike noise: what the choice of noise alone does.
    """

    flow: dict[str, Any]
    reply_s: float
    num_replies: int
    num_steps: int
    windows: tuple[Point, ...]
    overlaps: tuple[Point, ...]
    other_noise: float
    machine: dict[str, Any]


def measure(
    flow: ReleasedFlow,
    tokens: Padded,
    mels: Sequence[Tensor],
    windows: Sequence[int] = WINDOWS,
    overlaps: Sequence[int] = OVERLAPS,
    num_steps: int = 10,
) -> Curve:
    """The curve over the windows with the default overlap, and over the overlaps with the default window.

    Args:
        tokens: (B, N) int64.
        mels: the recorded natural-log mel (T_b, M) of each row.
    """
    default = Streaming((BLOCK_TOKENS,))
    with torch.inference_mode():
        whole = dataclasses.replace(default, window_frames=None)
        full = _stream(flow, tokens, whole, num_steps)
        other = _stream(flow, tokens, whole, num_steps, seed=1)
        points = [_point(flow, tokens, mels, whole, full, num_steps)]
        for window in windows:
            streaming = dataclasses.replace(default, window_frames=window)
            points.append(_point(flow, tokens, mels, streaming, full, num_steps))
        by_overlap = []
        for overlap in overlaps:
            streaming = dataclasses.replace(default, overlap_frames=overlap)
            reference = _stream(flow, tokens, dataclasses.replace(whole, overlap_frames=overlap), num_steps)
            by_overlap.append(_point(flow, tokens, mels, streaming, reference, num_steps))
    return Curve(
        flow=to_mapping(flow.config),
        reply_s=float(tokens.lengths.sum()) / rates.TOKEN_RATE,
        num_replies=len(tokens.lengths),
        num_steps=num_steps,
        windows=tuple(points),
        overlaps=tuple(by_overlap),
        other_noise=_distance(full.mels, other.mels),
        machine=machine.describe(),
    )


@dataclass(frozen=True)
class _Streamed:
    """Mels (T_b, M) of the rows, the states before each block, what each block gave, and where it began (B,)."""

    mels: list[Tensor]
    states: list[ReleasedFlowState]
    blocks: list[Padded]
    starts: list[Tensor]


def _stream(flow: ReleasedFlow, tokens: Padded, streaming: Streaming, num_steps: int, seed: int = 0) -> _Streamed:
    state = flow.init_state(len(tokens.lengths), num_steps=num_steps, seed=seed, streaming=streaming)
    states, blocks, starts = [], [], []
    for block in _blocks(tokens):
        states.append(copy.deepcopy(state))
        starts.append(state.num_given)
        blocks.append(flow.step(block, state))
    mels = Padded.concat([*blocks, flow.flush(state)]).rows()
    return _Streamed(mels, states, blocks, starts)


def _blocks(tokens: Padded) -> list[Padded]:
    pieces = []
    for at in range(0, tokens.values.shape[1], BLOCK_TOKENS):
        values = tokens.values[:, at : at + BLOCK_TOKENS]
        pieces.append(Padded(values, (tokens.lengths - at).clamp(0, values.shape[1])))
    return pieces


def _point(
    flow: ReleasedFlow, tokens: Padded, mels: Sequence[Tensor], streaming: Streaming, full: _Streamed, num_steps: int
) -> Point:
    made = _stream(flow, tokens, streaming, num_steps)
    single, wanted = [], []
    for block, state, expected in zip(_blocks(tokens), full.states, full.blocks, strict=True):
        fork = dataclasses.replace(copy.deepcopy(state), streaming=(streaming,))
        if streaming.window_frames is not None:
            fork.mel = last_of(fork.mel, fork.mel.lengths.clamp(max=streaming.window_frames + 1))
        single += flow.step(block, fork).rows()
        wanted += expected.rows()
    borders = [{int(start[row]) for start in made.starts[1:]} for row in range(len(made.mels))]
    per_block = rates.frames_for_tokens(BLOCK_TOKENS) + streaming.overlap_frames
    return Point(
        window_frames=streaming.window_frames,
        overlap_frames=streaming.overlap_frames,
        to_full=_distance(made.mels, full.mels),
        block_to_full=_distance(single, wanted),
        to_recording=_distance(made.mels, mels),
        seam=_seam(made.mels, borders),
        frames_per_block=None if streaming.window_frames is None else per_block + streaming.window_frames,
    )


def _distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    errors = [(a - b).abs().mean(1) for a, b in zip(one, other, strict=True)]
    return float(torch.cat(errors).mean())


def _seam(mels: Sequence[Tensor], borders: Sequence[set[int]]) -> float:
    """Mean step into the first frames of blocks over the mean step elsewhere."""
    at: list[float] = []
    elsewhere: list[float] = []
    for mel, places in zip(mels, borders, strict=True):
        for frame, step in enumerate(mel.diff(dim=0).abs().mean(1).tolist(), start=1):
            (at if frame in places else elsewhere).append(step)
    return (sum(at) / len(at)) / (sum(elsewhere) / len(elsewhere))


def held_out(stage: FlowStage, num_tokens: int, num_replies: int) -> tuple[Padded, list[Tensor]]:
    """Tokens (B, N) and mels of held-out clips, joined to replies of about so many tokens."""
    chosen: list[TrainingUtterance] = sorted(join(stage.valid, num_tokens), key=lambda one: -one.num_tokens)[
        :num_replies
    ]
    return stage.whole(chosen)


def draw(curve: Curve, path: Path) -> None:
    """The distances over the window, with what other noise does for comparison."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    points = [point for point in curve.windows if point.window_frames is not None]
    windows = [point.window_frames or 0 for point in points]
    axes.plot(windows, [point.to_full for point in points], marker=".", label="whole stream, to full context")
    axes.plot(windows, [point.block_to_full for point in points], marker=".", label="single block, to full context")
    axes.plot(windows, [point.to_recording for point in points], marker=".", label="whole stream, to the recording")
    axes.axhline(curve.windows[0].to_recording, color="C2", linestyle=":", label="full context, to the recording")
    axes.axhline(curve.other_noise, color="black", linestyle="--", linewidth=1, label="full context, other noise")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("window of past frames (86 a second)")
    axes.set_ylabel("log-mel distance")
    axes.set_title(f"released architecture: {curve.num_replies} replies, {curve.reply_s:.0f} s in blocks of 25 tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The curve of distances over the window of past frames.")
    parser.add_argument("--run", type=Path, default=RUN, help="folder of the training")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--out", type=Path, default=RUN.parent)
    parser.add_argument("--tokens", type=int, default=250, help="of a reply")
    parser.add_argument("--replies", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="of the solver")
    args = parser.parse_args(argv)
    recipe = dataclasses.replace(load_config(args.recipe, FlowRecipe), num_valid_clips=10_000)
    flow = load_component(args.run / "final" / "flow", ReleasedFlow, ReleasedFlowConfig).eval()
    tokens, mels = held_out(FlowStage(recipe), args.tokens, args.replies)
    curve = measure(flow, tokens, mels, num_steps=args.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "context.json", dataclasses.asdict(curve))
    draw(curve, args.out / "context.png")
    for point in (*curve.windows, *curve.overlaps):
        window = "all" if point.window_frames is None else point.window_frames
        print(
            f"window {window:>4}, overlap {point.overlap_frames:2}: to full {point.to_full:.4f}, single block "
            f"{point.block_to_full:.4f}, to the recording {point.to_recording:.4f}, seam {point.seam:.3f}"
        )
    print(f"other noise: {curve.other_noise:.4f}")


if __name__ == "__main__":
    main()
