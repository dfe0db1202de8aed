"""CausalTransformer: the velocity estimator of the flow, streaming exactly.

Shapes: B batch, T frames, G guidance branches (conditional and optionally unconditional), M mels, D width, H heads, C
condition channels, S speaker channels. The branches share weights and mask within one call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from duologue import rates
from duologue.decoder.encoder import block_of_frame, frames_for_tokens
from duologue.layers import AttentionCache, Padded, attend, attention_mask, roll_in, rotate

BLOCK_FRAMES = -(-rates.BLOCK_TOKENS * rates.FRAMES_PER_TOKEN.numerator // rates.FRAMES_PER_TOKEN.denominator)  # 69


@dataclass(frozen=True)
class EstimatorConfig:
    """Sizes of the estimator. Recipes hold the sizes of trained models.

    Attributes:
        past_blocks: number of visible past blocks of 10 tokens (68 or 69 frames); None for all, with a growing state.
        kernel_size: of the causal depthwise convolution before each attention, in frames.
        time_dim: number of sinusoids of the flow's time.
    """

    width: int = 160
    num_heads: int = 5
    ffn_dim: int = 480
    num_layers: int = 5
    kernel_size: int = 5
    past_blocks: int | None = 2
    time_dim: int = 128


@dataclass
class EstimatorCache:
    """Caches of one solver step, per layer: keys and values (B, W, G H, D / H), convolution inputs (B, K - 1, G, D)."""

    attention: list[AttentionCache]
    convolution: list[Tensor]


@dataclass(frozen=True)
class Span:
    """Frames of one call: lengths (B,), absolute positions (B, T) and attention mask."""

    lengths: Tensor
    positions: Tensor
    mask: Tensor


class EstimatorLayer(nn.Module):
    """Depthwise causal convolution, block-causal attention and feed-forward, modulated by the time."""

    def __init__(self, config: EstimatorConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.context = None if config.past_blocks is None else config.past_blocks * BLOCK_FRAMES
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.convolution = nn.Conv1d(width, width, config.kernel_size, groups=width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, width)
        # Added to what all layers share: shift, scale and gate of both halves.
        self.modulation = nn.Parameter(torch.zeros(6, width))
        for last in (self.out, self.fc2):
            nn.init.normal_(last.weight, std=1.0 / math.sqrt(2 * config.num_layers * last.in_features))

    def step(
        self, x: Tensor, span: Span, modulation: Tensor, attention: AttentionCache, convolution: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Applies the layer to x (B, T, G, D) with modulation (B, 6, D); returns it and the new convolution cache."""
        parts = (modulation + self.modulation.to(modulation.dtype))[:, :, None, None].unbind(1)  # each (B, 1, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        branches = x.shape[2]
        h = torch.addcmul(shift1, self.norm1(x), 1 + scale1)
        joined, convolution = roll_in(convolution.to(h.dtype), Padded(h, span.lengths), convolution.shape[1])
        h = h + self._convolve(joined)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).flatten(2, 3)  # (B, T, G H, D / H)
            for part in self.qkv(h).chunk(3, -1)
        )
        key = Padded(rotate(key, span.positions), span.lengths)
        attended = attend(rotate(query, span.positions), key, value, attention, span.mask, self.context)
        x = torch.addcmul(x, 1 + gate1, self.out(attended.unflatten(-1, (branches, -1))))
        h = torch.addcmul(shift2, self.norm2(x), 1 + scale2)
        x = torch.addcmul(x, 1 + gate2, self.fc2(functional.gelu(self.fc1(h))))
        return x, convolution

    def _convolve(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1).flatten(0, 1)  # (B G, D, K - 1 + T)
        return self.convolution(rows).unflatten(0, (x.shape[0], x.shape[2])).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class CausalTransformer(nn.Module):
    """Velocity estimator over 86 frames/s, block-causal with a sliding window of past blocks."""

    def __init__(self, config: EstimatorConfig, num_mels: int, condition_dim: int, speaker_dim: int) -> None:
        super().__init__()
        if config.width % config.num_heads or config.width // config.num_heads % 2:
            raise ValueError(f"estimator width {config.width} must be an even multiple of num_heads {config.num_heads}")
        self.config = config
        width = config.width
        self.embed = nn.Linear(num_mels, width)
        self.context = nn.Linear(condition_dim + speaker_dim + num_mels, width, bias=False)
        self.time1 = nn.Linear(config.time_dim, width)
        self.time2 = nn.Linear(width, 8 * width)
        self.layers = nn.ModuleList(EstimatorLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.out = nn.Linear(width, num_mels)
        nn.init.zeros_(self.time2.weight)
        nn.init.zeros_(self.time2.bias)

    def init_cache(self, batch_size: int, branches: int) -> EstimatorCache:
        """Returns empty caches of one solver step."""
        config, weight = self.config, self.out.weight
        empty = weight.new_zeros(batch_size, 0, branches * config.num_heads, config.width // config.num_heads)
        edge = weight.new_zeros(batch_size, config.kernel_size - 1, branches, config.width)
        attention = [AttentionCache(empty, empty) for _ in range(config.num_layers)]
        return EstimatorCache(attention, [edge for _ in range(config.num_layers)])

    def span(self, x: Padded, start: Tensor, cache: EstimatorCache) -> Span:
        """Returns the span of frames x (B, T, ...) after tokens 0..start-1, shared by all solver steps."""
        first = frames_for_tokens(start)
        positions = first[:, None] + torch.arange(x.values.shape[1], device=first.device)
        num_cached = cache.attention[0].keys.shape[1] if cache.attention else 0
        return Span(x.lengths, positions, attention_mask(first, x, num_cached, block_of_frame, self.config.past_blocks))

    def embed_context(self, condition: Tensor, speaker: Tensor, prompt: Tensor) -> Tensor:
        """Embeds what all solver steps share: condition (B, T, C), speaker (B, S), prompt mel (B, T, M) -> (B, T, D).

        The unconditional branch uses zeros instead.
        """
        spread = speaker[:, None].expand(-1, condition.shape[1], -1)
        return self.context(torch.cat([condition, spread.to(condition.dtype), prompt.to(condition.dtype)], -1))  # type: ignore[no-any-return]

    def step(self, x: Tensor, time: Tensor, context: Tensor, span: Span, cache: EstimatorCache) -> Tensor:
        """Returns the velocity at one time and updates the cache of this solver step.

        Args:
            x: (B, T, M) x_t of the new frames.
            time: (B,) in [0, 1].
            context: (B, T, G, D) from `embed_context`.

        Returns:
            (B, T, G, M) float32.
        """
        h = self.embed(x)[:, :, None] + context
        modulation = self.time2(functional.silu(self.time1(sinusoids_of(time, self.config.time_dim))))
        modulation = modulation.unflatten(-1, (8, -1))  # (B, 8, D)
        for i, layer in enumerate(self.layers):
            h, cache.convolution[i] = layer.step(  # type: ignore[operator]
                h, span, modulation[:, :6], cache.attention[i], cache.convolution[i]
            )
        shift, scale = modulation[:, 6:, None, None].unbind(1)
        return self.out(torch.addcmul(shift, self.norm(h), 1 + scale)).float()  # type: ignore[no-any-return]


def sinusoids_of(time: Tensor, width: int) -> Tensor:
    """Embeds times (B,) in [0, 1]: (B, width), sines and cosines of 1000 t times 1 .. 1/10000 (docs/checkpoints.md
    3.3)."""
    half = width // 2
    scales = torch.exp(-torch.arange(half, device=time.device) * (math.log(10000.0) / (half - 1)))
    angle = 1000.0 * time.float()[:, None] * scales
    return torch.cat([angle.sin(), angle.cos()], 1)
