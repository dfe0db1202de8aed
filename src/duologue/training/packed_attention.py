"""Attention within packed rows on a CPU: sequences of similar length together, without scores between sequences.

The usual attention computes the scores of whole rows and masks those between sequences, which are most of them.
Without them, a training step of pocket's language model takes 18 % less time (docs/log.md, 2026-11-29).

Shapes: B rows, L ids of a row, T = B * L, P places with padding, H heads. A group has N sequences of the padded
length M. A head has the width E.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "duologue_packed"
# Up to this length one product of matrices is faster than the fused attention of torch 2.13, most of all backward.
LONGEST_MATRIX = 512
# Architectures whose attention is causal and nothing else: no window, no cap of scores, no sinks.
PLAIN = frozenset({"glm", "glm4", "llama", "qwen2", "qwen3"})
_STEPS = (32, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class PackedSequences:
    """Groups of sequences that are padded to the same length.

    Attributes:
        source: (P,) int64, index of each place in the flattened rows; padding repeats the first id of its sequence.
        place: (T,) int64, the place of each id.
        is_padding: (P,) bool.
        groups: (N, M) of each group; the sum of N * M is P.
    """

    source: Tensor
    place: Tensor
    is_padding: Tensor
    groups: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, position_ids: Tensor) -> PackedSequences:
        """Finds the sequences of packed rows (B, L), whose position ids begin with 0."""
        flat = position_ids.flatten()
        starts = (flat == 0).nonzero().flatten()
        lengths = torch.diff(starts, append=torch.tensor([len(flat)]))
        steps = torch.tensor([*_STEPS, *range(1024, len(flat) + 1024, 512)])
        padded = steps[torch.searchsorted(steps, lengths)]
        sources, paddings, groups = [], [], []
        for length in padded.unique().tolist():
            chosen = padded == length
            offsets = torch.arange(length)
            outside = offsets >= lengths[chosen, None]
            sources.append((starts[chosen, None] + offsets.masked_fill(outside, 0)).flatten())
            paddings.append(outside.flatten())
            groups.append((int(chosen.sum()), length))
        source, is_padding = torch.cat(sources), torch.cat(paddings)
        used = (~is_padding).nonzero().flatten()
        place = torch.empty_like(flat)
        place[source[used]] = used
        return cls(source, place, is_padding, tuple(groups))


class _Rearranged(torch.autograd.Function):
    """values[index] over the first axis, with a gradient that is a plain selection too.

    `inverse` is the place of each value in the result. Places of the result without a value of their own are those of
    padding, and get no gradient. Values that the result leaves out are `left_out`.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, inverse: Tensor, left_out: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, left_out)
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inverse, left_out = ctx.saved_tensors
        gradient = gradients[0].index_select(0, inverse)
        if left_out is not None:
            gradient.masked_fill_(left_out[:, None, None], 0.0)
        return gradient, None, None, None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequences: PackedSequences,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention within sequences, as transformers calls it; (B, H, L, E) -> (B, L, H, E)."""
    num_rows, num_heads, length, width = query.shape
    scaling = width**-0.5 if scaling is None else scaling
    sizes = [number * padded for number, padded in sequences.groups]

    def in_groups(values: Tensor) -> tuple[Tensor, ...]:
        flat = values.transpose(1, 2).reshape(num_rows * length, -1, width)
        return _Rearranged.apply(flat, sequences.source, sequences.place, None).split(sizes)  # type: ignore[no-any-return, no-untyped-call]

    results = []
    for shape, *parts in zip(sequences.groups, *map(in_groups, (query, key, value)), strict=True):
        queries, keys, values = (part.unflatten(0, shape).transpose(1, 2) for part in parts)  # (N, H, M, E)
        repeats = num_heads // keys.shape[1]
        if repeats > 1:
            keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        result = _attend(queries, keys, values, scaling)
        results.append(result.transpose(1, 2).flatten(0, 1))
    flat = _Rearranged.apply(torch.cat(results), sequences.place, sequences.source, sequences.is_padding)  # type: ignore[no-untyped-call]
    return flat.unflatten(0, (num_rows, length)), None


def _attend(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Causal attention, all (N, H, M, E). Padding lies behind its sequence, where no id of the sequence looks."""
    length = queries.shape[2]
    if length > LONGEST_MATRIX:
        return functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scaling)
    scores = (queries * scaling) @ keys.transpose(2, 3)
    future = torch.ones(length, length, dtype=torch.bool).triu_(1)
    shares = scores.masked_fill(future, float("-inf")).softmax(-1, dtype=torch.float32)
    return shares.to(values.dtype) @ values


AttentionInterface.register(NAME, packed_attention)


@contextmanager
def attention_of(model: PreTrainedModel, position_ids: Tensor) -> Iterator[dict[str, PackedSequences]]:
    """Yields what a forward pass over packed rows gets as further arguments; inside, it attends as described above.

    Nothing changes on other devices and for other attention than plain causal one of torch. Nor does it where
    activations are computed again in the backward pass, because that is outside of this context.
    """
    if position_ids.device.type != "cpu" or not _has_plain_attention(model):
        yield {}
        return
    config = model.config
    config._attn_implementation = NAME
    try:
        yield {"sequences": PackedSequences.of(position_ids)}
    finally:
        config._attn_implementation = "sdpa"


def _has_plain_attention(model: PreTrainedModel) -> bool:
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        config.model_type in PLAIN
        and getattr(config, "_attn_implementation", "") == "sdpa"
        and kinds == {"full_attention"}
        and not getattr(config, "attention_dropout", 0.0)
        and not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    )
