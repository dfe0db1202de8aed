"""Stage `vocoder`: mel -> wave, first by spectral losses alone, then against discriminators as well (HiFi-GAN)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from duologue import rates
from duologue.audio import SpeakMel, resample
from duologue.checkpoint import load_component, save_component
from duologue.decoder.vocoder import Vocoder, VocoderConfig
from duologue.layers import Padded
from duologue.sound_files import save_audio
from duologue.training.data import Clips, Wav
from duologue.training.discriminators import (
    DiscriminatorConfig,
    Discriminators,
    SpectralLoss,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)
from duologue.training.loop import Batch, LoopConfig

_MARGIN_S = 0.025  # cut away after resampling: the filter's ringing at the cuts


@dataclass(frozen=True)
class VocoderRecipe:
    """Recipe of the stage `vocoder`.

    Attributes:
        corpora: folders of clips.
        start_from: folder of an earlier run of this stage (`final`) to start from; empty for random weights.
        batch_size: crops in a batch.
        crop_frames: mel frames of each crop that are compared; 48 are 0.56 s.
        context_frames: mel frames before them, which only fill the network's past.
        gain_db: range of the level, relative to the clip, limited so that no sample clips.
        reply_share: share of crops from the reply voice; the rest is from all other clips.
        resolutions, mels: n_fft and number of mels of each spectral loss.
        adversarial_from: share of the training at which that of the discriminators begins.
        adversarial_warmup: share of the training in which they train before the vocoder gets their loss.
        adversarial_frames: mel frames of each crop that the discriminators get.
    """

    corpora: tuple[str, ...]
    loop: LoopConfig
    start_from: str = ""
    vocoder: VocoderConfig = field(default_factory=VocoderConfig)
    discriminators: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    batch_size: int = 16
    crop_frames: int = 48
    context_frames: int = 24
    gain_db: tuple[float, float] = (-9.0, 4.0)
    reply_share: float = 0.5
    resolutions: tuple[int, ...] = (2048, 1024, 512, 256)
    mels: tuple[int, ...] = (160, 80, 40, 20)
    adversarial_from: float = 0.77
    adversarial_warmup: float = 0.03
    adversarial_frames: int = 32
    mel_weight: float = 15.0
    stft_weight: float = 5.0
    adversarial_weight: float = 1.0
    feature_matching_weight: float = 2.0
    num_valid_clips: int = 32
    max_valid_s: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.reply_share <= 1:
            raise ValueError(f"reply_share is {self.reply_share}; it must lie between 0 and 1")
        if not 0 < self.adversarial_frames <= self.crop_frames:
            raise ValueError(
                f"adversarial_frames is {self.adversarial_frames}; it must lie between 1 and crop_frames, "
                f"{self.crop_frames}"
            )
        shortest = max(self.resolutions) // (2 * rates.SPEAK_HOP) + 1
        if self.crop_frames < shortest:
            raise ValueError(f"crop_frames is {self.crop_frames}; resolutions need at least {shortest}")


class VocoderStage:
    """Training of `Vocoder`: phase "discriminator", which is idle at first, and phase "generator"."""

    phases: Mapping[str, nn.Module]
    weights: Mapping[str, float]

    def __init__(self, recipe: VocoderRecipe) -> None:
        torch.manual_seed(recipe.loop.seed)
        self.recipe = recipe
        if recipe.start_from:
            self.vocoder = load_component(Path(recipe.start_from) / "vocoder", Vocoder, VocoderConfig)
        else:
            self.vocoder = Vocoder(recipe.vocoder)
        self.discriminators = Discriminators(recipe.discriminators)
        self.phases = {"discriminator": self.discriminators, "generator": self.vocoder}
        self.weights = {
            "discriminator": 1.0,
            "mel": recipe.mel_weight,
            "stft": recipe.stft_weight,
            "adversarial": recipe.adversarial_weight,
            "feature_matching": recipe.feature_matching_weight,
        }
        self.mel = SpeakMel()
        self.spectral = SpectralLoss(recipe.resolutions, recipe.mels)
        self.clips = [Clips(folder, splits=("train",)) for folder in recipe.corpora]
        self.reply, self.others = (
            [
                (corpus, i)
                for corpus, clips in enumerate(self.clips)
                for i, clip in enumerate(clips.records)
                if (clip.role == "reply") == is_reply
            ]
            for is_reply in (True, False)
        )
        for name, found, share in (
            ("reply", self.reply, recipe.reply_share),
            ("other", self.others, 1 - recipe.reply_share),
        ):
            if share > 0 and not found:
                raise ValueError(f"reply_share is {recipe.reply_share}, but the corpora hold no {name} clips")
        self.valid = Clips(recipe.corpora[0], splits=("valid",))

    @property
    def tail_frames(self) -> int:
        """Mel frames after the compared ones, which their windows and the lookahead need."""
        return 4 + self.vocoder.config.lookahead_frames

    def batch(self, index: int) -> Batch:
        """wav (B, 256 * (context + crop + tail)) at 22.05 kHz: crops of random clips, silence around the clips."""
        rng = np.random.default_rng((self.recipe.loop.seed, index))
        return {"wav": torch.from_numpy(np.stack([self._crop(rng) for _ in range(self.recipe.batch_size)]))}

    def losses(self, phase: str, batch: Batch, progress: float) -> dict[str, Tensor]:
        recipe, wav = self.recipe, batch["wav"]
        start = recipe.context_frames * rates.SPEAK_HOP
        compared = slice(start, start + recipe.crop_frames * rates.SPEAK_HOP)
        judged = slice(0, recipe.adversarial_frames * rates.SPEAK_HOP)
        real = wav[:, compared]
        if phase == "discriminator" and progress < recipe.adversarial_from:
            return {}
        with torch.set_grad_enabled(phase == "generator"):
            made = self._resynthesize(wav)[:, compared]
        self.discriminators.requires_grad_(phase == "discriminator")
        if phase == "discriminator":
            judgements = self.discriminators(real[:, judged]), self.discriminators(made[:, judged])
            return {"discriminator": discriminator_loss(*judgements)}
        distance = self.spectral.to(wav.device)(made, real)
        losses = {"mel": distance.mel, "stft": distance.stft}
        if progress >= recipe.adversarial_from + recipe.adversarial_warmup:
            with torch.no_grad():
                of_real = self.discriminators(real[:, judged])
            of_made = self.discriminators(made[:, judged])
            losses["adversarial"] = adversarial_loss(of_made)
            losses["feature_matching"] = feature_matching_loss(of_real, of_made)
        return losses

    def evaluate(self) -> dict[str, float]:
        """L1 between the log-mels of held-out clips and of their resynthesis, for all voices and the reply voice."""
        errors: dict[str, list[float]] = {"mel_l1": [], "mel_l1_reply": []}
        for i in self._valid_indices():
            wav = self._valid_wav(i)
            error = (self._mel(self._resynthesize(wav)) - self._mel(wav)).abs().mean()
            errors["mel_l1"].append(float(error))
            if self.valid.records[i].role == "reply":
                errors["mel_l1_reply"].append(float(error))
        return {name: math.fsum(values) / len(values) for name, values in errors.items() if values}

    def sample(self, folder: Path) -> None:
        """Writes a few held-out clips, their resynthesis, and a picture of both mels."""
        for i in self._valid_indices()[:4]:
            wav = self._valid_wav(i)
            made = self._resynthesize(wav)
            name = f"{self.valid.records[i].role}-{self.valid.records[i].id}"
            for kind, sound in (("reference", wav), ("resynthesis", made)):
                save_audio(folder / f"{name}-{kind}.wav", sound[0].cpu().numpy(), rates.SPEAK_SAMPLE_RATE)
            _draw(folder / f"{name}.png", {"reference": self._mel(wav)[0], "resynthesis": self._mel(made)[0]})

    def save(self, folder: Path) -> None:
        save_component(folder / "vocoder", self.vocoder, self.vocoder.config)

    def _resynthesize(self, wav: Tensor) -> Tensor:
        """wav (B, 256 T) -> mel -> wav of the same length."""
        made: Padded = self.vocoder(Padded.full(self._mel(wav)))
        return made.values

    def _mel(self, wav: Tensor) -> Tensor:
        with torch.autocast(wav.device.type, enabled=False):
            mel: Tensor = self.mel.to(wav.device)(wav)
            return mel

    def _crop(self, rng: np.random.Generator) -> Wav:
        """One crop (S,) at 22.05 kHz, at a random level. It may extend beyond its clip on both sides."""
        recipe = self.recipe
        pool = self.reply if rng.random() < recipe.reply_share else self.others
        corpus, i = pool[int(rng.integers(len(pool)))]
        wav, rate = self.clips[corpus].wav(i), self.clips[corpus].records[i].sample_rate
        num_out = (recipe.context_frames + recipe.crop_frames + self.tail_frames) * rates.SPEAK_HOP
        size = math.ceil((num_out / rates.SPEAK_SAMPLE_RATE + 2 * _MARGIN_S) * rate) + 1
        context = recipe.context_frames * rates.SPEAK_HOP * rate // rates.SPEAK_SAMPLE_RATE
        start = int(rng.integers(-context, max(len(wav) - size // 2, 1 - context)))
        piece = np.zeros(size, np.float32)
        first, last = max(start, 0), min(start + size, len(wav))
        piece[first - start : last - start] = wav[first:last]
        margin = round(_MARGIN_S * rates.SPEAK_SAMPLE_RATE)
        crop = resample(piece, rate, rates.SPEAK_SAMPLE_RATE)[margin : margin + num_out]
        gain = 10 ** (rng.uniform(*recipe.gain_db) / 20)
        return crop * np.float32(min(gain, 0.98 / (float(np.abs(crop).max()) + 1e-6)))

    def _valid_indices(self) -> list[int]:
        """Indices of held-out clips, alternating between the reply voice and others."""
        reply = [i for i, clip in enumerate(self.valid.records) if clip.role == "reply"]
        others = [i for i, clip in enumerate(self.valid.records) if clip.role != "reply"]
        half = self.recipe.num_valid_clips // 2
        reply, others = reply[: max(half, 2 * half - len(others))], others[: max(half, 2 * half - len(reply))]
        mixed = [i for pair in zip(reply, others, strict=False) for i in pair]
        return mixed + reply[len(others) :] + others[len(reply) :]

    def _valid_wav(self, index: int) -> Tensor:
        """(1, 256 T) at 22.05 kHz, on the vocoder's device."""
        rate = self.valid.records[index].sample_rate
        wav = self.valid.wav(index)[: int(self.recipe.max_valid_s * rate)]
        wav = resample(wav, rate, rates.SPEAK_SAMPLE_RATE)
        wav = wav[: len(wav) // rates.SPEAK_HOP * rates.SPEAK_HOP]
        return torch.from_numpy(wav)[None].to(self.vocoder.window.device)


def _draw(path: Path, mels: Mapping[str, Tensor]) -> None:
    """A PNG with each mel (T, M) as a picture, one above the other."""
    from matplotlib.figure import Figure  # of the extra `train`

    figure = Figure(figsize=(10, 3 * len(mels)), layout="constrained")
    for axes, (name, mel) in zip(np.atleast_1d(figure.subplots(len(mels), 1)), mels.items(), strict=True):
        axes.imshow(mel.cpu().numpy().T, origin="lower", aspect="auto", vmin=math.log(1e-5), vmax=2.0)
        axes.set(title=name, xlabel="frame", ylabel="mel bin")
    figure.savefig(path)
