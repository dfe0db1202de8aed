"""Vocoder: log-mel at 22.05 kHz -> wave, by a causal ConvNeXt that predicts spectra and an inverse STFT.

After Vocos (arXiv 2306.00814), made causal: depthwise convolutions see the past only, and the inverse STFT holds back
what the next frame still adds to.

Shapes: B batch, T frames, S samples, M mels, D width, F bins of the spectrum.
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
        lookahead_frames: mel frames after a frame that are seen before its spectrum is made. The window of a frame
            is centered 128 samples into its hop, so without lookahead the phase of a burst must be chosen before the
            mel shows how it goes on. Two frames cost 23 ms once at the start of a reply, a 35th of the decoder's
            block of 0.8 s, and the time to first audio does not change: they shorten the first chunk instead.
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
    """Depthwise causal convolution, LayerNorm over channels, two pointwise layers, layer scale, residual."""

    def __init__(self, width: int, ffn_dim: int, kernel_size: int, scale: float) -> None:
        super().__init__()
        self.depthwise = CausalConv1d(width, width, kernel_size, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, ffn_dim)
        self.project = nn.Linear(ffn_dim, width)
        self.scale = nn.Parameter(torch.full((width,), scale))

    def step(self, x: Padded, cache: Tensor) -> tuple[Padded, Tensor]:
        """(B, T, D) new frames and the convolution's cache -> the same, one block later."""
        h, cache = self.depthwise.step(x, cache)
        y = self.project(functional.gelu(self.expand(self.norm(h.values))))
        return Padded(x.values + self.scale * y, x.lengths), cache


class SpectrumHead(nn.Module):
    """(B, T, D) and the mel of the same frames -> complex spectra (B, T, F): log-magnitude, and phase by cos and sin.

    The mel goes straight to the log-magnitude too, by weights that begin as the mel filters read backwards: the
    network learns what the mel leaves open instead of the envelope.
    """

    def __init__(self, width: int, num_mels: int, num_bins: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, 2 * num_bins)
        nn.init.normal_(self.out.weight, std=0.02)
        # Phases begin at 0 as seen from the middle of the window, where the window keeps what they add up to.
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
        with torch.autocast(h.device.type, enabled=False):  # no bf16 between here and the wave
            log_magnitude, phase = h.float().chunk(2, -1)
            magnitude = (log_magnitude + self.envelope(mel.float())).clamp(max=_MAX_LOG_MAGNITUDE).exp()
            return torch.complex(magnitude * phase.cos(), magnitude * phase.sin())


@dataclass
class VocoderState:
    """Caches of the convolutions, the mel of the frames looked ahead to, and the overlap-add edge.

    Attributes:
        embed: (B, kernel_size - 1, M); mel: (B, lookahead_frames, M); blocks: each (B, kernel_size - 1, D).
        to_drop: (B,) frames before the first one, which the lookahead still has to take away.
        edge, edge_norm: (B, n_fft - hop) samples that later frames add to, and the window power they have got.
        to_skip: (B,) samples before the first one, which the first window still has to take away.
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

    Frame i covers samples 256 i - 384 .. 256 i + 640, as in `SpeakMel`. A step holds back `lookahead` samples, which
    the next frames add to; `flush` lets silence follow and emits them.
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
        """Samples by which a window reaches out before and after its hop: 384."""
        return (self.n_fft - self.hop) // 2

    @property
    def lookahead(self) -> int:
        """Samples that a step holds back: T frames give 256 T - `lookahead` final samples."""
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
        """mel (B, T, M) -> the samples that have become final (B, S)."""
        return self._emit(self._overlap_add(self._frames(self._normalize(x), state), state), state)

    def flush(self, state: VocoderState, rows: Tensor | None = None) -> Padded:
        """End of speech: the samples held back."""
        rows = torch.ones_like(state.to_drop, dtype=torch.bool) if rows is None else rows
        wav = self._overlap_add(self._frames(self._silence(rows), state), state)
        wav = self._emit(Padded.concat([wav, self._last(state, rows)]), state)
        reset_rows(state, self.init_state(len(rows)), rows)
        return wav

    def forward(self, x: Padded) -> Padded:
        """mel (B, T, M) -> wav (B, 256 T); what a stream gives, at once."""
        state = self.init_state(len(x.lengths))
        rows = torch.ones_like(x.lengths, dtype=torch.bool)
        frames = self._frames(Padded.concat([self._normalize(x), self._silence(rows)]), state)
        wav = self._overlap_add(frames, state)
        return self._emit(Padded.concat([wav, self._last(state, rows)]), state)

    def _normalize(self, mel: Padded) -> Padded:
        """Silence becomes 0, so that the zeros before and after a row are silence."""
        return Padded((mel.values.float() - MEL_FLOOR) / _MEL_SCALE, mel.lengths)

    def _silence(self, rows: Tensor) -> Padded:
        num_frames = self.config.lookahead_frames
        return Padded(self.window.new_zeros(len(rows), num_frames, self.config.num_mels), rows * num_frames)

    def _frames(self, x: Padded, state: VocoderState) -> Padded:
        """Normalized mel (B, T, M) -> windowed frames of the wave (B, T', n_fft), `lookahead_frames` behind."""
        if not x.values.shape[1]:  # a convolution refuses less than its kernel
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
        """Frames (B, T, n_fft) -> samples that no later frame reaches (B, 256 T)."""
        frames = frames.zeroed()
        power = self.window.square() * frames.mask[:, :, None]
        lengths = frames.lengths * self.hop
        wav, state.edge = self._add(frames.values, state.edge, lengths)
        norm, state.edge_norm = self._add(power, state.edge_norm, lengths)
        return Padded(_divide(wav, norm), lengths)

    def _add(self, frames: Tensor, edge: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Sums frames (B, T, n_fft) at their hops on top of the edge; returns (B, 256 T) and the next edge."""
        num_hops = self.n_fft // self.hop
        parts = frames.unflatten(-1, (num_hops, self.hop))  # (B, T, 4, 256)
        total = functional.pad(edge, (0, frames.shape[1] * self.hop))
        for i in range(num_hops):
            before, after = i * self.hop, (num_hops - 1 - i) * self.hop
            total = total + functional.pad(parts[:, :, i].flatten(1), (before, after))
        index = lengths[:, None] + torch.arange(edge.shape[1], device=edge.device)
        return total[:, : frames.shape[1] * self.hop], take(total, index)

    def _last(self, state: VocoderState, rows: Tensor) -> Padded:
        """The part of the edge that belongs to the ending rows' own samples."""
        return Padded(_divide(state.edge, state.edge_norm)[:, : self.edge], rows * self.edge)

    def _emit(self, wav: Padded, state: VocoderState) -> Padded:
        """Takes away what lies before the first sample."""
        early = torch.minimum(state.to_skip, wav.lengths)
        state.to_skip = state.to_skip - early
        return split_at(wav, early)[1]


def _divide(wav: Tensor, norm: Tensor) -> Tensor:
    """Overlap-add by the windows' power; where samples count it is at least 0.7, elsewhere it may be 0."""
    return wav / norm.clamp(min=0.1)
