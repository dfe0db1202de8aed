"""Benchmark of the released decoder's architecture: a bounded window of past mel against decoding all of it again.

    window      `ReleasedDecoder` as it streams by default: encoder cached, a window of past frames as prompt, U-Net in
                bfloat16; every block of the reply is run
    float32     the same blocks with the U-Net in float32, at two places of the reply
    released    `released_stream`: for each block all tokens so far through encoder and U-Net, in float32, the new
                frames through the vocoder; a few estimator calls at some blocks, multiplied by the solver's steps, and
                a parabola in the number of frames through them for the blocks between

Weights are random: the cost is that of any weights. Guidance is one call of two rows in all modes.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.harness import AIMS, Spread, now
from benchmarks.plots import draw_lines
from duologue import rates
from duologue.decoder.decoder import SpeechDecoderState
from duologue.decoder.flow import state_bytes
from duologue.evaluation.report import Row
from duologue.layers import Padded
from duologue.progress import steps
from duologue.released.decoder.blocks import Streaming
from duologue.released.decoder.decoder import ReleasedDecoder, build_released_decoder
from duologue.released.decoder.flow import NUM_STEPS, ReleasedFlowConfig
from duologue.released.decoder.hift import HiFTConfig
from duologue.released.decoder.hift_stream import speak_as_released

MAX_LAST_OVER_FIRST = 1.2
MIN_SPEEDUP = 6.0
RELEASED_POINTS = 5
RELEASED_CALLS = 3


@dataclass(frozen=True)
class ReleasedDecoderBench:
    """Attributes:
    block_tokens, window_frames, overlap_frames, num_steps: of the runs.
    block_s: seconds of each block of the reply with the window, in order, the vocoder included.
    vocoder_s: of all of them and of the end, the vocoder alone.
    first_full, last: numbers of the first block with a full window and of the last one, counted from 1.
    first_full_s, last_s: the same step again and again from copies of the state before it, in turns.
    float32_s: both places with the U-Net in float32.
    bfloat16_gain: float32 over bfloat16, of both places together, without the vocoder.
    reply_s: the whole reply, its end included; `reply_float32_s` estimated from it and the gain.
    released_block_s: (number of the block, seconds) of the measured ones, the calls multiplied.
    released_calls: estimator calls timed at each of them.
    released_reply_s: all blocks, by the parabola.
    speedup: of the reply over released; `speedup_float32` without what bfloat16 brings.
    state_mb: at the end of the reply, in 10^6 bytes.
    """

    audio_s: float
    block_tokens: int
    window_frames: int
    overlap_frames: int
    num_steps: int
    num_parameters: int
    block_s: tuple[float, ...]
    vocoder_s: float
    first_full: int
    last: int
    first_full_s: Spread
    last_s: Spread
    float32_s: Spread
    last_over_first_full: float
    bfloat16_gain: float
    reply_s: float
    reply_float32_s: float
    released_block_s: tuple[tuple[int, float], ...]
    released_calls: tuple[int, ...]
    released_reply_s: float
    speedup: float
    speedup_float32: float
    state_mb: float

    def rows(self) -> list[Row]:
        """The figures for a terminal."""
        points = ", ".join(f"{index}: {seconds:.1f} s" for index, seconds in self.released_block_s)
        window = f"window of {self.window_frames} frames, bfloat16"
        blocks = f"blocks of {self.block_tokens} tokens, {self.num_steps} solver steps"
        calls = f"{max(self.released_calls)} estimator calls timed at block {points}, and multiplied"
        return [
            Row("reply", "length", self.audio_s, "s", note=blocks),
            Row("model", "parameters", self.num_parameters / 1e6, "M", note="random weights"),
            Row(window, "whole reply", self.reply_s, "s", note=f"{self.overlap_frames} frames held back"),
            Row(window, "vocoder", self.vocoder_s, "s"),
            Row(window, "real-time factor", self.reply_s / self.audio_s),
            self.first_full_s.row(window, f"block {self.first_full}, the first with a full window", "s"),
            self.last_s.row(window, f"block {self.last}, the last", "s"),
            Row(window, "state at the end", self.state_mb, "MB"),
            Row("window, float32", "whole reply", self.reply_float32_s, "s", note=f"from {self.float32_s.num} blocks"),
            Row("window, float32", "bfloat16 gains", self.bfloat16_gain, "x"),
            Row("released mode, float32", "whole reply", self.released_reply_s, "s", note=calls),
            Row("released mode, float32", "over the window in float32", self.speedup_float32, "x"),
            Row(AIMS, "decoder.released.last_over_first_full", self.last_over_first_full, aim=MAX_LAST_OVER_FIRST),
            Row(AIMS, "decoder.released.speedup", self.speedup, aim=MIN_SPEEDUP, aim_is="at least"),
        ]

    def draw(self, figure: Any) -> None:
        """Cost of block k by the sound before it."""
        axes = figure.subplots()
        block_s = self.block_tokens / rates.TOKEN_RATE
        series = {
            "released mode": (
                [block_s * (index - 1) for index, _ in self.released_block_s],
                [seconds for _, seconds in self.released_block_s],
            ),
            f"window of {self.window_frames} frames, bfloat16": (
                [block_s * index for index in range(len(self.block_s))],
                list(self.block_s),
            ),
        }
        title = f"released decoder: cost of a block of {self.block_tokens} tokens"
        draw_lines(axes, series, title, "seconds of the reply before it", "seconds", log=True)


def measure_released_decoder(
    flow: ReleasedFlowConfig,
    vocoder: HiFTConfig,
    seconds: float = 60.0,
    block_tokens: int = 25,
    window_frames: int | None = None,
    overlap_frames: int | None = None,
    num_steps: int = NUM_STEPS,
    repetitions: int = 3,
    budget_s: float = 400.0,
    device: str = "cpu",
) -> ReleasedDecoderBench:
    """Decodes a reply of random tokens, and says on stderr how far it is.

    Args:
        flow, vocoder: sizes.
        window_frames, overlap_frames: those of `Streaming` where None.
        repetitions: of the first block with a full window and of the last one, in each precision.
        budget_s: once so much time is gone, each block of the released mode gets one estimator call instead of three.
    Raises:
        ValueError: fewer than one repetition, or a reply that is over before the window has been full for a block.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions must be at least 1, got {repetitions}")
    usual = Streaming()
    streaming = Streaming(
        (block_tokens,),
        usual.overlap_frames if overlap_frames is None else overlap_frames,
        usual.window_frames if window_frames is None else window_frames,
    )
    deadline = time.monotonic() + budget_s
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        decoder = build_released_decoder(flow, vocoder, streaming).eval()
        decoder.vocoder.network.fuse()
        codes = torch.randint(flow.vocab_size, (1, round(seconds * rates.TOKEN_RATE)))
        run = _Run(decoder.to(device), codes.to(device), block_tokens, num_steps, repetitions)
        return run.measure(deadline)


