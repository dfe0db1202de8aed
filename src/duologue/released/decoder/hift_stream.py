"""HiFT as a streaming stage, equal to the offline pass for any chunking.

The receptive field is 5 frames for the pitch and 14 for the wav on either side. A step recomputes this context and
holds back as many frames at the end. The phase continues in float64 (float32 on mps), and noise is a function of seed
and absolute sample.

Shapes: B batch, T mel frames, S samples (256 T), M mels, K harmonics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from duologue.decoder.flow import noise_at
from duologue.layers import Padded, reset_rows, split_at, take
from duologue.released.decoder.hift import HiFT, exact_cycles, phase_dtype, released_cycles

# Streams of noise apart from each other and from the flow's.
_NOISE_SEED, _PHASE_SEED = 0x1F123BB5, 0x5851F42D


@dataclass
class HiFTState:
    """Streaming state of the vocoder.

    Attributes:
        mel: (B, T, M) frames without final pitch, after `num_pitched` (B,) frames of context.
        voiced: (B, T, M) frames without final wav, after `num_spoken` (B,) frames of context.
        source: (B, S) source of the frames of `voiced`.
        cycles: (B,) cycles of the fundamental so far, modulo 1, in `phase_dtype`.
        position: (B,) int64 frames with a source.
        seed: (B,) int64 seed of noise and initial phases.
    """

    mel: Padded
    num_pitched: Tensor
    voiced: Padded
    source: Padded
    num_spoken: Tensor
    cycles: Tensor
    position: Tensor
    seed: Tensor


class HiFTVocoder(nn.Module):
    """Natural-log mel (B, T, M) -> wav (B, 256 T) at 22.05 kHz, a streaming stage that holds back 19 frames."""

    def __init__(self, network: HiFT) -> None:
        super().__init__()
        self.network = network

    @property
    def lookahead_frames(self) -> int:
        """Frames held back by a step."""
        return self.network.config.pitch_reach + self.network.config.reach

    def init_state(self, batch_size: int, seed: int = 0) -> HiFTState:
        """Returns a fresh state; `state.seed` holds one seed per row."""
        like = self.network.m_source.l_linear.weight
        zeros = torch.zeros(batch_size, dtype=torch.int64, device=like.device)
        empty = Padded(like.new_zeros(batch_size, 0, self.network.config.in_channels), zeros)
        return HiFTState(
            mel=empty,
            num_pitched=zeros,
            voiced=empty,
            source=Padded(like.new_zeros(batch_size, 0), zeros),
            num_spoken=zeros,
            cycles=zeros.to(phase_dtype(like.device)),
            position=zeros,
            seed=zeros + seed,
        )

    def step(self, x: Padded, state: HiFTState) -> Padded:
        """Decodes mel (B, T, M) and returns final samples (B, S)."""
        return self._run(x, state, torch.zeros_like(state.position, dtype=torch.bool))

    def flush(self, state: HiFTState, rows: Tensor | None = None) -> Padded:
        """Ends the utterance and returns the samples held back. Rows keep their seeds."""
        rows = torch.ones_like(state.position, dtype=torch.bool) if rows is None else rows
        nothing = Padded(state.mel.values[:, :0], torch.zeros_like(state.position))
        wav = self._run(nothing, state, rows)
        fresh = self.init_state(len(rows))
        fresh.seed = state.seed
        reset_rows(state, fresh, rows)
        return wav

    def forward(self, x: Padded, state: HiFTState | None = None) -> Padded:
        """Decodes mel (B, T, M) to wav (B, 256 T) in one pass, equal to a stream."""
        state = self.init_state(len(x.lengths)) if state is None else state
        wav = self._run(x, state, torch.ones_like(state.position, dtype=torch.bool))
        reset_rows(state, self.init_state(len(x.lengths)), torch.ones_like(state.position, dtype=torch.bool))
        return wav

    def _run(self, x: Padded, state: HiFTState, ending: Tensor) -> Padded:
        hop = self.network.config.hop_length
        mel, source = self._make_source(x, state, ending)
        mel = Padded.concat([state.voiced, mel])
        source = Padded.concat([state.source, source])
        first, count, drop = _window(mel.lengths, state.num_spoken, self.network.config.reach, ending)
        wav = Padded(source.values[:, :0], torch.zeros_like(count))
        if bool(count.any()):
            time = int(mel.lengths.max())
            whole = Padded(mel.values[:, :time], mel.lengths)
            wav = _cut(self.network.wave(whole, source.values[:, : time * hop]), first * hop, count * hop)
        state.voiced = split_at(mel, drop)[1]
        state.source = split_at(source, drop * hop)[1]
        state.num_spoken = first + count - drop
        return wav

    def _make_source(self, x: Padded, state: HiFTState, ending: Tensor) -> tuple[Padded, Padded]:
        """Returns the frames whose pitch became final (B, T, M), and their source (B, 256 T)."""
        config = self.network.config
        mel = Padded.concat([state.mel, x])
        first, count, drop = _window(mel.lengths, state.num_pitched, config.pitch_reach, ending)
        state.mel, state.num_pitched = split_at(mel, drop)[1], first + count - drop
        new = _cut(mel.values, first, count)
        if not new.values.shape[1]:
            return new, Padded(new.values.new_zeros(new.values.shape[:2]), count)
        pitch = _cut(self.network.pitch(mel), first, count)
        cycles, after = exact_cycles(
            pitch.values, state.cycles, config.hop_length, config.num_harmonics, config.sampling_rate
        )
        sample = torch.arange(cycles.shape[1], device=count.device) + state.position[:, None] * config.hop_length
        noise = noise_at(state.seed ^ _NOISE_SEED, sample, config.num_harmonics).to(cycles.dtype)
        source = self.network.source(pitch.values, cycles, self._start(state.seed).to(cycles.dtype), noise)
        last = take(after, (count - 1).clamp(min=0)[:, None])[:, 0]
        state.cycles = torch.where(count > 0, last, state.cycles)
        state.position = state.position + count
        return new, Padded(source, count * config.hop_length)

    def _start(self, seed: Tensor) -> Tensor:
        """Returns random initial phases (B, K) of the harmonics; that of the fundamental is 0."""
        normal = noise_at(seed ^ _PHASE_SEED, torch.zeros_like(seed)[:, None], self.network.config.num_harmonics)[:, 0]
        phase = (2 * torch.special.ndtr(normal) - 1) * math.pi
        return torch.cat([torch.zeros_like(phase[:, :1]), phase[:, 1:]], 1)


def _window(lengths: Tensor, num_done: Tensor, reach: int, ending: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the first output frame, the number of final frames and the number to drop afterwards, all (B,).

    The buffer begins with `num_done` frames of context.
    """
    count = (lengths - num_done - torch.where(ending, 0, reach)).clamp(min=0)
    return num_done, count, (num_done + count - reach).clamp(min=0)


