"""Vocoder: log-mel at 22.05 kHz -> wav, a causal ConvNeXt with an inverse STFT after Vocos (arXiv:2306.00814).

Depthwise convolutions see the past only. The inverse STFT holds back samples to which the next frame adds.

Shapes: B batch, T frames, S samples, M mels, D width, F frequency bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from duologue import rates
from duologue.audio import SpeakMel
from duologue.layers import CausalConv1d, Padded, reset_rows, roll_in, split_at, take

MEL_FLOOR = math.log(1e-5)  # what `SpeakMel` gives for digital silence
_MEL_SCALE = 4.0  # brings the mel to about 0..3
_MAX_LOG_MAGNITUDE = 6.0  # a full-scale sine under the window is log(256) = 5.5


@dataclass(frozen=True)
class VocoderConfig:
    """Sizes of the vocoder; the defaults are pocket's (2.0 M parameters).

    Attributes:
        kernel_size: of the causal convolutions, in mel frames.
        lookahead_frames: mel frames of lookahead. Without lookahead, the phase of a burst is fixed before the mel shows
            its course. Two frames shorten the first chunk by 23 ms; the time to first audio is unchanged.
    """

    num_mels: int = SpeakMel.num_mels
    width: int = 224
    ffn_dim: int = 512
    num_layers: int = 7
    kernel_size: int = 7
    lookahead_frames: int = 2

    def __post_init__(self) -> None:
        if self.num_mels != SpeakMel.num_mels:
            raise ValueError(f"num_mels is {self.num_mels}; the decoder's mel has {SpeakMel.num_mels}")
        for name in ("width", "ffn_dim", "num_layers", "kernel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.lookahead_frames < 0:
            raise ValueError(f"lookahead_frames must not be negative, got {self.lookahead_frames}")


class ConvNeXtBlock(nn.Module):
    """Depthwise causal convolution, LayerNorm, two pointwise layers, layer scale and residual."""

    def __init__(self, width: int, ffn_dim: int, kernel_size: int, scale: float) -> None:
        super().__init__()
        self.depthwise = CausalConv1d(width, width, kernel_size, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, ffn_dim)
        self.project = nn.Linear(ffn_dim, width)
        self.scale = nn.Parameter(torch.full((width,), scale))

    def step(self, x: Padded, cache: Tensor) -> tuple[Padded, Tensor]:
        """Applies the block to (B, T, D) new frames; returns them and the new convolution cache."""
        h, cache = self.depthwise.step(x, cache)
        y = self.project(functional.gelu(self.expand(self.norm(h.values))))
        return Padded(x.values + self.scale * y, x.lengths), cache


class SpectrumHead(nn.Module):
    """Features (B, T, D) and mel -> complex spectra (B, T, F), as log-magnitude and the cosine and sine of the phase.

    A linear layer, initialized from the mel filters, adds the mel's envelope to the log-magnitude, so the network
    learns only the remainder.
    """

    def __init__(self, width: int, num_mels: int, num_bins: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, 2 * num_bins)
        nn.init.normal_(self.out.weight, std=0.02)
        # Phases are initially 0 at the center of the window.
        phase = math.pi * (torch.arange(num_bins) % 2)
        with torch.no_grad():
            self.out.bias.copy_(torch.cat([torch.zeros(num_bins), phase]))
        self.envelope = nn.Linear(num_mels, num_bins)
        filters = SpeakMel().filters  # (F, M)
        share = filters / filters.sum(1, keepdim=True).clamp(min=1e-8)
        covered = filters.sum(1) > 0
        # A filter of area A over a flat spectrum of magnitude X gives A X.
        bias = MEL_FLOOR - share @ filters.sum(0).log()
        with torch.no_grad():
            self.envelope.weight.copy_(share * _MEL_SCALE)
            self.envelope.bias.copy_(torch.where(covered, bias, MEL_FLOOR))

    def forward(self, x: Tensor, mel: Tensor) -> Tensor:
        h = self.out(x)
        with torch.autocast(h.device.type, enabled=False):  # float32 from here to the wav
            log_magnitude, phase = h.float().chunk(2, -1)
            magnitude = (log_magnitude + self.envelope(mel.float())).clamp(max=_MAX_LOG_MAGNITUDE).exp()
            return torch.complex(magnitude * phase.cos(), magnitude * phase.sin())


@dataclass
class VocoderState:
    """Streaming state of the vocoder.

    Attributes:
        embed: (B, kernel_size - 1, M) convolution cache.
        mel: (B, lookahead_frames, M) lookahead.
        blocks: convolution caches, each (B, kernel_size - 1, D).
        to_drop: (B,) leading frames still to be removed for the lookahead.
        edge, edge_norm: (B, n_fft - hop) overlap-add samples and their window power.
        to_skip: (B,) leading samples of the first window still to be removed.
    """

    embed: Tensor
    mel: Tensor
    blocks: list[Tensor]
    to_drop: Tensor
    edge: Tensor
    edge_norm: Tensor
    to_skip: Tensor


class Vocoder(nn.Module):
    """Natural-log mel (B, T, M) of `SpeakMel` -> wav (B, 256 T) float32 at 22.05 kHz, a streaming stage.

    Frame i covers samples 256 i - 384 .. 256 i + 640. A step holds back `lookahead` samples; `flush` appends silence
    and returns them.
    """

    window: Tensor
    n_fft = SpeakMel.n_fft
    hop = rates.SPEAK_HOP

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = CausalConv1d(config.num_mels, config.width, config.kernel_size)
        self.embed_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(config.width, config.ffn_dim, config.kernel_size, 1.0 / config.num_layers)
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = SpectrumHead(config.width, config.num_mels, 1 + self.n_fft // 2)
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)

    @property
    def edge(self) -> int:
        """Samples of a window before and after its hop: 384."""
        return (self.n_fft - self.hop) // 2

    @property
    def lookahead(self) -> int:
        """Samples held back by a step: T frames give 256 T - `lookahead` final samples."""
        return self.edge + self.config.lookahead_frames * self.hop

    def init_state(self, batch_size: int) -> VocoderState:
        zeros = self.window.new_zeros
        return VocoderState(
            embed=self.embed.init_cache(batch_size),
            mel=zeros(batch_size, self.config.lookahead_frames, self.config.num_mels),
            blocks=[block.depthwise.init_cache(batch_size) for block in self.blocks],  # type: ignore[union-attr, operator]
            to_drop=zeros(batch_size, dtype=torch.int64) + self.config.lookahead_frames,
            edge=zeros(batch_size, self.n_fft - self.hop),
            edge_norm=zeros(batch_size, self.n_fft - self.hop),
            to_skip=zeros(batch_size, dtype=torch.int64) + self.edge,
        )

    def step(self, x: Padded, state: VocoderState) -> Padded:
        """Decodes mel (B, T, M) and returns final samples (B, S)."""
        return self._emit(self._overlap_add(self._frames(self._normalize(x), state), state), state)

    def flush(self, state: VocoderState, rows: Tensor | None = None) -> Padded:
        """Ends the utterance and returns the samples held back."""
        rows = torch.ones_like(state.to_drop, dtype=torch.bool) if rows is None else rows
        wav = self._overlap_add(self._frames(self._silence(rows), state), state)
        wav = self._emit(Padded.concat([wav, self._last(state, rows)]), state)
        reset_rows(state, self.init_state(len(rows)), rows)
        return wav

    def forward(self, x: Padded) -> Padded:
        """Decodes mel (B, T, M) to wav (B, 256 T) in one pass, equal to a stream."""
        state = self.init_state(len(x.lengths))
        rows = torch.ones_like(x.lengths, dtype=torch.bool)
        frames = self._frames(Padded.concat([self._normalize(x), self._silence(rows)]), state)
        wav = self._overlap_add(frames, state)
        return self._emit(Padded.concat([wav, self._last(state, rows)]), state)

    def _normalize(self, mel: Padded) -> Padded:
        """Maps silence to 0, so that zero padding is silence."""
        return Padded((mel.values.float() - MEL_FLOOR) / _MEL_SCALE, mel.lengths)

    def _silence(self, rows: Tensor) -> Padded:
        num_frames = self.config.lookahead_frames
        return Padded(self.window.new_zeros(len(rows), num_frames, self.config.num_mels), rows * num_frames)

    def _frames(self, x: Padded, state: VocoderState) -> Padded:
        """Computes windowed frames (B, T', n_fft), `lookahead_frames` behind the normalized mel (B, T, M)."""
        if not x.values.shape[1]:  # convolutions need at least one kernel width
            return Padded(self.window.new_zeros(len(x.lengths), 0, self.n_fft), x.lengths)
        joined, state.mel = roll_in(state.mel, x, self.config.lookahead_frames)
        mel = Padded(joined[:, : x.values.shape[1]], x.lengths)
        h, state.embed = self.embed.step(x, state.embed)
        early = torch.minimum(state.to_drop, x.lengths)
        state.to_drop = state.to_drop - early
        (_, mel), (_, h) = split_at(mel, early), split_at(h, early)
        if not h.values.shape[1]:
            return Padded(self.window.new_zeros(len(h.lengths), 0, self.n_fft), h.lengths)
        h = Padded(self.embed_norm(h.values), h.lengths)
        for i, block in enumerate(self.blocks):
            h, state.blocks[i] = block.step(h, state.blocks[i])  # type: ignore[operator]
        spectrum = self.head(self.norm(h.values), mel.values)
        return Padded(torch.fft.irfft(spectrum, self.n_fft) * self.window, h.lengths)

    def _overlap_add(self, frames: Padded, state: VocoderState) -> Padded:
        """Overlap-adds frames (B, T, n_fft) and returns the final samples (B, 256 T)."""
        frames = frames.zeroed()
        power = self.window.square() * frames.mask[:, :, None]
        lengths = frames.lengths * self.hop
        wav, state.edge = self._add(frames.values, state.edge, lengths)
        norm, state.edge_norm = self._add(power, state.edge_norm, lengths)
        return Padded(_divide(wav, norm), lengths)

    def _add(self, frames: Tensor, edge: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Adds frames (B, T, n_fft) at their hops to the edge; returns (B, 256 T) and the next edge."""
        num_hops = self.n_fft // self.hop
        parts = frames.unflatten(-1, (num_hops, self.hop))  # (B, T, 4, 256)
        total = functional.pad(edge, (0, frames.shape[1] * self.hop))
        for i in range(num_hops):
            before, after = i * self.hop, (num_hops - 1 - i) * self.hop
            total = total + functional.pad(parts[:, :, i].flatten(1), (before, after))
        index = lengths[:, None] + torch.arange(edge.shape[1], device=edge.device)
        return total[:, : frames.shape[1] * self.hop], take(total, index)

    def _last(self, state: VocoderState, rows: Tensor) -> Padded:
        """Returns the ending rows' own samples of the edge."""
        return Padded(_divide(state.edge, state.edge_norm)[:, : self.edge], rows * self.edge)

    def _emit(self, wav: Padded, state: VocoderState) -> Padded:
        """Removes the samples before the start of the utterance."""
        early = torch.minimum(state.to_skip, wav.lengths)
        state.to_skip = state.to_skip - early
        return split_at(wav, early)[1]


def _divide(wav: Tensor, norm: Tensor) -> Tensor:
    """Divides by the window power, which is at least 0.7 for valid samples."""
    return wav / norm.clamp(min=0.1)
