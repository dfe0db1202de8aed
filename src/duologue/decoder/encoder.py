"""Token encoder and length regulation: speech tokens -> the flow's condition per frame.

Shapes: B batch, T tokens or frames, D width, H heads, C condition channels.

Frame i belongs to token 64 i // 441, and tokens 0..n-1 have the frames 0..441 n // 64 - 1 (`duologue.rates`). The
functions here compute this on integer tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from duologue import rates
from duologue.layers import AttentionCache, Padded, attend, attention_mask, roll_in, rotate, take

FRAMES, TOKENS = rates.FRAMES_PER_TOKEN.numerator, rates.FRAMES_PER_TOKEN.denominator  # 441 frames are 64 tokens


def frames_for_tokens(num_tokens: Tensor) -> Tensor:
    """Computes `rates.frames_for_tokens` on int64 tensors."""
    return num_tokens * FRAMES // TOKENS


def token_of_frame(frame: Tensor) -> Tensor:
    """Computes `rates.token_of_frame` on int64 tensors."""
    return frame * TOKENS // FRAMES


def phase_of_frame(frame: Tensor) -> Tensor:
    """Returns a frame's offset within its token, in 441ths of a token: 0..440."""
    return frame * TOKENS % FRAMES


def block_of_frame(frame: Tensor) -> Tensor:
    """Returns the block b of 10 tokens with F(10 b) <= frame < F(10 (b + 1)), F(n) = 441 n // 64."""
    return (frame * TOKENS + TOKENS - 1) // (FRAMES * rates.BLOCK_TOKENS)


def block_of_token(token: Tensor) -> Tensor:
    return token // rates.BLOCK_TOKENS


@dataclass(frozen=True)
class TokenEncoderConfig:
    """Sizes of the token encoder. Recipes hold the sizes of trained models.

    Attributes:
        codebook_size: number of speech codes, equal to the tokenizer's.
        past_blocks: number of visible past blocks of 10 tokens; None for all.
        num_phases: Fourier pairs that encode the frame's offset within its token.
    """

    codebook_size: int = 2048
    width: int = 192
    num_heads: int = 6
    ffn_dim: int = 512
    num_layers: int = 2
    past_blocks: int | None = 4
    num_phases: int = 4


