"""Resampling, log-mel features and pitch.

Shapes: B batch, S samples, T frames, M mels. Waveforms are float32 in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from duologue import rates
from duologue.config import check_type
from duologue.layers import Padded, reset_rows, split_at, take
from duologue.pcm import Pcm, as_float


def check_wav(pcm: Pcm, sample_rate: int, name: str = "the audio") -> NDArray[np.float32]:
    """Returns samples (S,) as float32 in [-1, 1]. Raises ValueError if they are unusable, TypeError for a bad rate."""
    check_type("sample_rate", sample_rate, int, float, np.integer, np.floating)
    wav = as_float(pcm, name)
    if not 4000 <= sample_rate <= 384000:
        raise ValueError(f"{name} has a sample rate of {sample_rate} Hz; rates from 4000 to 384000 are taken")
    if wav.ndim != 1:
        raise ValueError(f"{name} must have one dimension (samples,), not shape {wav.shape}")
    if not wav.size:
        raise ValueError(f"{name} is empty: it holds no samples")
    if not np.isfinite(wav).all():
        raise ValueError(f"{name} holds NaN or infinite samples")
    return np.clip(wav, -1.0, 1.0)


def resample(wav: NDArray[np.float32], from_rate: int, to_rate: int) -> NDArray[np.float32]:
    if from_rate == to_rate:
        return wav
    return cast(NDArray[np.float32], soxr.resample(wav, from_rate, to_rate).astype(np.float32))


class StreamingResampler:
    """Resamples a stream chunk by chunk; up to 40 ms are held back until the last chunk."""

    def __init__(self, from_rate: int, to_rate: int) -> None:
        self._stream = None if from_rate == to_rate else soxr.ResampleStream(from_rate, to_rate, 1, dtype="float32")

    def step(self, wav: NDArray[np.float32], last: bool = False) -> NDArray[np.float32]:
        """Returns the final output samples for input wav (S,) float32."""
        return wav if self._stream is None else self._stream.resample_chunk(wav, last=last)


def mel_filters(n_fft: int, num_mels: int, f_max: float, sample_rate: int) -> Tensor:
    """Returns triangular mel filters (1 + n_fft // 2, M) float32 from 0 to `f_max` Hz, each of equal area.

    The scale is that of Slaney's Auditory Toolbox: linear below 1000 Hz and logarithmic above.
    """
    step = np.log(6.4) / 27.0  # of a mel above 1000 Hz, which are 15 mels
    top = 3.0 * f_max / 200.0 if f_max < 1000.0 else 15.0 + np.log(f_max / 1000.0) / step
    mels = np.linspace(0.0, top, num_mels + 2)
    edges = np.where(mels < 15.0, 200.0 * mels / 3.0, 1000.0 * np.exp(step * (mels - 15.0)))
    slopes = edges - np.linspace(0, sample_rate // 2, 1 + n_fft // 2)[:, None]
    widths = np.diff(edges)
    filters = np.maximum(0.0, np.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]))
    return torch.from_numpy(filters * (2.0 / (edges[2:] - edges[:-2]))).float()


@dataclass(frozen=True)
class LogMelConfig:
    """Settings of Whisper's log-mel.

    Attributes:
        floor: lower clipping. "utterance" clips at the maximum minus 8 as the released models (a stream knows only the
            maximum so far); "fixed" clips at `log_floor`, exact in streams.
    """

    num_mels: int = 80
    floor: Literal["fixed", "utterance"] = "fixed"
    log_floor: float = -5.0


@dataclass
class LogMelState:
    """Streaming state of `LogMel`.

    Attributes:
        buffer: samples without a complete frame.
        started: (B,) bool, the left edge was reflected.
        num_samples: (B,) samples so far.
        peak: (B,) maximum log-mel so far.
    """

    buffer: Padded
    started: Tensor
    num_samples: Tensor
    peak: Tensor


class LogMel(nn.Module):
    """Log-mel (B, T, M) of 16 kHz wav (B, S) at 100 frames/s, a streaming stage.

    Rows are zero-padded to whole speech tokens (1280 samples) and then reflected at both edges. This matches the
    released feature extractor on a single clip (docs/checkpoints.md 1.4).
    """

    window: Tensor
    filters: Tensor
    n_fft = 400
    edge = 200

    def __init__(self, config: LogMelConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)
        filters = mel_filters(self.n_fft, config.num_mels, 8000.0, rates.LISTEN_SAMPLE_RATE)
        self.register_buffer("filters", filters, persistent=False)

    def init_state(self, batch_size: int) -> LogMelState:
        zeros = torch.zeros(batch_size, dtype=torch.int64, device=self.window.device)
        buffer = Padded(self.window.new_zeros(batch_size, 0), zeros)
        return LogMelState(buffer, zeros.bool(), zeros, self.window.new_full((batch_size,), -torch.inf))

    def step(self, x: Padded, state: LogMelState) -> Padded:
        return self._normalize(self._take_in(x, state), state)

    def flush(self, state: LogMelState, rows: Tensor | None = None) -> Padded:
        rows = torch.ones_like(state.started) if rows is None else rows
        mel = self._normalize(self._finish(state, rows), state)
        reset_rows(state, self.init_state(len(rows)), rows)
        return mel

    def forward(self, x: Padded) -> Padded:
        state = self.init_state(len(x.lengths))
        raw = [self._take_in(x, state), self._finish(state, torch.ones_like(state.started))]
        mel = Padded.concat(raw)
        return self._normalize(mel, state)

    def _take_in(self, x: Padded, state: LogMelState) -> Padded:
        state.num_samples = state.num_samples + x.lengths
        return self._frames(self._reflect_left(Padded.concat([state.buffer, x]), state), state)

    def _reflect_left(self, wav: Padded, state: LogMelState) -> Padded:
        """Mirrors the first 200 samples of each row as soon as they are available."""
        starting = ~state.started & (wav.lengths > self.edge)
        if not bool(starting.any()):
            return wav
        state.started = state.started | starting
        index = torch.arange(wav.values.shape[1] + self.edge, device=starting.device)
        index = torch.where(starting[:, None], (index - self.edge).abs(), index)
        return Padded(take(wav.values, index.clamp(max=wav.values.shape[1] - 1)), wav.lengths + self.edge * starting)

    def _finish(self, state: LogMelState, rows: Tensor) -> Padded:
        """Returns the last frames of ending rows: zero padding to a whole token, then the mirrored right edge."""
        token = rates.SAMPLES_PER_TOKEN
        missing = torch.where(rows, -state.num_samples % token, 0)
        zeros = Padded(self.window.new_zeros(len(rows), int(missing.max())), missing)
        wav = self._reflect_left(Padded.concat([state.buffer, zeros]), state)
        ending = rows & (state.num_samples > 0)
        length = wav.lengths[:, None]
        index = torch.arange(wav.values.shape[1] + self.edge, device=rows.device).expand(len(rows), -1)
        index = torch.where(index < length, index, 2 * (length - 1) - index).clamp(0, max(wav.values.shape[1] - 1, 0))
        # The released code drops the last frame; reflecting one sample fewer than 200 omits it.
        padded = Padded(take(wav.values, index), (wav.lengths + self.edge - 1) * ending + wav.lengths * ~ending)
        return self._frames(padded, state, ending)

    def _frames(self, wav: Padded, state: LogMelState, ready: Tensor | None = None) -> Padded:
        """Computes all complete frames of a buffer and keeps the remaining samples in the state."""
        hop = rates.LISTEN_HOP
        ready = state.started if ready is None else ready
        num_frames = ((wav.lengths - self.n_fft) // hop + 1).clamp(min=0) * ready
        _, state.buffer = split_at(wav, num_frames * hop)
        longest = int(num_frames.max())
        if not longest:
            return Padded(self.window.new_zeros(len(wav.lengths), 0, self.config.num_mels), num_frames)
        span = wav.values[:, : (longest - 1) * hop + self.n_fft]
        spectrum = torch.stft(span, self.n_fft, hop, window=self.window, center=False, return_complex=True)
        power = (spectrum.real.square() + spectrum.imag.square()).transpose(1, 2)  # (B, T, n_fft / 2 + 1)
        return Padded((power @ self.filters).clamp(min=1e-10).log10(), num_frames)

    def _normalize(self, mel: Padded, state: LogMelState) -> Padded:
        values = mel.values
        if self.config.floor == "fixed":
            return Padded((values.clamp(min=self.config.log_floor) + 4.0) / 4.0, mel.lengths)
        if values.shape[1]:
            loudest = values.masked_fill(~mel.mask[:, :, None], -torch.inf).amax((1, 2))
            state.peak = torch.maximum(state.peak, loudest)
        return Padded((values.maximum(state.peak[:, None, None] - 8.0) + 4.0) / 4.0, mel.lengths)


class SpeakMel(nn.Module):
    """Natural-log mel (B, S // 256, 80) of 22.05 kHz wav (B, S), the decoder's target (docs/checkpoints.md 3.5)."""

    window: Tensor
    filters: Tensor
    n_fft = 1024
    num_mels = 80

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)
        filters = mel_filters(self.n_fft, self.num_mels, 8000.0, rates.SPEAK_SAMPLE_RATE)
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, wav: Tensor) -> Tensor:
        edge = (self.n_fft - rates.SPEAK_HOP) // 2
        padded = functional.pad(wav[:, None], (edge, edge), mode="reflect")[:, 0]
        spectrum = torch.stft(
            padded, self.n_fft, rates.SPEAK_HOP, window=self.window, center=False, return_complex=True
        )
        magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt().transpose(1, 2)
        return (magnitude @ self.filters).clamp(min=1e-5).log()


