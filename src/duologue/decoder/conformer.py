"""The released token encoder: a block-causal conformer without convolutions, with ESPnet's relative positions.

Modules carry the names of the released state dict, `encoder.*` of flow.pt (checkpoints.md 3.2 step 3 and 3.4); the
configuration carries the names of its config.yaml.

Shapes: B batch, T tokens, D width, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from duologue.layers import Padded


@dataclass(frozen=True)
class ConformerConfig:
    """`flow.encoder` of config.yaml; the defaults are the published sizes.

    Fields with one choice are switches of the released code that the published model leaves in this position; dropout
    counts in training only.
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


def relative_positions(num_tokens: int, width: int, like: Tensor) -> Tensor:
    """Sinusoids of the distances T - 1 down to -(T - 1): (2 T - 1, D), sines at even and cosines at odd places."""
    distance = torch.arange(num_tokens - 1, -num_tokens, -1, device=like.device, dtype=torch.float32)
    scale = torch.exp(torch.arange(0, width, 2, device=like.device) * -(math.log(10000.0) / width))
    angle = distance[:, None] * scale  # (2 T - 1, D / 2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(like.dtype)


def block_causal_mask(tokens: Padded, block_size: int) -> Tensor:
    """(B, 1, T, T) bool: query i sees key j if j <= i or both lie in one block, and j is a real token."""
    place = torch.arange(tokens.values.shape[1], device=tokens.lengths.device)
    query, key = place[:, None], place[None, :]
    seen = (key <= query) | (key // block_size == query // block_size)
    return (seen & tokens.mask[:, None, :])[:, None]


class RelativeAttention(nn.Module):
    """Self-attention whose scores add what the distance says: ((q + u) k + (q + v) p) / sqrt(D / H)."""

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

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """x (B, T, D), positions (2 T - 1, D), mask (B, 1, T, T) -> (B, T, D)."""
        time = x.shape[1]
        heads = (self.num_heads, -1)
        query = self.linear_q(x).unflatten(-1, heads)  # (B, T, H, D / H)
        key = self.linear_k(x).unflatten(-1, heads).transpose(1, 2)
        value = self.linear_v(x).unflatten(-1, heads).transpose(1, 2)
        place = self.linear_pos(positions).unflatten(-1, heads).permute(1, 2, 0)  # (H, D / H, 2 T - 1)
        scale = query.shape[-1] ** -0.5
        by_distance = (query + self.pos_bias_v).transpose(1, 2) @ place  # (B, H, T, 2 T - 1)
        # The distance i - j stands at place T - 1 - i + j.
        index = torch.arange(time, device=x.device)
        index = time - 1 - index[:, None] + index[None, :]
        bias = by_distance.gather(-1, index.expand(*by_distance.shape[:2], -1, -1)) * scale
        bias = bias.masked_fill(~mask, -torch.inf)
        query = (query + self.pos_bias_u).transpose(1, 2)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
        return self.linear_out(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    def __init__(self, width: int, ffn_dim: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, ffn_dim)
        self.w_2 = nn.Linear(ffn_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(functional.silu(self.w_1(x)))  # type: ignore[no-any-return]


class ConformerLayer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.self_attn = RelativeAttention(config.output_size, config.attention_heads)
        self.feed_forward = FeedForward(config.output_size, config.linear_units)
        self.norm_mha = nn.LayerNorm(config.output_size, eps=1e-5)
        self.norm_ff = nn.LayerNorm(config.output_size, eps=1e-5)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm_mha(x), positions, mask)
        return x + self.feed_forward(self.norm_ff(x))  # type: ignore[no-any-return]


class LinearEmbedding(nn.Module):
    """`embed.out.0` and `embed.out.1`: Linear and LayerNorm."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(width_in, width), nn.LayerNorm(width, eps=1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)  # type: ignore[no-any-return]


class BlockConformer(nn.Module):
    """Embedded tokens (B, T, input_size) -> (B, T, output_size).

    A token sees the whole past and its own block of `block_size` tokens, counted from the first token given. So what
    comes out for a closed block does not change when tokens follow; an open block's does. Rows may have any length.
    """

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = LinearEmbedding(config.input_size, config.output_size)
        self.encoders = nn.ModuleList(ConformerLayer(config) for _ in range(config.num_blocks))
        self.after_norm = nn.LayerNorm(config.output_size, eps=1e-5)

    def forward(self, x: Padded) -> Padded:
        width = self.config.output_size
        mask = block_causal_mask(x, self.config.block_size)
        h = self.embed(x.values) * math.sqrt(width)
        positions = relative_positions(h.shape[1], width, h)
        for layer in self.encoders:
            h = layer(h, positions, mask)
        return Padded(self.after_norm(h), x.lengths)
