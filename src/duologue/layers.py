"""Ragged batches, caches and the two causal operators that every streaming stage is built of.

Shapes: B batch (one row is one session), T frames or tokens, D width, H heads, W cached past frames.

The contract of a streaming stage, of which `StreamingStage` is the type:

- ``init_state(batch_size)`` makes a state: a dataclass of tensors with a leading batch dimension, and of child states;
- ``step(x, state)`` takes a ragged batch (rows of any length, zero included) and returns what has become final;
- ``flush(state, rows)`` ends the given rows, returns what was held back and makes those rows fresh again;
- ``forward(x)`` equals the concatenated steps plus the flush, for every chunking of the input.

A step replaces the tensors of a state and never writes into them, so ``copy.deepcopy`` (or a shallow copy of every
dataclass) forks a session. ``join_states`` puts the states of sessions into one batch and ``state_row`` takes them
out again, so that sessions share a step whenever they happen to need one at the same time.
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
    """A ragged batch: row b holds ``values[b, :lengths[b]]``, what lies behind is arbitrary.

    Attributes:
        values: (B, T, ...) any dtype.
        lengths: (B,) int64, each in 0..T.
    """

    values: Tensor
    lengths: Tensor

    @staticmethod
    def full(values: Tensor) -> Padded:
        """All rows as long as the tensor."""
        return Padded(values, torch.full((values.shape[0],), values.shape[1], device=values.device))

    @staticmethod
    def stack(rows: Sequence[Tensor]) -> Padded:
        """Pads rows (T_b, ...) of unequal lengths with zeros into one batch."""
        lengths = torch.tensor([row.shape[0] for row in rows], device=rows[0].device)
        return Padded(nn.utils.rnn.pad_sequence(list(rows), batch_first=True), lengths)

    @property
    def mask(self) -> Tensor:
        """(B, T) bool, true where a value counts."""
        return torch.arange(self.values.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def rows(self) -> list[Tensor]:
        """The rows at their own lengths, each (T_b, ...)."""
        return [row[:length] for row, length in zip(self.values, self.lengths.tolist(), strict=True)]

    def zeroed(self) -> Padded:
        """The same batch with zeros behind each row's end."""
        mask = self.mask.reshape(*self.mask.shape, *([1] * (self.values.dim() - 2)))
        return Padded(self.values * mask.to(self.values.dtype), self.lengths)

    @staticmethod
    def concat(parts: Sequence[Padded]) -> Padded:
        """Joins batches row by row along time."""
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
    """Whether all rows are as long as the tensor."""
    lengths = x.lengths
    return int(lengths if lengths.shape[0] == 1 else lengths.min()) == x.values.shape[1]


def take(values: Tensor, index: Tensor) -> Tensor:
    """Picks ``values[b, index[b, t]]``: (B, T, ...), (B, N) int64 -> (B, N, ...)."""
    if not values.shape[1]:  # rows without values: whatever is picked lies behind their ends
        values = values.new_zeros(values.shape[0], 1, *values.shape[2:])
    index = index.reshape(*index.shape, *([1] * (values.dim() - 2))).expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)


def split_at(x: Padded, lengths: Tensor) -> tuple[Padded, Padded]:
    """Cuts each row after ``lengths[b]`` values; both parts are left-aligned."""
    rest = x.lengths - lengths
    if lengths.device.type == "cpu" and lengths.shape[0]:
        cuts = lengths.tolist()
        if min(cuts) == max(cuts):  # as when a session is alone: both parts are there as they lie
            cut = cuts[0]
            return Padded(x.values[:, :cut], lengths), Padded(x.values[:, cut : cut + int(rest.max())], rest)
    head = Padded(x.values[:, : int(lengths.max())], lengths)
    index = lengths[:, None] + torch.arange(int(rest.max()), device=lengths.device)
    return head, Padded(take(x.values, index.clamp(max=max(x.values.shape[1] - 1, 0))), rest)


def roll_in(cache: Tensor, x: Padded, width: int) -> tuple[Tensor, Tensor]:
    """Appends a ragged batch to right-aligned caches.

    Args:
        cache: (B, W, ...) the last W values of each row, the newest at the right.
        x: (B, T, ...) what is new.
        width: size of the cache to keep.
    Returns:
        (B, W + T, ...) cache and new values side by side, and the new cache (B, width, ...).
    """
    joined = torch.cat([cache, x.values], 1)
    # Where all rows are full, as when a session is alone, the new cache is the end of the joined one as it lies there.
    # To ask is to wait for the device, so only where that is the processor.
    if joined.device.type == "cpu" and width <= joined.shape[1] and _is_full(x):
        return joined, joined[:, joined.shape[1] - width :]
    index = cache.shape[1] - width + x.lengths[:, None] + torch.arange(width, device=cache.device)
    return joined, take(joined, index.clamp(min=0))


def map_state(visit: Callable[..., object], *states: object) -> object:
    """A state whose leaves are `visit(leaf, ...)` of the leaves of states that are made alike.

    Leaves are tensors, `Padded` and settings, which are anything but lists and dataclasses.
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
    """Makes the given rows (B,) bool of a state equal to those of a fresh one, whatever the state is made of."""

    def reset(old: object, new: object) -> object:
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            if old.dim() > 1 and old.shape[1] != new.shape[1]:  # a grown cache: the counts say which values are valid
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
    """What states must have in common to be joined: structure, dtypes, sizes behind time, and all that is no tensor."""
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
    """One state whose rows are those of the given ones, in order.

    Caches of unequal widths are right-aligned: the narrower ones get zeros at the left, which lie before the first
    position of their rows and are hidden there.

    Raises:
        ValueError: the states were made with unequal settings, see `state_settings`.
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
    """(B, T, ...) -> (B, width, ...) with zeros at the one side or the other."""
    missing = width - values.shape[1]
    if not missing:
        return values
    zeros = values.new_zeros(values.shape[0], missing, *values.shape[2:])
    return torch.cat([zeros, values] if left else [values, zeros], 1)


