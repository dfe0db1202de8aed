"""The released token encoder: a block-causal conformer without convolutions, with ESPnet's relative positions.

Keys and values of closed blocks are cached, so streaming is exact. Modules have the names of the released state dict,
`encoder.*` of flow.pt (docs/checkpoints.md 3.2 step 3 and 3.4). The config has the names of config.yaml.

Shapes: B batch, T tokens, W cached tokens, D width, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from duologue.layers import AttentionCache, Padded, attention_mask, drop_padding, roll_in


@dataclass(frozen=True)
class ConformerConfig:
    """The `flow.encoder` of config.yaml; the defaults are the published sizes.

    Fields with one choice are fixed switches of the released code. Dropout applies in training only.
    """

    input_size: int = 512
    output_size: int = 512
    attention_heads: int = 8
    linear_units: int = 2048
    num_blocks: int = 6
    block_size: int = 10
    dropout_rate: float = 0.1
    positional_dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    normalize_before: Literal[True] = True
    input_layer: Literal["linear"] = "linear"
    pos_enc_layer_type: Literal["rel_pos_espnet"] = "rel_pos_espnet"
    selfattention_layer_type: Literal["block_rel_selfattn"] = "block_rel_selfattn"
    activation_type: Literal["swish"] = "swish"
    use_cnn_module: Literal[False] = False
    macaron_style: Literal[False] = False

    def __post_init__(self) -> None:
        for name in ("input_size", "output_size", "attention_heads", "linear_units", "num_blocks", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.output_size % self.attention_heads or self.output_size % 2:
            raise ValueError(
                f"output_size {self.output_size} must be even and a multiple of attention_heads {self.attention_heads}"
            )


def relative_positions(furthest: int, num_tokens: int, width: int, like: Tensor) -> Tensor:
    """Returns sinusoids of the distances `furthest` .. -(T - 1): (furthest + T, D), sines at even indices."""
    distance = torch.arange(furthest, -num_tokens, -1, device=like.device, dtype=torch.float32)
    scale = torch.exp(torch.arange(0, width, 2, device=like.device) * -(math.log(10000.0) / width))
    angle = distance[:, None] * scale  # (furthest + T, D / 2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(like.dtype)


@dataclass
class ConformerState:
    """Streaming state of the conformer.

    Attributes:
        start: (B,) tokens of closed blocks.
        layers: their keys and values, one cache per layer.
    """

    start: Tensor
    layers: list[AttentionCache]


@dataclass(frozen=True)
class AttentionPlan:
    """Positions, mask and cache widths shared by all layers of one step.

    Attributes:
        positions: (W + 2 T - 1, D), see `relative_positions`.
        mask: (B, 1, T, W + T) bool, see `layers.attention_mask`.
        closed: (B,) new tokens to cache.
        width: of the new caches.
    """

    positions: Tensor
    mask: Tensor
    closed: Tensor
    width: int


class RelativeAttention(nn.Module):
    """Self-attention with relative positions: ((q + u) k + (q + v) p) / sqrt(D / H)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(num_heads, width // num_heads))
        self.pos_bias_v = nn.Parameter(torch.empty(num_heads, width // num_heads))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)

    def forward(self, x: Tensor, plan: AttentionPlan, cache: AttentionCache) -> Tensor:
        """Attends over x (B, T, D) and the cache, and caches the closed blocks."""
        time = x.shape[1]
        heads = (self.num_heads, -1)
        query = self.linear_q(x).unflatten(-1, heads)  # (B, T, H, D / H)
        key = Padded(self.linear_k(x).unflatten(-1, heads), plan.closed)
        value = Padded(self.linear_v(x).unflatten(-1, heads), plan.closed)
        keys, cache.keys = roll_in(cache.keys.to(x.dtype), key, plan.width)
        values, cache.values = roll_in(cache.values.to(x.dtype), value, plan.width)
        place = self.linear_pos(plan.positions).unflatten(-1, heads).permute(1, 2, 0)  # (H, D / H, W + 2 T - 1)
        scale = query.shape[-1] ** -0.5
        by_distance = (query + self.pos_bias_v).transpose(1, 2) @ place  # (B, H, T, W + 2 T - 1)
        # The distance W + i - j from query i to key j (possibly cached) has index T - 1 - i + j.
        query_index = torch.arange(time, device=x.device)
        key_index = torch.arange(keys.shape[1], device=x.device)
        index = time - 1 - query_index[:, None] + key_index
        bias = by_distance.gather(-1, index.expand(*by_distance.shape[:2], -1, -1)) * scale
        bias = bias.masked_fill(~plan.mask, -torch.inf)
        query = (query + self.pos_bias_u).transpose(1, 2)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        out = functional.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scale)
        return self.linear_out(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class ConformerFeedForward(nn.Module):
    def __init__(self, width: int, ffn_dim: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, ffn_dim)
        self.w_2 = nn.Linear(ffn_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(functional.silu(self.w_1(x)))  # type: ignore[no-any-return]


class ConformerLayer(nn.Module):
    """A pre-norm layer of attention and feed-forward."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.self_attn = RelativeAttention(config.output_size, config.attention_heads)
        self.feed_forward = ConformerFeedForward(config.output_size, config.linear_units)
        self.norm_mha = nn.LayerNorm(config.output_size, eps=1e-5)
        self.norm_ff = nn.LayerNorm(config.output_size, eps=1e-5)

    def forward(self, x: Tensor, plan: AttentionPlan, cache: AttentionCache) -> Tensor:
        x = x + self.self_attn(self.norm_mha(x), plan, cache)
        return x + self.feed_forward(self.norm_ff(x))  # type: ignore[no-any-return]


class LinearEmbedding(nn.Module):
    """Linear and LayerNorm, `embed.out.0` and `embed.out.1`."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(width_in, width), nn.LayerNorm(width, eps=1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)  # type: ignore[no-any-return]


class BlockConformer(nn.Module):
    """Embedded tokens (B, T, input_size) -> (B, T, output_size).

    A token sees the past and its own block of `block_size` tokens. Outputs of closed blocks are final; those of an open
    block change.
    """

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = LinearEmbedding(config.input_size, config.output_size)
        self.encoders = nn.ModuleList(ConformerLayer(config) for _ in range(config.num_blocks))
        self.after_norm = nn.LayerNorm(config.output_size, eps=1e-5)

    def init_state(self, batch_size: int) -> ConformerState:
        weight, config = self.after_norm.weight, self.config
        empty = weight.new_zeros(batch_size, 0, config.attention_heads, config.output_size // config.attention_heads)
        start = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        return ConformerState(start, [AttentionCache(empty, empty) for _ in self.encoders])

    def step(self, x: Padded, state: ConformerState, max_cached: int | None = None) -> Padded:
        """Encodes tokens (B, T, input_size) after the closed blocks -> (B, T, output_size).

        Only closed blocks enter the state; tokens of an open block must be given again.

        Args:
            max_cached: maximum cached tokens; None for all, as in the released code.
        """
        block_size, width = self.config.block_size, self.config.output_size
        closed = x.lengths // block_size * block_size
        cached = drop_padding(state.layers, state.start)
        mask = attention_mask(state.start, x, cached, lambda token: token // block_size)
        kept = int((state.start + closed).max())
        h = self.embed(x.values) * math.sqrt(width)
        positions = relative_positions(cached + h.shape[1] - 1, h.shape[1], width, h)
        plan = AttentionPlan(positions, mask, closed, kept if max_cached is None else min(kept, max_cached))
        for layer, cache in zip(self.encoders, state.layers, strict=True):
            h = layer(h, plan, cache)
        state.start = state.start + closed
        return Padded(self.after_norm(h), x.lengths)

    def forward(self, x: Padded) -> Padded:
        """Encodes a whole utterance (B, T, input_size) -> (B, T, output_size)."""
        return self.step(x, self.init_state(len(x.lengths)))