class TokenEncoderLayer(nn.Module):
    """A pre-norm transformer layer with rotary positions."""

    def __init__(self, config: TokenEncoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.context = None if config.past_blocks is None else config.past_blocks * rates.BLOCK_TOKENS
        self.norm1 = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.width)

    def init_cache(self, batch_size: int) -> AttentionCache:
        width = self.out.in_features
        empty = self.out.weight.new_zeros(batch_size, 0, self.num_heads, width // self.num_heads)
        return AttentionCache(empty, empty)

    def step(self, x: Padded, cache: AttentionCache, mask: Tensor, positions: Tensor) -> Padded:
        """Processes (B, T, D) new tokens at absolute positions (B, T) with a mask from `attention_mask`."""
        qkv = self.qkv(self.norm1(x.values)).unflatten(-1, (3 * self.num_heads, -1))  # (B, T, 3 H, D / H)
        query, key, value = qkv.chunk(3, 2)
        key = Padded(rotate(key, positions), x.lengths)
        h = x.values + self.out(attend(rotate(query, positions), key, value, cache, mask, self.context))
        return Padded(h + self.fc2(functional.gelu(self.fc1(self.norm2(h)))), x.lengths)


@dataclass
class TokenEncoderState:
    """Streaming state of the token encoder.

    Attributes:
        start: (B,) tokens encoded so far.
        last: (B, 1, D) output for the newest token, to which the next block's first frame may belong.
        layers: one attention cache per layer.
    """

    start: Tensor
    last: Tensor
    layers: list[AttentionCache]


class TokenEncoder(nn.Module):
    """Speech tokens (B, T) int64 + speaker (B, S) -> condition (B, 441 T / 64, C) at the mel frame rate.

    Attention is block-causal: a token sees its own block of 10 and `past_blocks` before it. Input comes in whole
    blocks, except at the end of an utterance.
    """

    def __init__(self, config: TokenEncoderConfig, speaker_dim: int, condition_dim: int) -> None:
        super().__init__()
        if config.width % config.num_heads or config.width // config.num_heads % 2:
            raise ValueError(f"encoder width {config.width} must be an even multiple of num_heads {config.num_heads}")
        self.config = config
        self.embed_tokens = nn.Embedding(config.codebook_size, config.width)
        self.speaker = nn.Linear(speaker_dim, config.width, bias=False)  # a zero speaker adds nothing
        self.layers = nn.ModuleList(TokenEncoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)
        self.regulate1 = nn.Linear(config.width + 2 * config.num_phases, config.width)
        self.regulate2 = nn.Linear(config.width, condition_dim)

    def init_state(self, batch_size: int) -> TokenEncoderState:
        start = torch.zeros(batch_size, dtype=torch.int64, device=self.norm.weight.device)
        last = self.norm.weight.new_zeros(batch_size, 1, self.config.width)
        return TokenEncoderState(start, last, [layer.init_cache(batch_size) for layer in self.layers])  # type: ignore[operator]

    def step(self, tokens: Padded, speaker: Tensor, state: TokenEncoderState) -> Padded:
        """Encodes whole blocks, or the end of an utterance, and upsamples them to frames.

        Args:
            tokens: (B, T) int64; rows begin at multiples of 10 tokens.
            speaker: (B, S).

        Returns:
            (B, F, C): frames F(start) .. F(start + T) - 1 of each row.

        Raises:
            ValueError: a token is outside the codebook.
        """
        check_tokens(tokens, self.config.codebook_size)
        start = state.start
        codes = tokens.values.clamp(0, self.config.codebook_size - 1)  # what lies behind a row's end is arbitrary
        x = Padded(self.embed_tokens(codes) + self.speaker(speaker)[:, None], tokens.lengths)
        positions = start[:, None] + torch.arange(x.values.shape[1], device=start.device)
        num_cached = state.layers[0].keys.shape[1] if state.layers else 0
        mask = attention_mask(start, x, num_cached, block_of_token, self.config.past_blocks)
        for layer, cache in zip(self.layers, state.layers, strict=True):
            x = layer.step(x, cache, mask, positions)  # type: ignore[operator]
        state.start = start + x.lengths
        return self._regulate(Padded(self.norm(x.values), x.lengths), start, state)

    def _regulate(self, x: Padded, start: Tensor, state: TokenEncoderState) -> Padded:
        """Upsamples tokens to frames by absolute index, with the offset within the token as a feature."""
        first = frames_for_tokens(start)
        lengths = frames_for_tokens(start + x.lengths) - first
        joined, state.last = roll_in(state.last.to(x.values.dtype), x, 1)  # token start - 1, start, ...
        frame = first[:, None] + torch.arange(int(lengths.max()), device=start.device)
        index = (token_of_frame(frame) - start[:, None] + 1).clamp(max=joined.shape[1] - 1)
        harmonics = torch.arange(1, self.config.num_phases + 1, device=start.device)
        angle = phase_of_frame(frame)[:, :, None] * harmonics * (2 * math.pi / FRAMES)  # (B, F, num_phases)
        h = torch.cat([take(joined, index), angle.cos().to(joined.dtype), angle.sin().to(joined.dtype)], -1)
        return Padded(self.regulate2(functional.silu(self.regulate1(h))), lengths)


def check_tokens(tokens: Padded, codebook_size: int) -> None:
    """Raises ValueError if a valid token is outside 0..codebook_size - 1."""
    wrong = ((tokens.values < 0) | (tokens.values >= codebook_size)) & tokens.mask
    if bool(wrong.any()):
        raise ValueError(f"speech token {int(tokens.values[wrong][0])} is outside of 0..{codebook_size - 1}")
