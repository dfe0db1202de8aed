"""The released length regulation: encoded tokens at 12.5/s -> the flow's condition at 86.13 frames/s.

Modules have the names of the released state dict, `length_regulator.*` of flow.pt (docs/checkpoints.md 3.2 step 6).

Shapes: B batch, T frames, N tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from duologue.layers import Padded, take


@dataclass(frozen=True)
class RegulatorConfig:
    """The `flow.length_regulator` of config.yaml: one convolution per ratio; all ratios are 1."""

    channels: int = 80
    sampling_ratios: tuple[int, ...] = field(default=(1, 1, 1, 1))
    out_channels: int | None = None
    groups: int = 1

    def __post_init__(self) -> None:
        if not self.sampling_ratios or set(self.sampling_ratios) != {1}:
            raise ValueError(f"sampling_ratios are {list(self.sampling_ratios)}; only ratios of 1 are known")
        if self.channels < 1 or self.groups < 1 or self.channels % self.groups:
            raise ValueError(f"channels {self.channels} must be a multiple of groups {self.groups}")


class RaggedGroupNorm(nn.GroupNorm):
    """GroupNorm over the valid frames of each row: (B, C, T), mask (B, 1, T) bool or None -> (B, C, T)."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return super().forward(x)
        # Sums over time want more digits than bfloat16 has.
        grouped = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(
            1, (self.num_groups, -1)
        )  # (B, G, C / G, T)
        real = mask[:, None]
        count = mask.sum((1, 2)).clamp(min=1)[:, None, None, None] * grouped.shape[2]
        mean = (grouped * real).sum((2, 3), keepdim=True) / count
        centered = (grouped - mean) * real
        variance = centered.square().sum((2, 3), keepdim=True) / count
        normed = (centered * (variance + self.eps).rsqrt()).flatten(1, 2).to(x.dtype)
        scaled: Tensor = normed * self.weight[:, None] + self.bias[:, None]
        return scaled


def hide(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zeroes the padding of each row."""
    return x if mask is None else x * mask


def mask_of(lengths: Tensor, size: int) -> Tensor | None:
    """Returns (B, 1, T) bool, true on valid frames; None if all rows are full."""
    if bool((lengths == size).all()):
        return None
    return (torch.arange(size, device=lengths.device) < lengths[:, None])[:, None]


def nearest_token(num_tokens: Tensor, num_frames: Tensor) -> Tensor:
    """Returns the token of each frame as torch's nearest interpolation: (B,), (B,) -> (B, T).

    It is floor(i * (n / F)) in float32, whose rounding matters where the quotient is whole.
    """
    frame = torch.arange(int(num_frames.max()), device=num_frames.device, dtype=torch.float32)
    scale = num_tokens.float() / num_frames.clamp(min=1).float()
    return (frame * scale[:, None]).floor().long().minimum(num_tokens[:, None] - 1).clamp(min=0)


class LengthRegulator(nn.Module):
    """Nearest interpolation to the number of frames, then convolutions with GroupNorm and Mish.

    GroupNorm spans all frames, so the condition of old frames changes when tokens are appended.
    """

    def __init__(self, config: RegulatorConfig, num_mels: int) -> None:
        super().__init__()
        channels = config.channels
        layers: list[nn.Module] = []
        for _ in config.sampling_ratios:
            layers += [nn.Conv1d(channels, channels, 3, padding=1), RaggedGroupNorm(config.groups, channels), nn.Mish()]
        self.model = nn.Sequential(*layers, nn.Conv1d(channels, config.out_channels or num_mels, 1))

    def forward(self, x: Padded, num_frames: Tensor) -> Padded:
        """Upsamples x (B, N, C) to (B, T, C) with `num_frames` (B,) int64 frames per row."""
        spread = take(x.values, nearest_token(x.lengths, num_frames)).transpose(1, 2).contiguous()  # (B, C, T)
        mask = mask_of(num_frames, spread.shape[2])
        h = hide(spread, mask)
        for layer in self.model:
            h = layer(h, mask) if isinstance(layer, RaggedGroupNorm) else hide(layer(h), mask)
        return Padded(h.transpose(1, 2), num_frames)