def pitch(wav: Tensor, sample_rate: int, hop_length: int, f0_min: float = 60.0, f0_max: float = 400.0) -> Tensor:
    """Estimates F0 by normalized autocorrelation: wav (B, S) -> (B, S // hop_length) Hz, 0 where unvoiced.

    Frame i is 64 ms long and centered on sample (i + 0.5) * hop_length.
    """
    size = int(0.064 * sample_rate)
    num_frames = wav.shape[1] // hop_length
    left = (size - hop_length) // 2
    padded = functional.pad(wav, (max(left, 0), size))[:, max(-left, 0) :]
    frames = padded.unfold(1, size, hop_length)[:, :num_frames]
    frames = frames - frames.mean(-1, keepdim=True)
    spectrum = torch.fft.rfft(frames, 2 * size)
    correlation = torch.fft.irfft(spectrum.abs().square())[..., :size]
    # Long lags overlap less: divide by the correlation of a constant.
    overlap = 1.0 - torch.arange(size, device=wav.device) / size
    correlation = correlation / (correlation[..., :1] * overlap + 1e-9)
    shortest, longest = int(sample_rate / f0_max), int(sample_rate / f0_min)
    lags = correlation[..., shortest:longest]
    peak, at = lags.max(-1)
    # The first lag close to the best: multiples of the period correlate equally well.
    first = (lags > 0.9 * peak[..., None]).to(torch.int8)
    rising = torch.diff(lags, dim=-1, prepend=lags[..., :1]) >= 0
    falling = torch.diff(lags, dim=-1, append=lags[..., -1:]) <= 0
    candidates = first * (rising & falling)
    at = torch.where(candidates.any(-1), candidates.argmax(-1), at)
    energy = frames.square().mean(-1)
    voiced = (peak > 0.5) & (energy > 1e-5)
    return torch.where(voiced, sample_rate / (at + shortest), 0.0)
