"""KV caches of conversations, and one step of a causal LM over many of them.

The new ids of all conversations are concatenated into one row, so every weight matrix is read once per step. Attention
alone is per conversation, over its own buffers. There is no padding, and joining or leaving copies nothing.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from duologue.language.glm import Glm, is_plain_glm

_NAME = "duologue_ragged_batch"
_FIRST_CAPACITY = 256


class KeyValues:
    """The KV cache of one conversation. Buffers (2, heads, capacity, head_dim), keys before values, double when full.

    Attributes:
        length: number of cached ids.
    """

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, Tensor] = {}

    def write(self, layer: int, new: Tensor) -> Tensor:
        """Appends keys and values of T new ids (2, heads, T, head_dim) and returns all, (2, heads, length + T, ...).

        `length` grows after every layer has written (`advance`).
        """
        stop = self.length + new.shape[2]
        buffer = self._layers.get(layer)
        if buffer is None or buffer.shape[2] < stop:
            capacity = max(_FIRST_CAPACITY, 2 * self.length, stop)
            grown = new.new_empty(2, new.shape[1], capacity, new.shape[3])
            if buffer is not None:
                grown[:, :, : self.length] = buffer[:, :, : self.length]
            buffer = self._layers[layer] = grown
        buffer[:, :, self.length : stop] = new
        return buffer[:, :, :stop]

    def advance(self, num_ids: int) -> None:
        """Counts ids that every layer has written."""
        self.length += num_ids

    def copy(self, length: int) -> KeyValues:
        """Copies the first `length` ids."""
        copied = KeyValues()
        for layer, buffer in self._layers.items():
            copied.write(layer, buffer[:, :, :length])
        copied.advance(length)
        return copied


@dataclass(frozen=True)
class _Row:
    """New ids of one conversation in a step; `mask` is (T, length + T) bool, None for a single id."""

    kept: KeyValues
    num_ids: int
    mask: Tensor | None


def _attend_rows(
    layer: int, query: Tensor, keys_values: Tensor, rows: Sequence[_Row], scaling: float | None = None
) -> Tensor:
    """Computes attention of T new ids of all rows, each over its own cache, which is extended.

    Args:
        query: (heads, T, head_dim).
        keys_values: (2, kv_heads, T, head_dim).

    Returns:
        (T, heads, head_dim).
    """
    outputs = []
    start = 0
    for row in rows:
        stop = start + row.num_ids
        written = row.kept.write(layer, keys_values[:, :, start:stop])
        keys, values = written[:1], written[1:]
        num_kv_heads, head_dim = keys.shape[1], keys.shape[3]
        # Query heads that share keys become additional positions, so no key is repeated.
        queries = query[:, start:stop].reshape(1, num_kv_heads, -1, head_dim)
        mask = row.mask
        if mask is not None:
            mask = mask.repeat(queries.shape[2] // row.num_ids, 1)
        attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)
        outputs.append(attended.reshape(query.shape[0], row.num_ids, -1))
        start = stop
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)).transpose(0, 1)


class RaggedBatchModel:
    """Steps of one model over many conversations at once.

    Args:
        model: a causal LM of transformers with full attention in all layers, in evaluation mode.

    Attributes:
        model: the same weights in separate modules and config, so that the original can still be trained.

    Raises:
        ValueError: a layer has another attention.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
        if kinds != {"full_attention"} or getattr(config, "attn_logit_softcapping", None):
            raise ValueError(
                f"a language model with {', '.join(sorted(kinds))} cannot run here: every layer must have plain full "
                "attention"
            )
        AttentionInterface.register(_NAME, _attend)
        weights = [*model.parameters(), *model.buffers()]
        self.model = copy.deepcopy(model, {id(weight): weight for weight in weights})
        self.model.config.get_text_config()._attn_implementation = _NAME
        self._glm = Glm(self.model) if is_plain_glm(self.model) else None

    @torch.inference_mode()
    def step(self, ids: Sequence[Sequence[int]], kept: Sequence[KeyValues]) -> Tensor:
        """Runs new ids after the cached ones; returns the scores (rows, V) float32 of the next ids."""
        device = self.model.device
        rows = [_Row(row, len(new), _mask(row.length, len(new), device)) for new, row in zip(ids, kept, strict=True)]
        tokens = torch.tensor([token for new in ids for token in new], device=device)
        places = [range(row.kept.length, row.kept.length + row.num_ids) for row in rows]
        positions = torch.tensor([place for row in places for place in row], device=device)
        last = torch.tensor([*itertools.accumulate(row.num_ids for row in rows)], device=device) - 1
        if self._glm is not None and self._glm.untouched:
            scores = self._glm.step(tokens, positions, last, functools.partial(_attend_rows, rows=rows))
        else:
            scores = self.model(
                input_ids=tokens[None], position_ids=positions[None], use_cache=False, logits_to_keep=last, rows=rows
            ).logits[0]
        for row in rows:
            row.kept.advance(row.num_ids)
        return scores.float()


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    rows: Sequence[_Row] = (),
    **_: Any,
) -> tuple[Tensor, None]:
    """Adapts `_attend_rows` to transformers, with query (1, heads, T, head_dim) and keys (1, kv_heads, T, head_dim)."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    return _attend_rows(layer, query[0], torch.cat((key, value)), rows, scaling)[None], None


def _mask(num_kept: int, num_new: int, device: torch.device) -> Tensor | None:
    if num_new == 1:
        return None
    return torch.ones(num_new, num_kept + num_new, dtype=torch.bool, device=device).tril(num_kept)
