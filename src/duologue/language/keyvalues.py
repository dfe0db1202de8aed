"""Keys and values of conversations, and one step of a causal LM over many conversations at once.

The new ids of all conversations stand one behind the other in a single row, so every matrix of the model is read once
for all of them; only in the attention each conversation meets its own keys and values, in their own buffers. Nothing is
padded and nothing is copied when a conversation joins or leaves.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

_NAME = "duologue_side_by_side"
_FIRST_CAPACITY = 256


class KeyValues:
    """Keys and values of one conversation in all layers. Buffers (heads, capacity, head_dim) double when they are full.

    Attributes:
        length: ids that they belong to.
    """

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Puts those of T new ids, (heads, T, head_dim) each, behind the others; gives all, (heads, length + T, ...).

        `length` grows only when every layer has written (`advance`).
        """
        stop = self.length + keys.shape[1]
        buffers = self._layers.get(layer)
        if buffers is None or buffers[0].shape[1] < stop:
            capacity = max(_FIRST_CAPACITY, 2 * self.length, stop)
            grown = tuple(new.new_empty(new.shape[0], capacity, new.shape[2]) for new in (keys, values))
            if buffers is not None:
                for old, new in zip(buffers, grown, strict=True):
                    new[:, : self.length] = old[:, : self.length]
            buffers = self._layers[layer] = (grown[0], grown[1])
        buffers[0][:, self.length : stop] = keys
        buffers[1][:, self.length : stop] = values
        return buffers[0][:, :stop], buffers[1][:, :stop]

    def advance(self, num_ids: int) -> None:
        """Counts the ids that every layer has written."""
        self.length += num_ids

    def copy(self, length: int) -> KeyValues:
        """Those of the first `length` ids, in buffers of their own."""
        copied = KeyValues()
        for layer, (keys, values) in self._layers.items():
            copied.write(layer, keys[:, :length], values[:, :length])
        copied.advance(length)
        return copied


@dataclass(frozen=True)
class _Row:
    """New ids of one conversation inside a step; `mask` (T, length + T) tells what each may look at, None for one."""

    kept: KeyValues
    num_ids: int
    mask: Tensor | None


class SideBySide:
    """Steps of one model over many conversations at once.

    Args:
        model: a causal LM of transformers with full attention in all layers, in evaluation mode.

    Attributes:
        model: the same weights in modules and a config of its own, so that others may go on using theirs meanwhile, to
            train it say.

    Raises:
        ValueError: layers with another attention.
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

    @torch.inference_mode()
    def step(self, ids: Sequence[Sequence[int]], kept: Sequence[KeyValues]) -> Tensor:
        """Runs new ids behind the kept ones; gives the scores of the id after each, (rows, V) float32."""
        device = self.model.device
        lengths = torch.tensor([len(new) for new in ids])
        positions = [range(row.length, row.length + len(new)) for new, row in zip(ids, kept, strict=True)]
        rows = [_Row(row, len(new), _mask(row.length, len(new), device)) for new, row in zip(ids, kept, strict=True)]
        output = self.model(
            input_ids=torch.tensor([[token for new in ids for token in new]], device=device),
            position_ids=torch.tensor([[place for row in positions for place in row]], device=device),
            use_cache=False,
            logits_to_keep=(lengths.cumsum(0) - 1).to(device),
            rows=rows,
        )
        for row in rows:
            row.kept.advance(row.num_ids)
        scores: Tensor = output.logits[0].float()
        return scores


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
    """Attention of transformers' interface: query (1, heads, T, head_dim), key and value (1, kv_heads, T, head_dim), T
    new ids of all rows; gives (1, T, heads, head_dim)."""
    outputs = []
    start = 0
    for row in rows:
        stop = start + row.num_ids
        keys, values = row.kept.write(int(module.layer_idx), key[0, :, start:stop], value[0, :, start:stop])  # type: ignore[arg-type]
        num_kv_heads, head_dim = keys.shape[0], keys.shape[2]
        # Query heads that share keys are laid side by side as if they were more positions: no key is repeated.
        queries = query[0, :, start:stop].reshape(1, num_kv_heads, -1, head_dim)
        mask = row.mask
        if mask is not None:
            mask = mask.repeat(queries.shape[2] // row.num_ids, 1)
        attended = functional.scaled_dot_product_attention(
            queries, keys[None], values[None], attn_mask=mask, scale=scaling
        )
        outputs.append(attended.reshape(query.shape[1], row.num_ids, -1))
        start = stop
    return torch.cat(outputs, 1).transpose(0, 1)[None], None


def _mask(num_kept: int, num_new: int, device: torch.device) -> Tensor | None:
    if num_new == 1:
        return None
    return torch.ones(num_new, num_kept + num_new, dtype=torch.bool, device=device).tril(num_kept)
