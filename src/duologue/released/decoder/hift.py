"""The released vocoder, HiFT: log-mel -> pitch -> harmonics and noise -> spectrum -> wav at 22.05 kHz.

Modules have the names of the released state dict hift.pt (docs/checkpoints.md 3.6), and the config those of its
config.yaml. `HiFT` is the network; `hift_stream.py` makes it a streaming stage.

Shapes: B batch, T mel frames, S samples (256 T), M mels, C channels, K harmonics. Ragged batches equal single runs:
convolutions see zeros after a row's end, and transforms end with the row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from duologue.layers import Padded, take
from duologue.released.decoder.regulator import hide, mask_of

_MAX_MAGNITUDE = 100.0
_LAST_SLOPE = 0.01  # torch's default, which the released code leaves before the last convolution


@dataclass(frozen=True)
class PitchConfig:
    """The `hift.f0_predictor` of config.yaml."""

    num_class: Literal[1] = 1
    in_channels: int = 80
    cond_channels: int = 512


@dataclass(frozen=True)
class StftConfig:
    n_fft: int = 16
    hop_len: int = 4

    def __post_init__(self) -> None:
        if self.hop_len < 1 or self.n_fft % (2 * self.hop_len):
            raise ValueError(f"n_fft {self.n_fft} must be an even multiple of hop_len {self.hop_len}")


_DILATIONS = (1, 3, 5)


@dataclass(frozen=True)
class HiFTConfig:
    """The `hift` of config.yaml; the defaults are the published sizes."""

    in_channels: int = 80
    base_channels: int = 512
    nb_harmonics: int = 8
    sampling_rate: int = 22050
    nsf_alpha: float = 0.1
    nsf_sigma: float = 0.003
    nsf_voiced_threshold: float = 10.0
    upsample_rates: tuple[int, ...] = (8, 8)
    upsample_kernel_sizes: tuple[int, ...] = (16, 16)
    istft_params: StftConfig = field(default_factory=StftConfig)
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = (_DILATIONS, _DILATIONS, _DILATIONS)
    source_resblock_kernel_sizes: tuple[int, ...] = (7, 11)
    source_resblock_dilation_sizes: tuple[tuple[int, ...], ...] = (_DILATIONS, _DILATIONS)
    lrelu_slope: float = 0.1
    audio_limit: float = 0.99
    f0_predictor: PitchConfig = field(default_factory=PitchConfig)

    def __post_init__(self) -> None:
        levels = len(self.upsample_rates)
        if not levels or self.base_channels < 1 or self.base_channels % 2**levels:
            raise ValueError(f"base_channels {self.base_channels} cannot be halved {levels} times")
        for name, count in (
            ("upsample_kernel_sizes", levels),
            ("source_resblock_kernel_sizes", levels),
            ("source_resblock_dilation_sizes", levels),
            ("resblock_dilation_sizes", len(self.resblock_kernel_sizes)),
        ):
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name} must have {count} entries, got {list(getattr(self, name))}")
        for rate, kernel in zip(self.upsample_rates, self.upsample_kernel_sizes, strict=True):
            if rate < 1 or kernel < rate or (kernel - rate) % 2:
                raise ValueError(f"an upsample kernel of {kernel} does not fit the rate {rate}")
        if any(kernel % 2 == 0 for kernel in (*self.resblock_kernel_sizes, *self.source_resblock_kernel_sizes)):
            raise ValueError("kernel sizes of residual blocks must be odd")

    @property
    def hop_length(self) -> int:
        """Samples per mel frame."""
        return math.prod(self.upsample_rates) * self.istft_params.hop_len

    @property
    def num_harmonics(self) -> int:
        """Number of harmonics, the fundamental included."""
        return self.nb_harmonics + 1

    @property
    def pitch_reach(self) -> int:
        """Receptive field of the pitch on either side, in mel frames."""
        return PitchPredictor.num_layers

    @property
    def reach(self) -> int:
        """Receptive field of the wav on either side, in mel frames: 14 as published.

        It is summed from the last convolution backwards. At each level the longer path counts, through the source's
        branch or the coarser level.
        """
        finest = math.prod(self.upsample_rates)  # steps in one mel frame
        transform = Fraction(self.istft_params.n_fft, self.hop_length)
        reach = transform + Fraction(3 + 1, finest)  # conv_post, and the mirrored step
        longest, rate = Fraction(0), finest
        for level in reversed(range(len(self.upsample_rates))):
            blocks = zip(self.resblock_kernel_sizes, self.resblock_dilation_sizes, strict=True)
            reach += Fraction(max(_block_reach(kernel, dilations) for kernel, dilations in blocks), rate)
            branch = _block_reach(self.source_resblock_kernel_sizes[level], self.source_resblock_dilation_sizes[level])
            longest = max(longest, reach + Fraction(branch + 2, rate) + transform)
            rate //= self.upsample_rates[level]
            reach += Fraction(self.upsample_kernel_sizes[level], self.upsample_rates[level] * rate)
        return math.ceil(max(longest, reach + 3))  # conv_pre


def _block_reach(kernel: int, dilations: tuple[int, ...]) -> int:
    return sum((kernel - 1) // 2 * (dilation + 1) for dilation in dilations)


class NormedConv1d(nn.Conv1d):
    """Convolution with weight normalization: `weight_v` and `weight_g` per output channel."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, dilation: int = 1) -> None:
        super().__init__(channels_in, channels_out, kernel_size, dilation=dilation)
        self.reach = dilation * (kernel_size - 1) // 2
        _split_weight(self)

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv1d(x, joined_weight(self), self.bias, padding=self.reach, dilation=self.dilation)


