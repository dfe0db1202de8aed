"""KV caches of many conversations in fixed slots, and the attention of one step over all of them.

Each layer has one tensor (2, slots, kv_heads, positions, head_dim), keys before values. The lengths of the caches are
kept on the host. The new ids of all conversations are concatenated, so every weight matrix is read once per step.

Shapes: T new ids of all rows, H heads, G heads of keys, K head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_FIRST_POSITIONS, _FIRST_SLOTS = 256, 4


@dataclass(frozen=True)
class SlotRow:
    """New ids of one conversation: `num_ids` after the first `start` ids of a slot."""

    slot: int
    start: int
    num_ids: int

    @property
    def stop(self) -> int:
        """Number of cached ids after the step."""
        return self.start + self.num_ids


class SlotCache:
    """Keys and values of conversations. The tensors double in slots and positions when a row needs more.

    A tensor on a CPU takes memory only where ids were written.
    """

    def __init__(self) -> None:
        self._layers: list[Tensor] = []
        self._lengths: dict[int, int] = {}  # written positions of each slot, to be copied when the tensors grow
        self._num_slots, self._num_positions = _FIRST_SLOTS, _FIRST_POSITIONS
        self._is_fixed = False

    @classmethod
    def fixed(
        cls, num_layers: int, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> SlotCache:
        """Returns a cache that never moves, of layers (2, slots, positions, G, K) that `layer` shows transposed."""
        cache = cls()
        cache._layers = [torch.zeros(shape, dtype=dtype, device=device).transpose(2, 3) for _ in range(num_layers)]
        cache._num_slots, cache._num_positions, cache._is_fixed = shape[1], shape[2], True
        return cache

    def layer(self, layer: int) -> Tensor:
        """Returns a layer's tensor (2, slots, G, positions, K)."""
        return self._layers[layer]

    def reserve(self, rows: Sequence[SlotRow]) -> None:
        """Makes room for a step. A failed allocation leaves all written ids in place.

        Raises:
            ValueError: a fixed cache has no such slot or position.
        """
        slots = max(max((row.slot for row in rows), default=0) + 1, self._num_slots)
        positions = max(max((row.stop for row in rows), default=0), self._num_positions)
        if self._is_fixed and (slots, positions) != (self._num_slots, self._num_positions):
            raise ValueError(f"{slots} slots of {positions} ids do not fit {self._num_slots} of {self._num_positions}")
        if slots > self._num_slots:
            slots = max(slots, 2 * self._num_slots)
        if positions > self._num_positions:
            positions = max(positions, 2 * self._num_positions)
        self._num_slots, self._num_positions = slots, positions
        for index in range(len(self._layers)):
            self._resize(index)
        for row in rows:
            self._lengths[row.slot] = row.stop

    def write(self, layer: int, keys_values: Tensor, rows: Sequence[SlotRow], places: SlotPlaces | None) -> Tensor:
        """Writes new keys and values (2, G, T, K) and returns the layer's tensor.

        Args:
            places: of single ids, which are written in one operation; None for rows of several ids.
        """
        if layer == len(self._layers):  # the first step of all
            shape = 2, self._num_slots, keys_values.shape[1], self._num_positions, keys_values.shape[3]
            self._layers.append(_zeros(shape, keys_values))
        kept = self._layers[layer]
        if places is not None and len(rows) > 1:
            kept[:, places.slots, :, places.positions] = keys_values.permute(2, 0, 1, 3)
            return kept
        start = 0
        for row in rows:
            kept[:, row.slot, :, row.start : row.stop] = keys_values[:, :, start : start + row.num_ids]
            start += row.num_ids
        return kept

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first ids of one slot to another."""
        self.reserve([SlotRow(target, 0, length)])
        for kept in self._layers:
            kept[:, target, :, :length] = kept[:, source, :, :length]

    def keep_only(self, slots: Sequence[int]) -> None:
        """Returns the memory of all slots behind the last of these, and of unused positions."""
        self._lengths = {slot: self._lengths[slot] for slot in slots if slot in self._lengths}
        self._num_slots = max(max(self._lengths, default=0) + 1, _FIRST_SLOTS)
        self._num_positions = max(max(self._lengths.values(), default=0), _FIRST_POSITIONS)
        for index in range(len(self._layers)):
            self._resize(index)

    def _resize(self, layer: int) -> None:
        kept = self._layers[layer]
        shape = 2, self._num_slots, kept.shape[2], self._num_positions, kept.shape[4]
        if kept.shape == shape:
            return
        resized = _zeros(shape, kept)
        for slot, length in self._lengths.items():
            if slot < min(kept.shape[1], shape[1]):
                length = min(length, kept.shape[3])
                resized[:, slot, :, :length] = kept[:, slot, :, :length]
        self._layers[layer] = resized


@dataclass(frozen=True)
class SlotPlaces:
    """Where the single new ids of R rows go, and what they see.

    Attributes:
        slots, positions: (R,) int64.
        first, span: the rows lie in this range of slots, or span is 0 where it is too wide for one call.
        mask: (span, 1, 1, longest) of the scores' dtype: 0 for the cached ids of a slot, -inf beyond.
    """

    slots: Tensor
    positions: Tensor
    first: int
    span: int
    mask: Tensor


class SlotAttention:
    """The attention of one step.

    Args:
        cache: has room for the rows, see `SlotCache.reserve`.
        rows: single ids in the order of their slots, then rows of several ids.
    """

    def __init__(self, cache: SlotCache, rows: Sequence[SlotRow], dtype: torch.dtype, device: torch.device) -> None:
        self._cache = cache
        self._single = [row for row in rows if row.num_ids == 1]
        self._several = [row for row in rows if row.num_ids > 1]
        self._masks = [
            torch.ones(row.num_ids, row.stop, dtype=torch.bool, device=device).tril(row.start) for row in self._several
        ]
        self._places = _places(self._single, dtype, device) if self._single else None

    def __call__(self, layer: int, query: Tensor, keys_values: Tensor, scale: float | None = None) -> Tensor:
        """Writes the new keys and values (2, G, T, K) and returns the attention of query (H, T, K): (T, H, K)."""
        parts = []
        num_single = len(self._single)
        if self._places is not None:
            kept = self._cache.write(layer, keys_values[:, :, :num_single], self._single, self._places)
            parts.append(self._attend_single(kept, query[:, :num_single], scale))
        if self._several:
            kept = self._cache.write(layer, keys_values[:, :, num_single:], self._several, None)
            start = num_single
            for row, mask in zip(self._several, self._masks, strict=True):
                parts.append(_attend(kept, row, query[:, start : start + row.num_ids], mask, scale))
                start += row.num_ids
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_single(self, kept: Tensor, query: Tensor, scale: float | None) -> Tensor:
        places = self._places
        assert places is not None
        if places.span == 0:
            rows = [_attend(kept, row, query[:, i : i + 1], None, scale) for i, row in enumerate(self._single)]
            return torch.cat(rows)
        num_heads, num_rows, head_dim = query.shape
        stop = places.first + places.span
        # Query heads that share keys become additional positions, so no key is repeated.
        queries = query.transpose(0, 1).reshape(num_rows, kept.shape[2], -1, head_dim)
        everywhere = places.span == num_rows
        if not everywhere:
            spread = queries.new_zeros(places.span, *queries.shape[1:])
            queries = spread.index_copy_(0, places.slots - places.first, queries)
        keys, values = kept[:, places.first : stop, :, : places.mask.shape[3]]
        attended = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=places.mask if num_rows > 1 else None, scale=scale
        )
        if not everywhere:
            attended = attended.index_select(0, places.slots - places.first)
        return attended.reshape(num_rows, num_heads, head_dim)


def _places(rows: Sequence[SlotRow], dtype: torch.dtype, device: torch.device) -> SlotPlaces:
    slots = [row.slot for row in rows]
    first, span = min(slots), max(slots) - min(slots) + 1
    if span > 2 * len(rows):
        span = 0
    both = torch.tensor([slots, [row.start for row in rows]], device=device)
    lengths = [1] * span  # an unused slot between two rows sees one position, since softmax needs one
    for row in rows if span else ():
        lengths[row.slot - first] = row.stop
    longest = max(row.stop for row in rows)
    hidden = torch.arange(longest, device=device) >= torch.tensor(lengths, device=device)[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
    return SlotPlaces(both[0], both[1], first, span, mask[:, None, None])


def _attend(kept: Tensor, row: SlotRow, query: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Returns the attention (T, H, K) of one row's query (H, T, K) over its slot of a layer."""
    keys, values = kept[:, row.slot : row.slot + 1, :, : row.stop]
    queries = query.reshape(1, keys.shape[1], -1, query.shape[2])
    if mask is not None:
        mask = mask.repeat(queries.shape[2] // row.num_ids, 1)
    attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    return attended.reshape(query.shape[0], row.num_ids, -1).transpose(0, 1)


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Returns zeros, on a CPU without touching their memory. Masked positions must be finite, never uninitialized."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    num_bytes = math.prod(shape) * like.element_size()
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(like.dtype).view(shape)
