"""The released decoder's own streaming, defects included: for parity, not for listening.

`ReleasedDecoder` differs. Here the weights of the fade sum to 1.08. At every cut one frame is doubled in the prompt and
lost from the wave, and the phase of the voice starts anew. An utterance without a final block loses its tail
(docs/checkpoints.md 3.7). The noise is that of `torch.manual_seed(42)` on the CPU, from a generator of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from duologue import rates
from duologue.layers import Padded
from duologue.released.decoder.flow import NUM_STEPS, ReleasedFlow
from duologue.released.decoder.hift import HiFT
from duologue.released.decoder.hift_stream import speak_as_released

OVERLAP_TOKENS = 5
OVERLAP_FRAMES = rates.frames_for_tokens(OVERLAP_TOKENS)  # 34
_FLOW_SEED = 42

SourceNoise = Callable[[int, tuple[int, int]], tuple[Tensor, Tensor]]


def released_noise(num_frames: int, num_mels: int = 80) -> Tensor:
    """(1, T, M): what the released code draws on the CPU after seeding the process with 42.

    It draws (1, M, T) in order, so the noise of a frame changes with the number of frames.
    """
    generator = torch.Generator().manual_seed(_FLOW_SEED)
    return torch.randn(1, num_mels, num_frames, generator=generator).transpose(1, 2)


@torch.inference_mode()
def released_mel(
    flow: ReleasedFlow, tokens: Tensor, prompt_tokens: Tensor, prompt_mel: Tensor, speaker: Tensor, noise: Tensor
) -> Tensor:
    """One call of the released flow: the mel after the prompt.

    Args:
        tokens, prompt_tokens: (1, N) integers; below 0 counts as 0.
        prompt_mel: (1, P, M).
        speaker: (1, S).
        noise: (1, T, M) for all frames, those of the prompt included.
    Returns:
        (1, T - P, M).
    """
    whole = torch.cat([prompt_tokens, tokens], 1).long().clamp(min=0)
    mu = flow.condition(Padded.full(whole))
    scale = flow.config.solver.inference_cfg_rate
    mel = flow.solve(mu, speaker, Padded.full(prompt_mel), noise.to(mu.values), NUM_STEPS, scale)
    return mel[:, prompt_mel.shape[1] :]


@dataclass
class ReleasedStreamState:
    """Attributes:
    tokens: (1, N) so far.
    mel: (1, P, M) all that was returned, doubled frames included.
    overlap: (1, 34, M) end of the last block, once there was one.
    last_frame: (1, 1, M) and `last_source` (1, 256), likewise.
    """

    tokens: Tensor
    mel: Tensor
    overlap: Tensor
    last_frame: Tensor
    last_source: Tensor
    num_blocks: int


class ReleasedBlock(NamedTuple):
    """What one block gives: wav (1, S), the mel that the vocoder got (1, T, M), and the flow's before the fade."""

    wav: Tensor
    mel: Tensor
    raw: Tensor


def init_released(flow: ReleasedFlow) -> ReleasedStreamState:
    weight = flow.encoder_proj.weight
    no_mel = weight.new_zeros(1, 0, flow.config.output_size)
    no_tokens = torch.zeros(1, 0, dtype=torch.int64, device=weight.device)
    return ReleasedStreamState(no_tokens, no_mel, no_mel, no_mel, weight.new_zeros(1, 0), 0)


@torch.inference_mode()
def step_released(
    flow: ReleasedFlow,
    network: HiFT,
    tokens: Tensor,
    state: ReleasedStreamState,
    *,
    last: bool,
    noise: Tensor | None = None,
    source_noise: SourceNoise | None = None,
) -> ReleasedBlock:
    """Decodes one block of tokens (1, N) as `AudioDecoder.token2wav` does, always with a speaker of zeros.

    Args:
        noise: (1, T, M) of the flow for all frames so far; the released draw where None.
        source_noise: gives, for the number of the block (from 1) and (samples, harmonics), the starting phases (1, K)
            and the noise (1, S, K) of the source; drawn from the number where None.
    """
    state.num_blocks += 1
    num_frames = rates.frames_for_tokens(state.tokens.shape[1] + tokens.shape[1])
    noise = released_noise(num_frames, flow.config.output_size) if noise is None else noise
    speaker = state.mel.new_zeros(1, flow.config.spk_embed_dim)
    raw = released_mel(flow, tokens, state.tokens, state.mel, speaker, noise)
    mel = _fade(state.overlap, raw)
    mel = torch.cat([state.last_frame, mel], 1)
    if not last:
        state.overlap = mel[:, mel.shape[1] - OVERLAP_FRAMES :]
        mel = mel[:, : mel.shape[1] - OVERLAP_FRAMES]
    size = (mel.shape[1] * network.config.hop_length, network.config.num_harmonics)
    start, additive = (source_noise or _drawn)(state.num_blocks, size)
    wav, source = speak_as_released(network, mel, start.to(mel), additive.to(mel), state.last_source)
    state.tokens = torch.cat([state.tokens, tokens.long()], 1)
    state.mel = torch.cat([state.mel, mel], 1)
    if last:
        fresh = init_released(flow)
        state.overlap, state.last_frame, state.last_source = fresh.overlap, fresh.last_frame, fresh.last_source
        return ReleasedBlock(wav, mel, raw)
    hop = network.config.hop_length
    state.last_frame, state.last_source = mel[:, -1:], source[:, -hop:]
    return ReleasedBlock(wav[:, :-hop], mel, raw)


def _fade(overlap: Tensor, raw: Tensor) -> Tensor:
    """Hamming halves, computed in float64 and summing to 1.08."""
    size = overlap.shape[1]
    if not size:
        return raw
    window = torch.from_numpy(np.hamming(2 * OVERLAP_FRAMES)).to(raw.device)[:, None]
    mixed = raw[:, :size] * window[:size] + overlap * window[OVERLAP_FRAMES:]
    return torch.cat([mixed.to(raw.dtype), raw[:, size:]], 1)


def _drawn(block: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(block)
    phase = torch.pi * (2 * torch.rand(1, size[1], generator=generator) - 1)
    return phase, torch.randn(1, *size, generator=generator)