def _cut(values: Tensor, first: Tensor, count: Tensor) -> Padded:
    """Returns rows `values[b, first[b] : first[b] + count[b]]`, left-aligned."""
    index = first[:, None] + torch.arange(int(count.max()), device=first.device)
    return Padded(take(values, index.clamp(max=max(values.shape[1] - 1, 0))), count)


def speak_as_released(
    network: HiFT, mel: Tensor, start: Tensor, noise: Tensor, cached_source: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs one call of the released vocoder, for parity (docs/checkpoints.md 3.6), with fresh phases and float32 sums.

    Args:
        mel: (1, T, M).
        start: (1, K) phases in radians; that of the fundamental counts as 0.
        noise: (1, S, K) standard normal.
        cached_source: (1, N) replaces the first samples of the source, N = 0 for none.

    Returns:
        wav (1, S) and source (1, S).
    """
    config = network.config
    whole = Padded.full(mel)
    pitch = network.pitch(whole)
    cycles = released_cycles(pitch, config.hop_length, config.num_harmonics, config.sampling_rate)
    start = torch.cat([torch.zeros_like(start[:, :1]), start[:, 1:]], 1)
    source = network.source(pitch, cycles, start, noise)
    source = torch.cat([cached_source, source[:, cached_source.shape[1] :]], 1)
    return network.wave(whole, source), source
