"""The listening half of Whisper, made causal: log-mel frames -> one vector per speech token.

Shapes: B batch, T frames (mel at 100 Hz, encoder at 50 Hz, tokens at 12.5 Hz), M mels, D width, H heads.
Parameter names are those of the released checkpoint (docs/checkpoints.md 1.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from duologue import rates
from duologue.layers import AttentionCache, CausalConv1d, Padded, attend, attention_mask, drop_padding, sinusoids


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the encoder. Recipes hold the sizes of trained models.

    Attributes:
        num_layers: layers before the quantizer (released: 16).
        block_frames: attention block in 50 Hz frames (released: 200); a frame sees its own block and the past.
        max_positions: 50 Hz frames in a piece of 30 s.
    """

    num_mels: int = 80
    width: int = 256
    num_heads: int = 4
    ffn_dim: int = 1024
    num_layers: int = 4
    block_frames: int = 40
    max_positions: int = 1500


def attention_weights(width: int) -> nn.ModuleDict:
    """Returns the four projections of one attention of Whisper; `k_proj` has no bias."""
    return nn.ModuleDict(
        {
            "q_proj": nn.Linear(width, width),
            "k_proj": nn.Linear(width, width, bias=False),
            "v_proj": nn.Linear(width, width),
            "out_proj": nn.Linear(width, width),
        }
    )


class EncoderLayer(nn.Module):
    """Whisper's pre-norm transformer layer; `k_proj` has no bias."""

    def __init__(self, width: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.self_attn = attention_weights(width)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def step(self, x: Padded, cache: AttentionCache, mask: Tensor | None) -> Padded:
        """Processes (B, T, D) new frames with a mask from `attention_mask` (None: all visible); the cache keeps the
        whole past."""
        h = self.self_attn_layer_norm(x.values)
        heads = *h.shape[:2], self.num_heads, -1
        query, key, value = (self.self_attn[name](h).view(heads) for name in ("q_proj", "k_proj", "v_proj"))
        attended = attend(query, Padded(key, x.lengths), value, cache, mask, None)
        h = x.values + self.self_attn["out_proj"](attended)
        return Padded(h + self.fc2(functional.gelu(self.fc1(self.final_layer_norm(h)))), x.lengths)

    def init_cache(self, batch_size: int) -> AttentionCache:
        width = self.fc2.out_features
        empty = self.fc2.weight.new_zeros(batch_size, 0, self.num_heads, width // self.num_heads)
        return AttentionCache(empty, empty)


@dataclass
class EncoderState:
    """Streaming state of the encoder: mel frames of the open block, position and caches."""

    pending: Padded
    start: Tensor
    conv1: Tensor
    conv2: Tensor
    layers: list[AttentionCache]


class Encoder(nn.Module):
    """Log-mel (B, T, M) -> (B, T / 8, D) at the token rate. One state covers one piece of at most 30 s."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = CausalConv1d(config.num_mels, config.width, 3)
        self.conv2 = CausalConv1d(config.width, config.width, 3, stride=rates.ENCODER_STRIDE)
        self.embed_positions = nn.Embedding(config.max_positions, config.width)
        # Small, so that codes encode content rather than position; checkpoints have their own table.
        table = 0.1 * sinusoids(config.max_positions, config.width)
        self.embed_positions.weight.requires_grad_(False).copy_(table)
        self.layers = nn.ModuleList(
            EncoderLayer(config.width, config.num_heads, config.ffn_dim) for _ in range(config.num_layers)
        )

    def init_state(self, batch_size: int) -> EncoderState:
        zeros = torch.zeros(batch_size, dtype=torch.int64, device=self.conv1.weight.device)
        pending = Padded(self.conv1.weight.new_zeros(batch_size, 0, self.config.num_mels), zeros)
        layers = [layer.init_cache(batch_size) for layer in self.layers]  # type: ignore[operator]
        caches = self.conv1.init_cache(batch_size), self.conv2.init_cache(batch_size)
        return EncoderState(pending, zeros, *caches, layers)

    def encode(self, mel: Padded, state: EncoderState, num_valid: Tensor | None = None) -> Padded:
        """Encodes complete blocks or the end of a piece: (B, T, M) -> (B, T / 8, D); see `encode_frames`."""
        x = self.encode_frames(mel, state, num_valid)
        return Padded(pool(x.values), x.lengths // rates.POOL)

    def encode_frames(self, mel: Padded, state: EncoderState, num_valid: Tensor | None = None) -> Padded:
        """Encodes frames before pooling: (B, T, M) -> (B, T / 2, D) at 50 Hz.

        Args:
            mel: rows of multiples of 8 frames.
            num_valid: (B,) mel frames of the piece with audio. Later frames pad the last token: they are pooled but
                masked as keys (docs/checkpoints.md 1.2, steps 4 and 5).
        """
        if not mel.values.shape[1]:
            return Padded(mel.values.new_zeros(len(mel.lengths), 0, self.config.width), mel.lengths)
        x, state.conv1 = self.conv1.step(mel, state.conv1)
        x, state.conv2 = self.conv2.step(Padded(functional.gelu(x.values), x.lengths), state.conv2)
        positions = state.start[:, None] + torch.arange(x.values.shape[1], device=state.start.device)
        embedded = self.embed_positions(positions.clamp(max=self.config.max_positions - 1))
        x = Padded(functional.gelu(x.values) + embedded, x.lengths)
        valid = None if num_valid is None else -(-num_valid // rates.ENCODER_STRIDE)
        num_cached = drop_padding(state.layers, state.start)
        mask = None
        if valid is not None or not self._sees_everything(x, state.start, num_cached):
            mask = attention_mask(
                state.start, x, num_cached, lambda position: position // self.config.block_frames, num_valid=valid
            )
        for layer, cache in zip(self.layers, state.layers, strict=True):
            x = layer.step(x, cache, mask)  # type: ignore[operator]
        state.start = state.start + x.lengths
        return x

    def _sees_everything(self, x: Padded, start: Tensor, num_cached: int) -> bool:
        """Returns whether all new frames are one unpadded block per row, so that no mask is needed.

        Always false off the CPU, where the check would synchronize with the device.
        """
        time = x.values.shape[1]
        if start.device.type != "cpu" or time > self.config.block_frames or num_cached % self.config.block_frames:
            return False
        return bool(((start == num_cached) & (x.lengths == time)).all())


def pool(frames: Tensor) -> Tensor:
    """Averages every 4 frames: (B, 4 T, D) -> (B, T, D)."""
    pooled: Tensor = frames.unflatten(1, (-1, rates.POOL)).mean(2)
    return pooled
