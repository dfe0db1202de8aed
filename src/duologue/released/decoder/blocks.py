"""Block sizes and overlaps of streaming in the released flow, and the ragged arithmetic of block borders.

Shapes: B batch, T mel frames, M mels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from duologue import rates
from duologue.layers import Padded, split_at

# Whole frames and whole blocks of 10: 320 tokens are exactly 2205 frames.
FORGET_TOKENS = 320
_MOST_TOKENS = 200


@dataclass(frozen=True)
class Streaming:
    """Settings of streaming.

    Attributes:
        block_tokens: block sizes; the last repeats. None decodes all whole tens of tokens of a call, at most 200. Empty
            decodes a single block at the end.
        overlap_frames: mel frames held back at the end of a block and cross-faded with the next.
        window_frames: output frames (or one more) visible before a block; None for all as in the released code, at
            quadratic cost.
        context_tokens: maximum past tokens of the encoder. Beyond it, length regulator and U-Net forget the oldest 320.
            None never forgets.
    """

    block_tokens: tuple[int, ...] | None = None
    overlap_frames: int = 12
    window_frames: int | None = 100
    context_tokens: int | None = 1280

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.block_tokens or ()):
            raise ValueError(f"block_tokens must be positive, got {list(self.block_tokens or ())}")
        for name in ("overlap_frames", "window_frames"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.context_tokens is None:
            return
        if self.context_tokens < 2 * FORGET_TOKENS:
            raise ValueError(f"context_tokens must be at least {2 * FORGET_TOKENS}, got {self.context_tokens}")
        most = rates.frames_for_tokens(self.context_tokens - FORGET_TOKENS) - self.overlap_frames
        if (self.window_frames or 0) > most:
            raise ValueError(
                f"window_frames is {self.window_frames}; context_tokens {self.context_tokens} and overlap_frames "
                f"{self.overlap_frames} leave {most}"
            )

    def ready(self, num_pending: Tensor, num_blocks: Tensor) -> Tensor:
        """Returns the tokens of the next block of each row (B,), 0 if incomplete.

        Args:
            num_pending: (B,) waiting tokens.
            num_blocks: (B,) decoded blocks.
        """
        if self.block_tokens is None:
            return (num_pending // rates.BLOCK_TOKENS * rates.BLOCK_TOKENS).clamp(max=_MOST_TOKENS)
        if not self.block_tokens:
            return torch.zeros_like(num_pending)
        sizes = torch.tensor(self.block_tokens, device=num_blocks.device)
        size = sizes[num_blocks.clamp(max=len(self.block_tokens) - 1)]
        return torch.where(num_pending >= size, size, 0)

    def first_frame(self, given: Tensor, forgotten: Tensor) -> Tensor:
        """Returns the first visible frame of a block, after `given` output frames and `forgotten` ones (B,).

        It is even because the U-Net halves the rate.
        """
        if self.window_frames is None:
            return forgotten
        return ((given - self.window_frames).clamp(min=0) // 2 * 2).maximum(forgotten)


# All of an utterance in one block.
OFFLINE = Streaming(block_tokens=(), window_frames=None)


def select(x: Padded, index: Tensor) -> Padded:
    """Selects rows of a batch and trims its width."""
    lengths = x.lengths[index]
    return Padded(x.values[index, : int(lengths.max())], lengths)


def last_of(x: Padded, lengths: Tensor) -> Padded:
    """Returns the last `lengths` (B,) values of each row."""
    return split_at(x, x.lengths - lengths)[1]


def where_rows(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Selects rows from two tensors (B, T, ...), padded to one width."""
    width = max(new.shape[1], old.shape[1])
    behind = [0, 0] * (new.dim() - 2)
    new, old = (functional.pad(x, (*behind, 0, width - x.shape[1])) for x in (new, old))
    return torch.where(rows.reshape(-1, *[1] * (new.dim() - 1)), new, old)


def fade(held: Padded, raw: Padded) -> Padded:
    """Cross-fades from the held-back frames of the last block to this block's.

    The first frame is almost the last block's, which avoids a step in the output.
    """
    overlap = torch.minimum(held.lengths, raw.lengths)
    width = int(overlap.max())
    place = torch.arange(width, device=overlap.device)
    weight = ((place + 1) / (overlap[:, None] + 1)).clamp(max=1)[:, :, None].to(raw.values.dtype)
    mixed = raw.values[:, :width] * weight + held.values[:, :width] * (1 - weight)
    mixed = torch.where((place < overlap[:, None])[:, :, None], mixed, raw.values[:, :width])
    return Padded(torch.cat([mixed, raw.values[:, width:]], 1), raw.lengths)
