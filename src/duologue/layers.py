"""Ragged batches, streaming state and causal layers.

Shapes: B batch (one row per session), T frames or tokens, D width, H heads, W cached frames.

The contract of a `StreamingStage`:

- ``init_state(batch_size)`` returns a state: a dataclass of tensors with a leading batch dimension and child states.
- ``step(x, state)`` takes a ragged batch (rows may be empty) and returns the output that is final.
- ``flush(state, rows)`` ends the given rows, returns their held-back output and resets them.
- ``forward(x)`` equals the concatenated steps plus the flush, for every chunking of the input.

A step replaces the tensors of a state and never writes into them, so a copy of the dataclasses forks a session.
`join_states` batches the states of sessions and `state_row` separates them again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

StateT = TypeVar("StateT")
_FEW_PARAMETERS = 50_000_000


@dataclass(frozen=True)
class Padded:
    """A ragged batch: row b is ``values[b, :lengths[b]]``; the values after it are arbitrary.

    Attributes:
        values: (B, T, ...) any dtype.
        lengths: (B,) int64, each in 0..T.
    """

    values: Tensor
    lengths: Tensor

    @staticmethod
    def full(values: Tensor) -> Padded:
        """Returns a batch in which every row fills the tensor."""
        return Padded(values, torch.full((values.shape[0],), values.shape[1], device=values.device))

    @staticmethod
    def stack(rows: Sequence[Tensor]) -> Padded:
        """Zero-pads rows (T_b, ...) to one batch."""
        lengths = torch.tensor([row.shape[0] for row in rows], device=rows[0].device)
        return Padded(nn.utils.rnn.pad_sequence(list(rows), batch_first=True), lengths)

    @property
    def mask(self) -> Tensor:
        """(B, T) bool, true on valid values."""
        return torch.arange(self.values.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def rows(self) -> list[Tensor]:
        """Returns the valid part of each row, (T_b, ...)."""
        return [row[:length] for row, length in zip(self.values, self.lengths.tolist(), strict=True)]

    def zeroed(self) -> Padded:
        """Returns the batch with zeros as padding."""
        mask = self.mask.reshape(*self.mask.shape, *([1] * (self.values.dim() - 2)))
        return Padded(self.values * mask.to(self.values.dtype), self.lengths)

    @staticmethod
    def concat(parts: Sequence[Padded]) -> Padded:
        """Concatenates batches row by row along time."""
        parts = [part for part in parts if part.values.shape[1]] or list(parts[:1])
        if len(parts) == 1:
            return parts[0]
        lengths = parts[0].lengths
        for part in parts[1:]:
            lengths = lengths + part.lengths
        if all(_is_full(part) for part in parts[:-1]):
            return Padded(torch.cat([part.values for part in parts], 1), lengths)
        first = parts[0].values
        out = first.new_zeros(first.shape[0], int(lengths.max()), *first.shape[2:])
        start = torch.zeros_like(lengths)
        for part in parts:
            row, time = part.mask.nonzero(as_tuple=True)
            out = out.index_put((row, start[row] + time), part.values[row, time])
            start = start + part.lengths
        return Padded(out, lengths)


def _is_full(x: Padded) -> bool:
    lengths = x.lengths
    return int(lengths if lengths.shape[0] == 1 else lengths.min()) == x.values.shape[1]


def take(values: Tensor, index: Tensor) -> Tensor:
    """Gathers ``values[b, index[b, t]]``: (B, T, ...), (B, N) int64 -> (B, N, ...)."""
    if not values.shape[1]:  # all rows are empty, so every picked value is padding
        values = values.new_zeros(values.shape[0], 1, *values.shape[2:])
    index = index.reshape(*index.shape, *([1] * (values.dim() - 2))).expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)


def split_at(x: Padded, lengths: Tensor) -> tuple[Padded, Padded]:
    """Splits each row after ``lengths[b]`` values; both parts are left-aligned."""
    rest = x.lengths - lengths
    if lengths.device.type == "cpu" and lengths.shape[0]:
        cuts = lengths.tolist()
        if min(cuts) == max(cuts):  # a single session: both parts are views
            cut = cuts[0]
            return Padded(x.values[:, :cut], lengths), Padded(x.values[:, cut : cut + int(rest.max())], rest)
    head = Padded(x.values[:, : int(lengths.max())], lengths)
    index = lengths[:, None] + torch.arange(int(rest.max()), device=lengths.device)
    return head, Padded(take(x.values, index.clamp(max=max(x.values.shape[1] - 1, 0))), rest)


def roll_in(cache: Tensor, x: Padded, width: int) -> tuple[Tensor, Tensor]:
    """Appends a ragged batch to right-aligned caches.

    Args:
        cache: (B, W, ...) the last W values of each row.
        x: (B, T, ...) new values.
        width: width of the new cache.

    Returns:
        (B, W + T, ...) cache and new values concatenated, and the new cache (B, width, ...).
    """
    joined = torch.cat([cache, x.values], 1)
    # If all rows are full, the new cache is a view. The check would synchronize with a GPU, so only on the CPU.
    if joined.device.type == "cpu" and width <= joined.shape[1] and _is_full(x):
        return joined, joined[:, joined.shape[1] - width :]
    index = cache.shape[1] - width + x.lengths[:, None] + torch.arange(width, device=cache.device)
    return joined, take(joined, index.clamp(min=0))


def map_state(visit: Callable[..., object], *states: object) -> object:
    """Returns a state whose leaves are `visit(leaf, ...)` over equally structured states.

    Leaves are tensors, `Padded` and settings (anything but lists and dataclasses).
    """
    first = states[0]
    if isinstance(first, list):
        return [map_state(visit, *items) for items in zip(*states, strict=True)]
    if dataclasses.is_dataclass(first) and not isinstance(first, Padded | type):
        names = [field.name for field in dataclasses.fields(first)]
        return dataclasses.replace(
            first, **{name: map_state(visit, *(getattr(state, name) for state in states)) for name in names}
        )
    return visit(*states)


def reset_rows(state: StateT, fresh: StateT, rows: Tensor) -> None:
    """Resets the given rows (B,) bool of a state to those of a fresh one."""

    def reset(old: object, new: object) -> object:
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            if old.dim() > 1 and old.shape[1] != new.shape[1]:  # a grown cache; counts mark its valid values
                new = torch.zeros_like(old)
            return torch.where(rows.reshape(-1, *([1] * (old.dim() - 1))), new, old)
        if isinstance(old, Padded) and isinstance(new, Padded):
            return Padded(old.values, torch.where(rows, new.lengths, old.lengths))
        if old == new:
            return old
        raise TypeError(f"a state may hold tensors, Padded, lists and dataclasses, not {type(old).__name__}")

    changed = map_state(reset, state, fresh)
    for field in dataclasses.fields(state):  # type: ignore[arg-type]
        setattr(state, field.name, getattr(changed, field.name))


def state_settings(state: object) -> Hashable:
    """Returns what states must share to be joined: structure, dtypes, sizes after the time axis, settings."""
    if isinstance(state, Padded):
        return "padded", state.values.dtype, state.values.shape[2:]
    if isinstance(state, Tensor):
        return state.dtype, state.shape[2:]
    if isinstance(state, list):
        return tuple(state_settings(item) for item in state)
    if dataclasses.is_dataclass(state):
        return type(state), tuple(state_settings(getattr(state, item.name)) for item in dataclasses.fields(state))
    return state


def join_states(states: Sequence[StateT]) -> StateT:
    """Concatenates states along the batch dimension.

    Narrower caches are left-padded with zeros, which lie before position 0 and are masked.

    Raises:
        ValueError: the states have different `state_settings`.
    """
    if len({state_settings(state) for state in states}) != 1:
        raise ValueError("states made with unequal settings cannot run in one batch")
    return cast(StateT, states[0] if len(states) == 1 else map_state(_join, *states))


def _join(*parts: object) -> object:
    first = parts[0]
    if isinstance(first, Padded):
        padded = cast(Sequence[Padded], parts)
        width = max(part.values.shape[1] for part in padded)
        values = torch.cat([_widened(part.values, width, left=False) for part in padded])
        return Padded(values, torch.cat([part.lengths for part in padded]))
    if isinstance(first, Tensor):
        tensors = cast(Sequence[Tensor], parts)
        if first.dim() > 1:
            width = max(part.shape[1] for part in tensors)
            tensors = [_widened(part, width, left=True) for part in tensors]
        return torch.cat(tuple(tensors))
    return first


def _widened(values: Tensor, width: int, left: bool) -> Tensor:
    """Zero-pads (B, T, ...) to (B, width, ...) on one side."""
    missing = width - values.shape[1]
    if not missing:
        return values
    zeros = values.new_zeros(values.shape[0], missing, *values.shape[2:])
    return torch.cat([zeros, values] if left else [values, zeros], 1)


def state_row(state: StateT, row: int) -> StateT:
    """Copies one row of a state."""

    def copy(leaf: object) -> object:
        if isinstance(leaf, Padded):
            length = int(leaf.lengths[row])
            return Padded(leaf.values[row : row + 1, :length].clone(), leaf.lengths[row : row + 1].clone())
        return leaf[row : row + 1].clone() if isinstance(leaf, Tensor) else leaf

    return cast(StateT, map_state(copy, state))


class StreamingStage(Protocol[StateT]):
    """The interface of a streaming stage; the module docstring gives its contract."""

    def init_state(self, batch_size: int) -> StateT: ...
    def step(self, x: Padded, state: StateT) -> Padded: ...
    def flush(self, state: StateT, rows: Tensor | None = None) -> Padded: ...
    def __call__(self, x: Padded) -> Padded: ...


class CausalConv1d(nn.Conv1d):
    """Causal convolution over time: (B, T, C_in) -> (B, T / stride, C_out).

    The cache is (B, dilation * (kernel_size - 1), C_in), initially zeros. Chunks must be multiples of the stride.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel_size: int, stride: int = 1, dilation: int = 1, groups: int = 1
    ) -> None:
        super().__init__(channels_in, channels_out, kernel_size, stride, dilation=dilation, groups=groups)
        self.context = dilation * (kernel_size - 1)

    def init_cache(self, batch_size: int) -> Tensor:
        return self.weight.new_zeros(batch_size, self.context, self.in_channels)

    def step(self, x: Padded, cache: Tensor) -> tuple[Padded, Tensor]:
        """Returns the output for the new frames, and the new cache."""
        joined, cache = roll_in(cache.to(x.values.dtype), x, self.context)
        y = super().forward(joined.transpose(1, 2)).transpose(1, 2)  # (B, T / stride, C_out)
        return Padded(y, x.lengths // self.stride[0]), cache


@dataclass
class AttentionCache:
    """Right-aligned keys and values of past frames, (B, W, H, D)."""

    keys: Tensor
    values: Tensor


def drop_padding(caches: Sequence[AttentionCache], start: Tensor) -> int:
    """Trims growing caches to the longest past `start` (B,) of any row; returns their width.

    A row that shared a step with a longer one has zeros at the left of its caches until then.
    """
    width = caches[0].keys.shape[1]
    longest = int(start.max()) if width else 0
    if longest < width:
        for cache in caches:
            cache.keys, cache.values = cache.keys[:, width - longest :], cache.values[:, width - longest :]
    return min(width, longest)


def attention_mask(
    start: Tensor,
    x: Padded,
    num_cached: int,
    block_of: Callable[[Tensor], Tensor],
    past_blocks: int | None = None,
    num_valid: Tensor | None = None,
) -> Tensor:
    """Returns the block-causal mask: a query sees its own block and past blocks.

    Args:
        start: (B,) absolute position of each row's first new frame.
        x: the new frames; only the lengths are used.
        num_cached: W, width of the caches.
        block_of: maps absolute positions to block numbers.
        past_blocks: number of visible past blocks; None for all.
        num_valid: (B,) absolute positions from here on are padding and masked as keys.

    Returns:
        (B, 1, T, W + T) bool.
    """
    time = x.values.shape[1]
    offsets = torch.arange(-num_cached, time, device=start.device)
    key = start[:, None] + offsets  # (B, W + T)
    query = key[:, num_cached:]
    key_block, query_block = block_of(key)[:, None, :], block_of(query)[:, :, None]
    may_attend = key_block <= query_block
    if past_blocks is not None:
        may_attend = may_attend & (key_block >= query_block - past_blocks)
    is_key = (key >= 0) & (offsets < x.lengths[:, None])
    if num_valid is not None:
        is_key = is_key & (key < num_valid[:, None])
    # Padding frames attend to themselves, so that softmax has no empty row.
    is_padding = (offsets[num_cached:] >= x.lengths[:, None])[:, :, None]
    pad_self = is_padding & (key[:, None, :] == query[:, :, None])
    return ((may_attend & is_key[:, None, :]) | pad_self)[:, None]


def attend(
    query: Tensor, key: Padded, value: Tensor, cache: AttentionCache, mask: Tensor | None, width: int | None
) -> Tensor:
    """Computes attention over cached and new frames, and updates the cache.

    Args:
        query: (B, T, H, D); key and value have the same shape.
        cache: past keys and values; replaced by the last `width` ones (None: all).
        mask: from `attention_mask`; None if every query sees every key.

    Returns:
        (B, T, H * D).
    """
    grown = cache.keys.shape[1] + query.shape[1]
    width = grown if width is None else min(width, grown)
    keys, cache.keys = roll_in(cache.keys.to(query.dtype), key, width)
    values, cache.values = roll_in(cache.values.to(query.dtype), Padded(value, key.lengths), width)
    query, keys, values = (x.transpose(1, 2) for x in (query, keys, values))
    return weigh(query, keys, values, mask).transpose(1, 2).flatten(2)


def weigh(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Computes scaled dot-product attention of (B, H, T, D) over (B, H, W, D): (B, H, T, D).

    Args:
        mask: bool, broadcast to (B, H, T, W), true where a query sees a key; None for everywhere.
    """
    if torch.is_grad_enabled() and query.device.type == "cpu":
        # On a CPU the gradient of fused attention is three times slower than that of these products.
        scores = (query @ keys.transpose(2, 3)) * query.shape[-1] ** -0.5
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        weighed: Tensor = scores.softmax(-1) @ values
        return weighed
    return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


def rotate(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Applies rotary position embedding to all of D, halves paired: x (B, T, H, D), positions (B, T) int64."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[:, :, None, None].float() * frequency  # (B, T, 1, D / 2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def sinusoids(num_positions: int, width: int, max_timescale: float = 10000.0) -> Tensor:
    """Returns Whisper's position table (num_positions, width): sines, then cosines."""
    scales = torch.exp(-torch.arange(width // 2) * (torch.log(torch.tensor(max_timescale)) / (width // 2 - 1)))
    angle = torch.arange(num_positions)[:, None] * scales
    return torch.cat([angle.sin(), angle.cos()], 1)


BITS = 0xFFFFFFFF


def hash_bits(x: Tensor) -> Tensor:
    """Mixes 32-bit integers held in int64 bijectively (multiply and xor-shift, Wellons' lowbias32)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = x ^ (x >> shift)
        # In two halves, so that no product passes 63 bits.
        x = ((((x * (factor >> 16)) & 0xFFFF) << 16) + x * (factor & 0xFFFF)) & BITS
    return x ^ (x >> 16)


def uniform_at(seed: Tensor, position: Tensor, num: int) -> Tensor:
    """Returns uniform numbers in [0, 1) by position: seed (...) and position (...) int64 -> (..., num) float32.

    They are equal on every device, and multiples of 2**-23. Their product with a positive float32 rounds to
    less than that float32.
    """
    key = hash_bits(hash_bits(seed & BITS) ^ ((seed >> 32) & BITS))
    count = (position[..., None] * num + torch.arange(num, device=position.device)) & BITS
    return (hash_bits(hash_bits(count) ^ key[..., None]) >> 9).float() / 2**23


def num_step_threads(*modules: nn.Module) -> int:
    """Returns the number of CPU threads for steps of these modules: 1 for small ones, else PyTorch's default.

    A second thread slows the short operations of a small model by up to 2x (docs/engines.md).
    """
    return num_threads_for(sum(parameter.numel() for module in modules for parameter in module.parameters()))


def num_threads_for(num_parameters: int) -> int:
    """Returns the number of CPU threads for steps of a model of this size, as `num_step_threads`."""
    return 1 if num_parameters <= _FEW_PARAMETERS else torch.get_num_threads()


@contextmanager
def step_threads(*modules: nn.Module) -> Iterator[None]:
    """Sets the thread count of `num_step_threads` in the calling thread for a `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_step_threads(*modules))
    try:
        yield
    finally:
        torch.set_num_threads(before)