class _Run:
    """One decoder and the tokens of one reply (1, N)."""

    def __init__(
        self, decoder: ReleasedDecoder, codes: torch.Tensor, size: int, num_steps: int, repetitions: int
    ) -> None:
        self._decoder, self._codes, self._size = decoder, codes, size
        self._num_steps, self._repetitions = num_steps, repetitions
        self._device = codes.device
        streaming = decoder.flow.streaming
        self._window = streaming.window_frames or 0
        frames = self._window + streaming.overlap_frames
        full = (index for index in range(self._num_blocks) if rates.frames_for_tokens(index * size) >= frames)
        self._first_full = next(full, self._num_blocks)
        if self._num_blocks - self._first_full < 2:
            raise ValueError(
                f"a reply of {codes.shape[1]} tokens has {self._num_blocks} blocks of {size}; at least two must follow "
                f"the window of {self._window} frames"
            )

    @property
    def _num_blocks(self) -> int:
        return self._codes.shape[1] // self._size

    def measure(self, deadline: float) -> ReleasedDecoderBench:
        flow, last = self._decoder.flow, self._num_blocks - 1
        flow.estimate_in(torch.bfloat16)
        self._step(0, self._fresh())  # warm-up
        blocks, vocoder_s, end_s, places, state_mb = self._reply()
        half = self._in_turns(places, "window, two blocks again")
        flow.estimate_in(torch.float32)
        full = self._in_turns(places, "float32, the same blocks")
        first_full_s, last_s = (Spread.of([sum(step) for step in half[place]]) for place in (self._first_full, last))
        gain = statistics.median(_flow_times(full)) / statistics.median(_flow_times(half))
        reply_s = sum(blocks) + end_s
        reply_float32_s = (reply_s - vocoder_s) * gain + vocoder_s
        released = self._released(deadline)
        frames = [rates.frames_for_tokens(self._size * index) for index in range(1, self._num_blocks + 1)]
        released_reply_s = _parabola(
            [frames[index - 1] for index, _, _ in released], [seconds for _, seconds, _ in released], frames
        )
        streaming = flow.streaming
        ratio = last_s.median / first_full_s.median
        speedup = released_reply_s / reply_s
        return ReleasedDecoderBench(
            audio_s=rates.speak_samples_for_tokens(self._codes.shape[1]) / rates.SPEAK_SAMPLE_RATE,
            block_tokens=self._size,
            window_frames=self._window,
            overlap_frames=streaming.overlap_frames,
            num_steps=self._num_steps,
            num_parameters=sum(parameter.numel() for parameter in self._decoder.parameters()),
            block_s=tuple(blocks),
            vocoder_s=vocoder_s,
            first_full=self._first_full + 1,
            last=last + 1,
            first_full_s=first_full_s,
            last_s=last_s,
            float32_s=Spread.of([sum(step) for steps in full.values() for step in steps]),
            last_over_first_full=ratio,
            bfloat16_gain=gain,
            reply_s=reply_s,
            reply_float32_s=reply_float32_s,
            released_block_s=tuple((index, seconds) for index, seconds, _ in released),
            released_calls=tuple(calls for _, _, calls in released),
            released_reply_s=released_reply_s,
            speedup=speedup,
            speedup_float32=released_reply_s / reply_float32_s,
            state_mb=state_mb,
        )

    def _fresh(self) -> SpeechDecoderState:
        return self._decoder.init_state(1, num_steps=self._num_steps)

    def _step(self, index: int, state: SpeechDecoderState) -> tuple[float, float]:
        """Seconds of flow and vocoder for one block."""
        tokens = Padded.full(self._codes[:, index * self._size : (index + 1) * self._size])
        start = now(self._device)
        mel = self._decoder.flow.step(tokens, state.flow)
        middle = now(self._device)
        self._decoder.vocoder.step(mel, state.vocoder)
        return middle - start, now(self._device) - middle

    def _reply(self) -> tuple[list[float], float, float, dict[int, SpeechDecoderState], float]:
        """Seconds of each block, of the vocoder in all, of the end; states before the two places; size in MB."""
        state, blocks, vocoder_s = self._fresh(), [], 0.0
        places: dict[int, SpeechDecoderState] = {}
        for index in steps(range(self._num_blocks), "window, all blocks"):
            if index in (self._first_full, self._num_blocks - 1):
                places[index] = copy.deepcopy(state)
            flow_s, spoken_s = self._step(index, state)
            blocks.append(flow_s + spoken_s)
            vocoder_s += spoken_s
        state_mb = state_bytes(state) / 1e6
        start = now(self._device)
        rest = Padded.full(self._codes[:, self._num_blocks * self._size :])
        mel = Padded.concat([self._decoder.flow.step(rest, state.flow), self._decoder.flow.flush(state.flow)])
        middle = now(self._device)
        self._decoder.vocoder.step(mel, state.vocoder)
        self._decoder.vocoder.flush(state.vocoder)
        end_s = now(self._device) - start
        return blocks, vocoder_s + end_s - (middle - start), end_s, places, state_mb

    def _in_turns(self, places: dict[int, SpeechDecoderState], text: str) -> dict[int, list[tuple[float, float]]]:
        """Seconds of flow and vocoder at each place, in turns: a busy moment of the machine hits all of them."""
        taken: dict[int, list[tuple[float, float]]] = {index: [] for index in places}
        for _ in steps(range(self._repetitions), text):
            for index, state in places.items():
                taken[index].append(self._step(index, copy.deepcopy(state)))
        return taken

    def _released(self, deadline: float) -> list[tuple[int, float, int]]:
        """Number of the block from 1, its seconds in the released mode, and how many calls were timed."""
        flow, config = self._decoder.flow, self._decoder.flow.config
        indices = sorted({round(x) for x in np.linspace(1, self._num_blocks, min(RELEASED_POINTS, self._num_blocks))})
        speaker = torch.zeros(1, config.spk_embed_dim, device=self._device)
        points = []
        for index in steps(indices, "released mode, some blocks"):
            start = now(self._device)
            mu = flow.condition(Padded.full(self._codes[:, : index * self._size]))
            condition_s = now(self._device) - start
            num_new = rates.frames_for_tokens(self._size)
            prompt = Padded.full(mu.values[:, : mu.values.shape[1] - num_new])
            calls: list[float] = []
            while not calls or (len(calls) < RELEASED_CALLS and time.monotonic() < deadline):
                start = now(self._device)
                mel = flow.solve(mu, speaker, prompt, torch.randn_like(mu.values), 1, config.solver.inference_cfg_rate)
                calls.append(now(self._device) - start)
            start = now(self._device)
            self._speak(mel[:, -num_new:])
            spoken_s = now(self._device) - start
            points.append((index, condition_s + self._num_steps * statistics.median(calls) + spoken_s, len(calls)))
        return points

    def _speak(self, mel: torch.Tensor) -> None:
        network = self._decoder.vocoder.network
        harmonics = network.config.num_harmonics
        noise = torch.randn(1, mel.shape[1] * network.config.hop_length, harmonics, device=mel.device)
        phase = torch.zeros(1, harmonics, device=mel.device)
        speak_as_released(network, mel, phase, noise, torch.zeros(1, 0, device=mel.device))


def _flow_times(taken: dict[int, list[tuple[float, float]]]) -> list[float]:
    return [flow_s for steps in taken.values() for flow_s, _ in steps]


def _parabola(x: Sequence[float], y: Sequence[float], at: Sequence[float]) -> float:
    """Sum over all places of the parabola through the points, by least squares of the relative error."""
    weights = 1 / np.asarray(y)
    return float(np.polyval(np.polyfit(x, y, min(2, len(x) - 1), w=weights), at).sum())