def state_row(state: StateT, row: int) -> StateT:
    """One row of a state as a state of its own: a copy, which does not keep the other rows' memory alive."""

    def copy(leaf: object) -> object:
        if isinstance(leaf, Padded):
            length = int(leaf.lengths[row])
            return Padded(leaf.values[row : row + 1, :length].clone(), leaf.lengths[row : row + 1].clone())
        return leaf[row : row + 1].clone() if isinstance(leaf, Tensor) else leaf

    return cast(StateT, map_state(copy, state))


class StreamingStage(Protocol[StateT]):
    """What every streaming stage offers; see the module's text for the contract."""

    def init_state(self, batch_size: int) -> StateT: ...
    def step(self, x: Padded, state: StateT) -> Padded: ...
    def flush(self, state: StateT, rows: Tensor | None = None) -> Padded: ...
    def __call__(self, x: Padded) -> Padded: ...


class CausalConv1d(nn.Conv1d):
    """A convolution over time that sees only the past: (B, T, C_in) -> (B, T / stride, C_out).

    The cache is (B, dilation * (kernel_size - 1), C_in), zeros at the start, as left padding. With a stride, every
    chunk must be a multiple of it.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel_size: int, stride: int = 1, dilation: int = 1, groups: int = 1
    ) -> None:
        super().__init__(channels_in, channels_out, kernel_size, stride, dilation=dilation, groups=groups)
        self.context = dilation * (kernel_size - 1)

    def init_cache(self, batch_size: int) -> Tensor:
        return self.weight.new_zeros(batch_size, self.context, self.in_channels)

    def step(self, x: Padded, cache: Tensor) -> tuple[Padded, Tensor]:
        """Returns the output of the new frames and the new cache."""
        joined, cache = roll_in(cache.to(x.values.dtype), x, self.context)
        y = super().forward(joined.transpose(1, 2)).transpose(1, 2)  # (B, T / stride, C_out)
        return Padded(y, x.lengths // self.stride[0]), cache


@dataclass
class AttentionCache:
    """Keys and values of the past, right-aligned, (B, W, H, D)."""

    keys: Tensor
    values: Tensor


def drop_padding(caches: Sequence[AttentionCache], start: Tensor) -> int:
    """Cuts growing caches to the longest past of any row, start (B,), and returns their width.

    A row that once shared a step with a longer one has zeros at the left of its caches until this is called.
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
    """Which keys each query sees: its own block whole, and the past blocks.

    Args:
        start: (B,) absolute position of the first new frame of each row.
        x: the new frames, for their lengths.
        num_cached: W, width of the caches.
        block_of: maps absolute positions to block numbers.
        past_blocks: how many blocks of the past are seen besides the own one; None for all.
        num_valid: (B,) absolute positions from here on are padding and hidden as keys.
    Returns:
        (B, 1, T, W + T) bool. Queries behind a row's end see themselves, so that they stay finite.
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
    """Attention of new frames over cached and new ones; replaces what the cache holds.

    Args:
        query: (B, T, H, D); key, value: the same shape, key with the rows' lengths.
        cache: keys and values of the past; replaced by the last `width` ones (None: all).
        mask: from `attention_mask`; None where every query sees every key, cached and new.
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
    """Scaled dot-product attention: (B, H, T, D) over keys and values (B, H, W, D) -> (B, H, T, D).

    Args:
        mask: bool, broadcast to (B, H, T, W), true where a query sees a key; None where it sees every one.
    """
    if torch.is_grad_enabled() and query.device.type == "cpu":
        # The gradient of the fused attention is three times slower on a CPU than that of these three products.
        scores = (query @ keys.transpose(2, 3)) * query.shape[-1] ** -0.5
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        weighed: Tensor = scores.softmax(-1) @ values
        return weighed
    return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


def rotate(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary position embedding over all of D, halves paired: x (B, T, H, D), positions (B, T) int64."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[:, :, None, None].float() * frequency  # (B, T, 1, D / 2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def sinusoids(num_positions: int, width: int, max_timescale: float = 10000.0) -> Tensor:
    """Whisper's position table: (num_positions, width), sines in the first half, cosines in the second."""
    scales = torch.exp(-torch.arange(width // 2) * (torch.log(torch.tensor(max_timescale)) / (width // 2 - 1)))
    angle = torch.arange(num_positions)[:, None] * scales
    return torch.cat([angle.sin(), angle.cos()], 1)


def num_step_threads(*modules: nn.Module) -> int:
    """Threads of the CPU for the steps of some modules: one for small ones, else as many as PyTorch takes by itself.

    The operations of a small model are over before a second thread has woken for them: with two threads a step of
    pocket's language model takes up to twice as long, and both cores are busy with it (docs/engines.md).
    """
    num_parameters = sum(parameter.numel() for module in modules for parameter in module.parameters())
    return 1 if num_parameters <= _FEW_PARAMETERS else torch.get_num_threads()


@contextmanager
def step_threads(*modules: nn.Module) -> Iterator[None]:
    """Steps of these modules in the calling thread, with as many threads of the CPU as `num_step_threads` says."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_step_threads(*modules))
    try:
        yield
    finally:
        torch.set_num_threads(before)
