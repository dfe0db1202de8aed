"""Steps of a Glm over fixed slots, as variants for the benchmark.

All tensors stay at their addresses and no step waits for the host, so that a step can be captured. The package's own
engine is measured in `language.py`; this one shows what each change alone brings.

Shapes: R rows, D width, H heads, G heads of keys, K head_dim, L positions of a slot, V ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import GlmForCausalLM

FP8 = torch.float8_e4m3fn
FP8_ROWS = 16  # rows of a product in fp8 are padded to a multiple of this


class Matrix(NamedTuple):
    """A weight (out, in) with its bias (out,); in fp8 with its scale, a scalar float32."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None


class LayerWeights(NamedTuple):
    """The weights of one layer; `qkv` is one matrix or three."""

    attention_norm: Tensor
    qkv: tuple[Matrix, ...]
    out: Matrix
    mlp_norm: Tensor
    gate_up: Matrix
    down: Matrix


class Slots:
    """Keys and values of all conversations in one tensor, and one step for one id of each row.

    Args:
        num_slots, length: slots, and positions of each.
        stacked: query, key and value are one product.
        flash: attention is one flash call with lengths on the device; otherwise masked attention over slots 0..R-1.
        fp8: the products of the layers are in fp8, with one scale per tensor.
    """

    def __init__(
        self,
        language: GlmForCausalLM,
        num_slots: int,
        length: int,
        stacked: bool = True,
        flash: bool = True,
        fp8: bool = False,
    ) -> None:
        config = language.config
        self.length, self.flash = length, flash
        self.num_heads, self.num_kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.head_dim, self.eps = int(config.head_dim), float(config.rms_norm_eps)
        inner = language.model
        self.embedding, self.norm, self.head = inner.embed_tokens.weight, inner.norm.weight, language.lm_head.weight
        self.frequencies = inner.rotary_emb.inv_freq.float()
        shape = config.num_hidden_layers, 2, num_slots * length, self.num_kv_heads, self.head_dim
        self.pool = self.head.new_zeros(shape)
        matrix = in_fp8 if fp8 else as_it_is
        self.layers = [_weights(layer, matrix, stacked) for layer in inner.layers]
        self.before, self.after = self._before, self._after

    def fork(self, flash: bool, compiled: bool = False) -> Slots:
        """Returns the same weights and slots with another attention, or with compiled halves of the layer.

        Writing the slots and attention are never compiled: a compiled write could copy all slots.
        """
        other = object.__new__(Slots)
        other.__dict__ |= self.__dict__
        other.flash = flash
        if compiled:
            other.before = torch.compile(self._before, dynamic=False)
            other.after = torch.compile(self._after, dynamic=False)
        return other

    def step(self, ids: Tensor, positions: Tensor, slots: Tensor, bound: int, head: Tensor | None = None) -> Tensor:
        """Runs one id of each row; returns the scores (R, V) of the next.

        Args:
            ids, positions, slots: (R,) int64.
            bound: more than all positions, at most the length of a slot.
            head: rows of the output layer; all by default.
        """
        x = functional.embedding(ids, self.embedding)
        angle = positions[:, None].float() * self.frequencies  # (R, rotated / 2)
        cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
        starts = slots * self.length
        places, lengths = starts + positions, (positions + 1).to(torch.int32)
        row_ends = torch.arange(len(ids) + 1, device=ids.device, dtype=torch.int32)
        # The last bound is never read, because the lengths are given apart.
        key_starts = torch.cat([starts, starts[-1:]]).to(torch.int32)
        for weights, keys_values in zip(self.layers, self.pool, strict=True):
            query, keys, values = self.before(x, weights, cos, sin)
            keys_values[0].index_copy_(0, places, keys)
            keys_values[1].index_copy_(0, places, values)
            attended = self._attend(query, keys_values, row_ends, key_starts, lengths, bound)
            x = self.after(x, attended.flatten(1), weights)
        x = functional.rms_norm(x, x.shape[-1:], self.norm, self.eps)
        return functional.linear(x, self.head if head is None else head)

    def _before(self, x: Tensor, weights: LayerWeights, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns query (R, H, K), keys and values (R, G, K) of x (R, D)."""
        h = functional.rms_norm(x, x.shape[-1:], weights.attention_norm, self.eps)
        joined = torch.cat([product(h, matrix) for matrix in weights.qkv], -1).unflatten(-1, (-1, self.head_dim))
        num_turned = self.num_heads + self.num_kv_heads
        turned, values = joined[:, :num_turned], joined[:, num_turned:]
        rotated = 2 * cos.shape[-1]
        even, odd = turned[..., :rotated:2], turned[..., 1:rotated:2]
        pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
        turned = torch.cat([pairs, turned[..., rotated:]], -1)
        return turned[:, : self.num_heads].contiguous(), turned[:, self.num_heads :], values

    def _after(self, x: Tensor, attended: Tensor, weights: LayerWeights) -> Tensor:
        """Returns the output (R, D) of a layer."""
        x = x + product(attended, weights.out)
        h = functional.rms_norm(x, x.shape[-1:], weights.mlp_norm, self.eps)
        gate, up = product(h, weights.gate_up).chunk(2, -1)
        return x + product(functional.silu(gate) * up, weights.down)

    def _attend(
        self, query: Tensor, keys_values: Tensor, row_ends: Tensor, key_starts: Tensor, lengths: Tensor, bound: int
    ) -> Tensor:
        """Attends from (R, H, K) over the slots: (R, H, K)."""
        if self.flash:
            found: Tensor = torch.ops.aten._flash_attention_forward(
                query,
                keys_values[0],
                keys_values[1],
                row_ends,
                key_starts,
                1,
                bound,
                0.0,
                False,
                False,
                scale=self.head_dim**-0.5,
                seqused_k=lengths,
            )[0]
            return found
        rows = len(query)
        keys, values = (  # (R, G, bound, K)
            each.unflatten(0, (-1, self.length))[:rows, :bound].transpose(1, 2) for each in keys_values
        )
        # Query heads that share keys become positions, so that no key is repeated.
        grouped = query.unflatten(1, (self.num_kv_heads, -1))
        mask = (torch.arange(bound, device=query.device) < lengths[:, None])[:, None, None]
        return functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).flatten(1, 2)


def product(x: Tensor, matrix: Matrix) -> Tensor:
    """Multiplies (R, in) by a matrix: (R, out). In fp8 inputs are scaled by their largest value."""
    if matrix.scale is None:
        return functional.linear(x, matrix.weight, matrix.bias)
    rows = len(x)
    padded = functional.pad(x, (0, 0, 0, -rows % FP8_ROWS))
    scale = padded.abs().amax().float().clamp(min=1e-12) / torch.finfo(FP8).max
    small = (padded / scale).to(FP8)
    weight = matrix.weight.t()
    out: Tensor = torch._scaled_mm(small, weight, scale, matrix.scale, bias=matrix.bias, out_dtype=x.dtype)
    return out[:rows]


def as_it_is(weight: Tensor, bias: Tensor | None) -> Matrix:
    """Returns a matrix in its own dtype."""
    return Matrix(weight, bias, None)


def in_fp8(weight: Tensor, bias: Tensor | None) -> Matrix:
    """Returns a matrix in fp8 with one scale."""
    scale = weight.abs().amax().float() / torch.finfo(FP8).max
    return Matrix((weight.float() / scale).to(FP8), bias, scale)


def _weights(layer: Any, matrix: Callable[[Tensor, Tensor | None], Matrix], stacked: bool) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    parts = [(each.weight, each.bias) for each in (attention.q_proj, attention.k_proj, attention.v_proj)]
    if stacked:
        biases = [bias for _, bias in parts if bias is not None]
        parts = [(torch.cat([weight for weight, _ in parts]), torch.cat(biases) if biases else None)]
    return LayerWeights(
        layer.input_layernorm.weight,
        tuple(matrix(*part) for part in parts),
        matrix(attention.o_proj.weight, None),
        layer.post_attention_layernorm.weight,
        matrix(mlp.gate_up_proj.weight, None),
        matrix(mlp.down_proj.weight, None),
    )
