"""The released estimator: a 1-D U-Net of residual convolutions and transformer blocks over a whole utterance.

Modules have the names of the released state dict, `decoder.estimator.*` of flow.pt (docs/checkpoints.md 3.3 and 3.4).
GroupNorm and attention span all frames, so there is no exact incremental form. Ragged batches equal single runs:
padding is masked as keys and excluded from statistics.

Shapes: B batch, T frames, C channels, M mels, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from duologue.decoder.transformer import sinusoids_of
from duologue.layers import weigh
from duologue.released.decoder.regulator import RaggedGroupNorm, hide

NUM_GROUPS = 8


@dataclass(frozen=True)
class UNetConfig:
    """The `flow.decoder.estimator` of config.yaml; the defaults are the published sizes."""

    in_channels: int = 320
    out_channels: int = 80
    channels: tuple[int, ...] = (256, 256)
    attention_head_dim: int = 64
    n_blocks: int = 4
    num_mid_blocks: int = 12
    num_heads: int = 8
    dropout: float = 0.0
    act_fn: Literal["gelu"] = "gelu"

    def __post_init__(self) -> None:
        if not self.channels or any(width < 1 or width % NUM_GROUPS for width in self.channels):
            raise ValueError(f"channels are {list(self.channels)}; each must be a positive multiple of {NUM_GROUPS}")
        for name in ("in_channels", "out_channels", "attention_head_dim", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.in_channels % 2 or self.in_channels < 4:
            raise ValueError(f"in_channels must be even and at least 4, got {self.in_channels}")
        if self.n_blocks < 0 or self.num_mid_blocks < 0:
            raise ValueError(f"n_blocks {self.n_blocks} and num_mid_blocks {self.num_mid_blocks} must not be negative")


class TimeEmbedding(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(functional.silu(self.linear_1(x)))  # type: ignore[no-any-return]


class ConvBlock(nn.Module):
    """Convolution of width 3, GroupNorm(8) and Mish: (B, C_in, T) -> (B, C_out, T)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(channels_in, channels_out, 3, padding=1), RaggedGroupNorm(NUM_GROUPS, channels_out), nn.Mish()
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        convolution, norm, mish = self.block
        return hide(mish(norm(convolution(hide(x, mask)), mask)), mask)


class ResnetBlock(nn.Module):
    """Two convolution blocks with the time added between them, and a 1x1 residual convolution."""

    def __init__(self, channels_in: int, channels_out: int, time_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(time_dim, channels_out))
        self.block1 = ConvBlock(channels_in, channels_out)
        self.block2 = ConvBlock(channels_out, channels_out)
        self.res_conv = nn.Conv1d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, mask: Tensor | None, time: Tensor) -> Tensor:
        """Applies the block to x (B, C_in, T) and time (B, time_dim): (B, C_out, T)."""
        h = self.block1(x, mask) + self.mlp(time)[:, :, None]
        return self.block2(h, mask) + self.res_conv(hide(x, mask))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Self-attention over all valid frames; q, k and v have no bias."""

    def __init__(self, width: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_dim
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attends over x (B, T, C) with mask (B, 1, T)."""
        query, key, value = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, head_dim)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        keys = None if mask is None else mask[:, None]  # (B, 1, 1, T)
        out = weigh(query, key, value, keys)
        return self.to_out[0](out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class GeluProjection(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width_in, width)

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(self.proj(x))


class UNetFeedForward(nn.Module):
    """Feed-forward with exact GELU; `net.1` is dropout in the released code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GeluProjection(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    def __init__(self, width: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, num_heads, head_dim)
        self.norm3 = nn.LayerNorm(width)
        self.ff = UNetFeedForward(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x), mask)
        return x + self.ff(self.norm3(x))  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Halves the frame rate, rounding up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Doubles the frame rate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(channels, channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


def _level(config: UNetConfig, channels_in: int, channels_out: int, then: nn.Module | None) -> nn.ModuleList:
    """Returns `.0` residual block, `.1` transformer blocks, `.2` rate change."""
    resnet = ResnetBlock(channels_in, channels_out, 4 * config.channels[0])
    blocks = nn.ModuleList(
        TransformerBlock(channels_out, config.num_heads, config.attention_head_dim) for _ in range(config.n_blocks)
    )
    return nn.ModuleList([resnet, blocks] if then is None else [resnet, blocks, then])


def _run(level: nn.Module, x: Tensor, mask: Tensor | None, time: Tensor) -> Tensor:
    """Applies residual and transformer blocks of a level: (B, C_in, T) -> (B, C_out, T)."""
    assert isinstance(level, nn.ModuleList)
    h = level[0](x, mask, time).transpose(1, 2).contiguous()  # (B, T, C)
    for block in level[1]:  # type: ignore[attr-defined]
        h = block(h, mask)
    return h.transpose(1, 2).contiguous()  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Velocity estimator of the flow, given condition, speaker and prompt mel."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        self.time_mlp = TimeEmbedding(config.in_channels, 4 * channels[0])
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(channels):
            last = i == len(channels) - 1
            then = nn.Conv1d(width, width, 3, padding=1) if last else Downsample(width)
            self.down_blocks.append(_level(config, config.in_channels if i == 0 else channels[i - 1], width, then))
        self.mid_blocks = nn.ModuleList(
            _level(config, channels[-1], channels[-1], None) for _ in range(config.num_mid_blocks)
        )
        self.up_blocks = nn.ModuleList()
        upwards = (*channels[::-1], channels[0])
        for i, width in enumerate(upwards[1:]):
            change = nn.Conv1d(width, width, 3, padding=1) if i == len(channels) - 1 else Upsample(width)
            self.up_blocks.append(_level(config, 2 * upwards[i], width, change))
        self.final_block = ConvBlock(upwards[-1], upwards[-1])
        self.final_proj = nn.Conv1d(upwards[-1], config.out_channels, 1)

    def forward(
        self, x: Tensor, t: Tensor, mu: Tensor, speaker: Tensor, prompt: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Predicts the velocity.

        Args:
            x: (B, T, M) x_t.
            t: (B,) in [0, 1].
            mu: (B, T, M) from the length regulator.
            speaker: (B, M).
            prompt: (B, T, M) prompt mel, zeros after it.
            mask: (B, 1, T) bool, true on valid frames, at least one per row; None if all are valid.

        Returns:
            (B, T, M), zeros as padding.
        """
        time = self.time_mlp(sinusoids_of(t, self.config.in_channels).to(x.dtype))
        spread = speaker[:, None].expand(-1, x.shape[1], -1)
        h = torch.cat([x, mu, spread, prompt], -1).transpose(1, 2).contiguous()  # (B, 4 M, T)
        masks, skips = [mask], []
        for i, level in enumerate(self.down_blocks):
            if i:
                masks.append(None if mask is None else masks[-1][:, :, ::2])  # type: ignore[index]
            h = _run(level, h, masks[-1], time)
            skips.append(h)
            h = level[2](hide(h, masks[-1]))  # type: ignore[index]
        for level in self.mid_blocks:
            h = _run(level, h, masks[-1], time)
        for level in self.up_blocks:
            mask, skip = masks.pop(), skips.pop()
            h = _run(level, torch.cat([h[:, :, : skip.shape[2]], skip], 1), mask, time)
            h = level[2](hide(h, mask))  # type: ignore[index]
        h = self.final_block(h, mask)
        return hide(self.final_proj(hide(h, mask)), mask).transpose(1, 2)
