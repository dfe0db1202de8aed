"""Discriminators of the vocoder's GAN training, and its spectral losses.

The multi-period discriminator follows HiFi-GAN (arXiv 2010.05646). The multi-resolution one over complex spectra
follows the Descript audio codec (arXiv 2306.06546). Both use the least-squares losses of HiFi-GAN. They are small,
because the generator has only 2 M parameters and the crops are short.

Shapes: B batch, S samples, F bins, T frames, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from duologue import rates
from duologue.audio import mel_filters


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the discriminators.

    Attributes:
        periods: of the multi-period discriminator (MPD), in samples.
        period_channels: channels of its convolutions; all but the last have stride 3.
        resolutions: n_fft of the multi-resolution discriminator (MRD); the hop is a quarter of it.
        resolution_channels: channels of its convolutions.
    """

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    period_channels: tuple[int, ...] = (8, 24, 48, 64)
    resolutions: tuple[int, ...] = (1024, 512, 256)
    resolution_channels: int = 16


@dataclass(frozen=True)
class Judgement:
    """Output of one discriminator: scores (B, ...), 1 for real and 0 for generated, and its intermediate features."""

    scores: Tensor
    features: list[Tensor]


class PeriodDiscriminator(nn.Module):
    """Looks at every `period`-th sample: wav (B, S) folded to (B, 1, S / period, period)."""

    def __init__(self, period: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.period = period
        strides = [3] * (len(channels) - 1) + [1]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(before, after, (5, 1), (stride, 1), (2, 0)))
            for before, after, stride in zip((1, *channels), channels, strides, strict=False)
        )
        self.out = weight_norm(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wav: Tensor) -> Judgement:
        x = functional.pad(wav, (0, -wav.shape[1] % self.period)).unflatten(1, (-1, self.period))[:, None]
        return _judge(self.convs, self.out, x)


class ResolutionDiscriminator(nn.Module):
    """Looks at the complex spectrum of one resolution: (B, 2, T, F)."""

    window: Tensor

    def __init__(self, n_fft: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.n_fft = n_fft
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(before, channels, (3, kernel), (1, stride), (1, kernel // 2)))
            for before, kernel, stride in ((2, 7, 2), (channels, 5, 2), (channels, 5, 2), (channels, 3, 1))
        )
        self.out = weight_norm(nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, wav: Tensor) -> Judgement:
        spectrum = torch.stft(wav.float(), self.n_fft, self.n_fft // 4, window=self.window, return_complex=True)
        # Loudness falls by 60 dB and more over the bins; the square root keeps the quiet ones visible.
        magnitude = (torch.view_as_real(spectrum).square().sum(-1) + 1e-9).sqrt()
        x = torch.view_as_real(spectrum / magnitude.sqrt()).permute(0, 3, 2, 1)  # (B, 2, T, F)
        return _judge(self.convs, self.out, x)


def _judge(convs: nn.ModuleList, out: nn.Module, x: Tensor) -> Judgement:
    features = []
    for conv in convs:
        x = functional.leaky_relu(conv(x), 0.1)
        features.append(x)
    return Judgement(out(x), features)


class Discriminators(nn.Module):
    """All discriminators: wav (B, S) -> one judgement each."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        periods = [PeriodDiscriminator(period, config.period_channels) for period in config.periods]
        resolutions = [ResolutionDiscriminator(n_fft, config.resolution_channels) for n_fft in config.resolutions]
        self.members = nn.ModuleList([*periods, *resolutions])
        if not self.members:
            raise ValueError("there are no discriminators: give at least one of periods and resolutions")

    def forward(self, wav: Tensor) -> list[Judgement]:
        return [member(wav) for member in self.members]


def discriminator_loss(real: list[Judgement], made: list[Judgement]) -> Tensor:
    """Least squares: real toward 1, generated toward 0; the mean over discriminators."""
    losses = [
        (1 - r.scores.float()).square().mean() + m.scores.float().square().mean()
        for r, m in zip(real, made, strict=True)
    ]
    return torch.stack(losses).mean()


def adversarial_loss(made: list[Judgement]) -> Tensor:
    """Least squares: generated toward 1; the mean over discriminators."""
    return torch.stack([(1 - m.scores.float()).square().mean() for m in made]).mean()


def feature_matching_loss(real: list[Judgement], made: list[Judgement]) -> Tensor:
    """L1 between features, relative to the magnitude of the real ones; the mean over layers and discriminators."""
    losses = [
        (a.float() - b.float()).abs().mean() / (a.float().abs().mean() + 1e-4)
        for r, m in zip(real, made, strict=True)
        for a, b in zip(r.features, m.features, strict=True)
    ]
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class SpectralDistance:
    """mel: log-mel L1 in nepers; stft: spectral convergence; both are means over the resolutions."""

    mel: Tensor
    stft: Tensor


class SpectralLoss(nn.Module):
    """Distance of two waves (B, S) at several resolutions, computed in float32.

    The mels reach up to half the sample rate, so the loss also covers frequencies above the range of `SpeakMel`.
    """

    def __init__(self, resolutions: tuple[int, ...], mels: tuple[int, ...]) -> None:
        super().__init__()
        if len(resolutions) != len(mels) or not mels:
            raise ValueError(f"each resolution needs a number of mels, got {resolutions} and {mels}")
        self.resolutions = resolutions
        for n_fft, num_mels in zip(resolutions, mels, strict=True):
            rate = rates.SPEAK_SAMPLE_RATE
            self.register_buffer(f"filters_{n_fft}", mel_filters(n_fft, num_mels, rate / 2, rate), persistent=False)
            self.register_buffer(f"window_{n_fft}", torch.hann_window(n_fft), persistent=False)

    def forward(self, made: Tensor, real: Tensor) -> SpectralDistance:
        mel, stft = [], []
        with torch.autocast(made.device.type, enabled=False):
            for n_fft in self.resolutions:
                filters, window = self.get_buffer(f"filters_{n_fft}"), self.get_buffer(f"window_{n_fft}")
                with torch.no_grad():
                    b = _magnitude(real, n_fft, window)
                a = _magnitude(made, n_fft, window)
                stft.append((a - b).norm() / b.norm().clamp(min=1e-3))
                mel.append((_log_mel(a, filters) - _log_mel(b, filters)).abs().mean())
        return SpectralDistance(torch.stack(mel).mean(), torch.stack(stft).mean())


def _magnitude(wav: Tensor, n_fft: int, window: Tensor) -> Tensor:
    """wav (B, S) -> (B, F, T) float32."""
    spectrum = torch.stft(wav.float(), n_fft, n_fft // 4, window=window, return_complex=True)
    return (torch.view_as_real(spectrum).square().sum(-1) + 1e-9).sqrt()


def _log_mel(magnitude: Tensor, filters: Tensor) -> Tensor:
    """(B, F, T) and filters (F, M) -> (B, M, T), natural logarithm."""
    return (filters.T @ magnitude).clamp(min=1e-5).log()