class NormedConvTranspose1d(nn.ConvTranspose1d):
    """Transposed convolution with weight normalization: `weight_v` and `weight_g` per input channel."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, stride: int) -> None:
        super().__init__(channels_in, channels_out, kernel_size, stride)
        self.edge = (kernel_size - stride) // 2
        _split_weight(self)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return functional.conv_transpose1d(x, joined_weight(self), self.bias, self.stride, self.edge)


def _split_weight(module: nn.Conv1d | nn.ConvTranspose1d) -> None:
    weight = module.weight.detach()
    del module.weight
    module.weight_g = nn.Parameter(weight.flatten(1).norm(dim=1)[:, None, None])
    module.weight_v = nn.Parameter(weight)


def joined_weight(module: nn.Module) -> Tensor:
    """Returns g v / |v|, or the fused weight."""
    if "weight" in module._parameters:
        return module.weight  # type: ignore[return-value]
    return torch._weight_norm(module.weight_v, module.weight_g, 0)  # type: ignore[arg-type]


class Snake(nn.Module):
    """The activation x + sin(a x)^2 / a with one a per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.alpha[:, None]
        return x + (x * alpha).sin().square() / (alpha + 1e-9)


class ResBlock(nn.Module):
    """Residual block, for each dilation: x + conv2(snake(conv1(snake(x)))), (B, C, T) -> (B, C, T)."""

    def __init__(self, channels: int, kernel_size: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(NormedConv1d(channels, channels, kernel_size, d) for d in dilations)
        self.convs2 = nn.ModuleList(NormedConv1d(channels, channels, kernel_size) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for conv1, conv2, snake1, snake2 in zip(
            self.convs1, self.convs2, self.activations1, self.activations2, strict=True
        ):
            h = hide(conv1(snake1(x)), mask)
            x = x + hide(conv2(snake2(h)), mask)
        return x


class PitchPredictor(nn.Module):
    """Mel (B, M, T) -> F0 (B, T) in Hz, with five frames of context on either side."""

    num_layers = 5

    def __init__(self, config: PitchConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(self.num_layers):
            channels_in = config.cond_channels if i else config.in_channels
            layers += [NormedConv1d(channels_in, config.cond_channels, 3), nn.ELU()]
        self.condnet = nn.Sequential(*layers)
        self.classifier = nn.Linear(config.cond_channels, 1)

    def forward(self, mel: Tensor, mask: Tensor | None = None) -> Tensor:
        h = hide(mel, mask)
        for layer in self.condnet:
            h = layer(h) if isinstance(layer, nn.ELU) else hide(layer(h), mask)
        return self.classifier(h.transpose(1, 2))[:, :, 0].abs()  # type: ignore[no-any-return]


class HarmonicSource(nn.Module):
    """Mixes harmonics (B, S, K) to one channel (B, S); `m_source` of the state dict."""

    def __init__(self, num_harmonics: int) -> None:
        super().__init__()
        self.l_linear = nn.Linear(num_harmonics, 1)

    def forward(self, harmonics: Tensor) -> Tensor:
        return self.l_linear(harmonics)[:, :, 0].tanh()  # type: ignore[no-any-return]


class HiFT(nn.Module):
    """The network: mel -> pitch -> source -> wav, one method each."""

    def __init__(self, config: HiFTConfig) -> None:
        super().__init__()
        self.config = config
        channels = [config.base_channels // 2**i for i in range(len(config.upsample_rates) + 1)]
        bins = config.istft_params.n_fft + 2
        self.m_source = HarmonicSource(config.num_harmonics)
        self.conv_pre = NormedConv1d(config.in_channels, channels[0], 7)
        self.ups = nn.ModuleList(
            NormedConvTranspose1d(channels[i], channels[i + 1], kernel, rate)
            for i, (rate, kernel) in enumerate(zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True))
        )
        self.source_downs = nn.ModuleList()
        self.source_resblocks = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for i, width in enumerate(channels[1:]):
            rate = math.prod(config.upsample_rates[i + 1 :])
            down = nn.Conv1d(bins, width, 1) if rate == 1 else nn.Conv1d(bins, width, 2 * rate, rate, rate // 2)
            self.source_downs.append(down)
            self.source_resblocks.append(
                ResBlock(width, config.source_resblock_kernel_sizes[i], config.source_resblock_dilation_sizes[i])
            )
            for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True):
                self.resblocks.append(ResBlock(width, kernel, dilations))
        self.conv_post = NormedConv1d(channels[-1], bins, 7)
        self.f0_predictor = PitchPredictor(config.f0_predictor)

    def pitch(self, mel: Padded) -> Tensor:
        """Predicts F0 (B, T) in Hz of mel (B, T, M)."""
        return self.f0_predictor(mel.values.transpose(1, 2).contiguous(), mask_of(mel.lengths, mel.values.shape[1]))  # type: ignore[no-any-return]

    def source(self, pitch: Tensor, cycles: Tensor, start: Tensor, noise: Tensor) -> Tensor:
        """Synthesizes the excitation signal.

        Args:
            pitch: (B, T) Hz.
            cycles: (B, S, K) of each harmonic up to and including each sample, modulo 1.
            start: (B, K) initial phase in radians.
            noise: (B, S, K) standard normal.

        Returns:
            (B, S) in [-1, 1].
        """
        config = self.config
        voiced = (pitch > config.nsf_voiced_threshold).repeat_interleave(config.hop_length, 1)[:, :, None]
        voiced = voiced.to(pitch.dtype)
        sine = config.nsf_alpha * torch.sin(2 * math.pi * cycles + start[:, None])
        level = voiced * config.nsf_sigma + (1 - voiced) * config.nsf_alpha / 3
        return self.m_source(sine * voiced + level * noise)  # type: ignore[no-any-return]

    def wave(self, mel: Padded, source: Tensor) -> Tensor:
        """Synthesizes wav (B, S) from mel (B, T, M) and its source (B, S)."""
        config, time = self.config, mel.values.shape[1]
        mask = mask_of(mel.lengths, time)

        def at(rate: int, extra: int = 0) -> Tensor | None:
            return None if mask is None else mask_of(mel.lengths * rate + extra, time * rate + extra)

        last = len(self.ups) - 1
        num_kernels = len(config.resblock_kernel_sizes)
        spectrum = self._spectrum(Padded(source, mel.lengths * config.hop_length))  # (B, n_fft + 2, S / hop + 1)
        h = hide(self.conv_pre(hide(mel.values.transpose(1, 2).contiguous(), mask)), mask)
        rate = 1
        for i, up in enumerate(self.ups):
            rate *= config.upsample_rates[i]
            h = up(functional.leaky_relu(h, config.lrelu_slope))
            finest = i == last
            if finest:
                h = functional.pad(h, (1, 0), mode="reflect")
            here = at(rate, int(finest))
            h = hide(h, here)
            branch = hide(self.source_downs[i](spectrum), here)
            h = h + self.source_resblocks[i](branch, here)
            blocks = self.resblocks[i * num_kernels : (i + 1) * num_kernels]
            h = sum((block(h, here) for block in blocks), torch.zeros_like(h)) / num_kernels
        h = self.conv_post(functional.leaky_relu(h, _LAST_SLOPE)).transpose(1, 2)  # (B, S / hop + 1, n_fft + 2)
        bins = config.istft_params.n_fft // 2 + 1
        magnitude, angle = h[..., :bins].exp().clamp(max=_MAX_MAGNITUDE), h[..., bins:].sin()
        wav = self._inverse(Padded(torch.polar(magnitude, angle), mel.lengths * rate + 1))
        return wav.clamp(-config.audio_limit, config.audio_limit)

    def fuse(self) -> HiFT:
        """Fuses the weight normalization, for inference only."""
        for module in self.modules():
            if isinstance(module, NormedConv1d | NormedConvTranspose1d) and "weight" not in module._parameters:
                module.weight = nn.Parameter(joined_weight(module).detach())
                del module.weight_g, module.weight_v
        return self

    def _window(self, like: Tensor) -> Tensor:
        return torch.hann_window(self.config.istft_params.n_fft, dtype=like.dtype, device=like.device)

    def _spectrum(self, wav: Padded) -> Tensor:
        """Computes the centered STFT, reflected at both ends of each row: (B, S) -> real and imaginary parts (B, n_fft
        + 2, frames)."""
        n_fft, hop = self.config.istft_params.n_fft, self.config.istft_params.hop_len
        size, edge = wav.values.shape[1], n_fft // 2
        end = wav.lengths[:, None] - 1
        index = torch.arange(-edge, size + edge, device=end.device).abs()
        index = torch.where(index > end, 2 * end - index, index).clamp(0, max(size - 1, 0))
        mirrored = take(wav.values, index)
        spectrum = torch.stft(mirrored, n_fft, hop, window=self._window(mirrored), center=False, return_complex=True)
        parts = torch.cat([spectrum.real, spectrum.imag], 1)
        return hide(parts, mask_of(wav.lengths // hop + 1, parts.shape[2]))

    def _inverse(self, spectrum: Padded) -> Tensor:
        """Overlap-adds centered frames per row: (B, frames, n_fft / 2 + 1) -> (B, S)."""
        n_fft, hop = self.config.istft_params.n_fft, self.config.istft_params.hop_len
        window = self._window(spectrum.values.real)
        real = spectrum.mask[:, :, None]
        frames = torch.fft.irfft(spectrum.values, n_fft) * window * real
        wav, power = _overlap_add(frames, hop), _overlap_add(window.square() * real, hop)
        edge = n_fft // 2
        return (wav / power.clamp(min=1e-8))[:, edge : wav.shape[1] - edge]


def _overlap_add(frames: Tensor, hop: int) -> Tensor:
    """Overlap-adds (B, N, n_fft) to (B, (N - 1) hop + n_fft)."""
    size = (frames.shape[1] - 1) * hop + frames.shape[2]
    columns = frames.transpose(1, 2)  # (B, n_fft, N)
    return functional.fold(columns, (1, size), (1, frames.shape[2]), stride=(1, hop))[:, 0, 0]


def released_cycles(pitch: Tensor, hop_length: int, num_harmonics: int, sample_rate: int) -> Tensor:
    """Returns cycles as in the released code: (B, T) Hz -> (B, S, K) float32.

    The running sum is rounded to float32 before the modulo, so phases lose precision along a block.
    """
    spread = pitch.repeat_interleave(hop_length, 1)
    step = spread[:, :, None] * torch.arange(1, num_harmonics + 1, device=pitch.device) / sample_rate
    return step.to(phase_dtype(step.device)).cumsum(1).to(pitch.dtype) % 1


def phase_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype of phases: float64, which Apple's GPUs (mps) lack; there float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def exact_cycles(
    pitch: Tensor, before: Tensor, hop_length: int, num_harmonics: int, sample_rate: int
) -> tuple[Tensor, Tensor]:
    """Returns cycles in full precision, continuing from earlier frames.

    Args:
        pitch: (B, T) Hz.
        before: (B,) cycles of the fundamental before the first sample, modulo 1, in `phase_dtype`.

    Returns:
        (B, S, K) cycles of each harmonic modulo 1, and (B, T) those of the fundamental after each frame.
    """
    step = pitch.to(before.dtype) / sample_rate  # per sample
    # Whole cycles are dropped before the sum, so that float32 keeps four digits of the phase too.
    after = before[:, None] + (step * hop_length % 1).cumsum(1)
    inside = torch.arange(1, hop_length + 1, device=pitch.device)
    fundamental = ((after - step * hop_length)[:, :, None] + step[:, :, None] * inside).flatten(1)  # (B, S)
    harmonics = torch.arange(1, num_harmonics + 1, device=pitch.device)
    return (fundamental[:, :, None] * harmonics % 1).to(pitch.dtype), after % 1
