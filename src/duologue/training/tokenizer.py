"""Stage `tokenizer`: codes are learned by recognizing speech through them, from Whisper (arXiv 2412.02612, 2.1).

Whisper's encoder is cut in two with a quantizer between the halves. Four losses train it. The first is recognition by
Whisper's own decoder, the second the distance to the codes (commitment). The third is the distance to the untouched
Whisper encoder (distillation), which needs no transcripts. The fourth is level and pitch, which recognition alone would
discard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from duologue import rates
from duologue.audio import pitch
from duologue.augmentation import AugmentConfig, corrupt, place
from duologue.checkpoint import load_component, save_component
from duologue.layers import Padded
from duologue.released.tokenizer import save_released_tokenizer
from duologue.scoring import error_rate
from duologue.tokenizer.encoder import pool
from duologue.tokenizer.quantizer import Quantized
from duologue.tokenizer.speech_recognizer import SpeechRecognizer, load_speech_recognizer, save_speech_recognizer
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from duologue.tokenizer.whisper import WhisperFolder, WhisperTeacher, from_whisper
from duologue.training.data import Clips, LengthBatches, Wav
from duologue.training.loop import Batch, LoopConfig

_CALIBRATION_BATCHES = 4
_CALIBRATION_CLIPS = 8
_SILENCE_S = 2


@dataclass(frozen=True)
class SpecAugmentConfig:
    """Masks on the log-mel of a clip (arXiv 1904.08779).

    Attributes:
        probability: share of the clips that are masked.
        num_time, max_time_s: masks over time.
        num_mels, max_mels: masks over channels.
    """

    probability: float = 0.0
    num_time: int = 2
    max_time_s: float = 0.25
    num_mels: int = 2
    max_mels: int = 12


@dataclass(frozen=True)
class TokenizerRecipe:
    """How a tokenizer is trained from Whisper.

    Attributes:
        corpora: folders of clips.
        whisper: Whisper folder in transformers' format: `config.json`, safetensors, `tokenizer.json`.
        start_from: `final` folder of an earlier run of this stage, to go on from; empty to start from `whisper`.
        valid: folders of clips to evaluate on, each on its own; empty for the "valid" split of the first corpus.
        tokenizer: `features.floor`, `encoder.num_layers` (where Whisper is cut), `encoder.block_frames` and
            `quantizer` count; all other sizes are Whisper's.
        batch_s: seconds of sound in a batch.
        distill_weight: of the squared distance to Whisper's output over the variance of that output; 0 for none.
        commitment_weight: the paper says 10.0, the released config multiplies 0.25 by 10.
        quantize_from: before this share of the training vectors pass unquantized; there k-means starts the codebook.
        kmeans_batches: batches whose vectors k-means sees.
        num_end: learned vectors after the last speech token, see `SpeechRecognizerConfig`.
        train_text_embeddings: whether Whisper's text embeddings, more than half of a small model, change too.
        bypass: share of the clips that pass unquantized from then on, falling to 0 at the share
            `bypass_until` of the training.
    """

    corpora: tuple[str, ...]
    whisper: str
    loop: LoopConfig
    start_from: str = ""
    valid: tuple[str, ...] = ()
    tokenizer: SpeechTokenizerConfig = field(default_factory=SpeechTokenizerConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    spec_augment: SpecAugmentConfig = field(default_factory=SpecAugmentConfig)
    batch_s: float = 60.0
    min_clip_s: float = 0.4
    max_clip_s: float = 14.0
    asr_weight: float = 1.0
    distill_weight: float = 2.0
    commitment_weight: float = 0.25
    prosody_weight: float = 0.1
    quantize_from: float = 0.17
    kmeans_batches: int = 32
    bypass: float = 0.5
    bypass_until: float = 0.6
    num_end: int = 4
    train_text_embeddings: bool = False
    num_valid_clips: int = 150


class _Model(nn.Module):
    """The tokenizer with the recognizer that trains it, as one set of weights."""

    def __init__(self, tokenizer: SpeechTokenizer, recognizer: SpeechRecognizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.recognizer = recognizer


class TokenizerStage:
    """Training of `SpeechTokenizer` and `SpeechRecognizer`."""

    phases: Mapping[str, nn.Module]
    weights: Mapping[str, float]

    def __init__(self, recipe: TokenizerRecipe) -> None:
        torch.manual_seed(recipe.loop.seed)
        self.recipe = recipe
        whisper = WhisperFolder.open(recipe.whisper)
        self.teacher = WhisperTeacher(whisper) if recipe.distill_weight else None
        encoder = recipe.tokenizer.encoder
        if recipe.start_from:
            start = Path(recipe.start_from)
            self.tokenizer = load_component(start / "tokenizer", SpeechTokenizer, SpeechTokenizerConfig)
            self.recognizer = load_speech_recognizer(start / "recognizer")
        else:
            self.tokenizer, self.recognizer = from_whisper(
                whisper,
                encoder.num_layers,
                encoder.block_frames,
                recipe.tokenizer.quantizer,
                recipe.tokenizer.features,
                recipe.num_end,
            )
        self.recognizer.decoder.embed_tokens.requires_grad_(recipe.train_text_embeddings)
        self.phases = {"model": _Model(self.tokenizer, self.recognizer)}
        self.weights = {
            "asr": recipe.asr_weight,
            "distill": recipe.distill_weight,
            "commitment": recipe.commitment_weight,
            "prosody": recipe.prosody_weight,
        }
        self.clips = [Clips(folder, splits=("train",)) for folder in recipe.corpora]
        self.index = [
            (corpus, i)
            for corpus, clips in enumerate(self.clips)
            for i, clip in enumerate(clips.records)
            if recipe.min_clip_s <= clip.num_samples / clip.sample_rate <= recipe.max_clip_s
        ]
        lengths = np.array([self.clips[c].records[i].num_samples / rates.LISTEN_SAMPLE_RATE for c, i in self.index])
        self.batches = LengthBatches(lengths, recipe.batch_s, recipe.loop.seed)
        self.valid = {Path(folder).name: Clips(folder) for folder in recipe.valid} or {
            "valid": Clips(recipe.corpora[0], splits=("valid",))
        }
        if not recipe.start_from:
            self._calibrate(whisper)

    def batch(self, index: int) -> Batch:
        chosen, rng = self.batches(index)
        clean, heard, texts, prompts = [], [], [], []
        for number in chosen:
            corpus, i = self.index[number]
            clip = self.clips[corpus].records[i]
            wav = place(self.clips[corpus].wav(i), clip.sample_rate, self.recipe.augment, rng)
            clean.append(torch.from_numpy(wav))
            noisy = corrupt(wav, clip.sample_rate, self.recipe.augment, rng, lambda: self._other(rng))
            heard.append(torch.from_numpy(noisy))
            texts.append(torch.tensor(self.recognizer.text.encode(clip.text, clip.language)))
            prompts.append(len(self.recognizer.text.prompt(clip.language)))
        wav_clean, wav_heard, text = Padded.stack(clean), Padded.stack(heard), Padded.stack(texts)
        return {
            "clean": wav_clean.values,
            "wav": wav_heard.values,
            "wav_lengths": wav_heard.lengths,
            "text": text.values,
            "text_lengths": text.lengths,
            "num_prompt": torch.tensor(prompts),
            "start": torch.from_numpy(rng.integers(0, self._max_start(wav_heard), len(chosen))),
        }

    def losses(self, phase: str, batch: Batch, progress: float) -> dict[str, Tensor]:
        hidden = self._hidden(batch)
        quantized: Quantized = self.tokenizer.quantizer(hidden)
        through = progress >= self.recipe.quantize_from
        if through and not self.tokenizer.quantizer.ema_count.any():
            self._start_codebook(hidden.values.device)
            quantized = self.tokenizer.quantizer(hidden)
        if through:
            self.tokenizer.quantizer.update(hidden, quantized.codes)
        values = quantized.values
        if (share := self._bypass(progress)) > 0:
            bypassed = torch.rand(len(values), 1, 1, device=values.device) < share
            values = torch.where(bypassed, self.tokenizer.quantizer.normalized(hidden.values.float()), values)
        passed = Padded(values, hidden.lengths)
        memory = self.recognizer.memory(passed)
        text = Padded(batch["text"], batch["text_lengths"])
        prosody = _prosody(batch["clean"], batch["wav"])[:, : values.shape[1]]
        heads = self.recognizer.losses(passed, memory, text, batch["num_prompt"], prosody)
        losses = {"asr": heads.asr, "prosody": heads.prosody}
        if self.teacher is not None:
            losses["distill"] = self._distill(memory, Padded(batch["clean"], batch["wav_lengths"]))
        if through:
            losses["commitment"] = quantized.commitment_loss
        return losses

    def evaluate(self) -> dict[str, float]:
        """Word error rates on every folder of validation clips, as they are, and the use of the codebook."""
        metrics: dict[str, float] = {}
        used = torch.zeros(self.tokenizer.config.quantizer.codebook_size, dtype=torch.int64)
        for name, clips in self.valid.items():
            read: list[tuple[str, str, str]] = []
            order = sorted(range(min(self.recipe.num_valid_clips, len(clips))), key=lambda i: -len(clips.wav(i)))
            for at in range(0, len(order), 16):
                chosen = order[at : at + 16]
                texts, codes = self._transcribe(clips, chosen)
                said = [clips.records[i] for i in chosen]
                read += [(one.text, heard, one.language) for one, heard in zip(said, texts, strict=True)]
                used += torch.bincount(codes, minlength=len(used)).cpu()
            metrics[f"wer/{name}"] = error_rate(read)
        share = used / used.sum().clamp(min=1)
        recent = self.tokenizer.quantizer.ema_count
        metrics["codebook_usage"] = float((used > 0).float().mean())
        metrics["codebook_usage_ema"] = float((recent > 0.1 * recent.mean()).float().mean())
        metrics["perplexity"] = float(torch.exp(-(share * (share + 1e-12).log()).sum()))
        return metrics

    def sample(self, folder: Path) -> None:
        """Writes what is heard in a few validation clips next to what was said."""
        lines = []
        for name, clips in self.valid.items():
            chosen = list(range(min(12, len(clips))))
            texts, _ = self._transcribe(clips, chosen)
            lines += [
                {"folder": name, "voice": clips.records[i].voice, "said": clips.records[i].text, "heard": text}
                for i, text in zip(chosen, texts, strict=True)
            ]
        (folder / "transcripts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def save(self, folder: Path) -> None:
        save_component(folder / "tokenizer", self.tokenizer, self.tokenizer.config)
        save_speech_recognizer(folder / "recognizer", self.recognizer)
        config = self.tokenizer.config
        if config.features.floor == "utterance" and not config.quantizer.normalize:
            save_released_tokenizer(folder / "released", self.tokenizer, self.recognizer)

    def _hidden(self, batch: Batch) -> Padded:
        """Vectors before quantization; clips begin anywhere in a 30 s piece, so that every position is learned."""
        encoder, wav = self.tokenizer.encoder, Padded(batch["wav"], batch["wav_lengths"])
        state = encoder.init_state(len(wav.lengths))
        state.start = batch["start"] * encoder.config.block_frames
        num_valid = -(-wav.lengths // rates.LISTEN_HOP) + state.start * rates.ENCODER_STRIDE
        mel = self.tokenizer.features(wav)
        if encoder.training:
            mel = Padded(_masked(mel, self.recipe.spec_augment), mel.lengths)
        frames = encoder.encode_frames(mel, state, num_valid)
        return Padded(pool(frames.values), frames.lengths // rates.POOL)

    def _distill(self, memory: Padded, clean: Padded) -> Tensor:
        assert self.teacher is not None
        teacher = self.teacher.to(clean.values.device)
        wanted: Tensor = teacher(clean).values[memory.mask]
        error: Tensor = (memory.values[memory.mask] - wanted).square().mean()
        return error / wanted.var(0).mean()

    def _bypass(self, progress: float) -> float:
        """Share of the clips that pass unquantized."""
        recipe = self.recipe
        if progress < recipe.quantize_from:
            return 1.0
        left = recipe.bypass_until - progress
        return recipe.bypass * max(left / max(recipe.bypass_until - recipe.quantize_from, 1e-9), 0.0)

    @torch.no_grad()
    def _vectors(self, first: int, count: int, device: torch.device) -> Tensor:
        """Vectors before quantization (N, D) of some batches."""
        rows = []
        for index in range(first, first + count):
            batch = {name: value.to(device) for name, value in self.batch(index).items()}
            hidden = self._hidden(batch)
            rows.append(hidden.values[hidden.mask].float())
        return torch.cat(rows)

    @torch.no_grad()
    def _start_end(self, teacher: WhisperTeacher) -> None:
        """Starts the end vectors at the teacher's output on the silence after a clip."""
        silence = torch.zeros(_SILENCE_S * rates.LISTEN_SAMPLE_RATE)
        rows = []
        for corpus, i in self.index[:_CALIBRATION_CLIPS]:
            wav = torch.cat([torch.from_numpy(self.clips[corpus].wav(i)), silence])
            rows.append(teacher(Padded.full(wav[None])).values[0, -self.recipe.num_end - 2 : -2])
        self.recognizer.end.copy_(torch.stack(rows).mean(0))

    def _calibrate(self, whisper: WhisperFolder) -> None:
        """Fits the quantizer's normalization, and the recognizer's way back from it, to Whisper as it is."""
        quantizer, recognizer = self.tokenizer.quantizer, self.recognizer
        if self.recipe.num_end:
            self._start_end(self.teacher or WhisperTeacher(whisper))
        if not quantizer.config.normalize:
            return
        vectors = self._vectors(2**40, _CALIBRATION_BATCHES, torch.device("cpu"))
        quantizer.fit_normalization(vectors)
        normalized = quantizer.normalized(vectors)
        centered = normalized - normalized.mean(0)
        scale = (centered * (vectors - vectors.mean(0))).mean(0) / centered.square().mean(0).clamp(min=1e-6)
        with torch.no_grad():
            recognizer.scale.copy_(scale)
            recognizer.offset.copy_(vectors.mean(0) - scale * normalized.mean(0))

    def _start_codebook(self, device: torch.device) -> None:
        vectors = self._vectors(2**41, self.recipe.kmeans_batches, device)
        self.tokenizer.quantizer.fit_codebook(vectors)

    def _transcribe(self, clips: Clips, chosen: list[int]) -> tuple[list[str], Tensor]:
        device = self.tokenizer.quantizer.codebook.weight.device
        wav = Padded.stack([torch.from_numpy(clips.wav(i)) for i in chosen])
        heard = Padded(wav.values.to(device), wav.lengths.to(device))
        quantized = self.tokenizer.quantize_piece(heard)
        values = Padded(quantized.values, quantized.codes.lengths)
        if not self.tokenizer.quantizer.ema_count.any():  # there is no codebook yet
            hidden = self.tokenizer.encode_piece(heard, self.tokenizer.encoder.init_state(len(chosen)))
            values = Padded(self.tokenizer.quantizer.normalized(hidden.values), hidden.lengths)
        texts = self.recognizer.transcribe(values, clips.records[chosen[0]].language)
        return texts, quantized.codes.values[quantized.codes.mask]

    def _other(self, rng: np.random.Generator) -> Wav:
        corpus, i = self.index[int(rng.integers(len(self.index)))]
        return self.clips[corpus].wav(i)

    def _max_start(self, wav: Padded) -> int:
        config = self.tokenizer.config.encoder
        longest = -(-wav.values.shape[1] // (rates.LISTEN_HOP * rates.ENCODER_STRIDE))
        return max((config.max_positions - longest) // config.block_frames, 1)


def _masked(mel: Padded, config: SpecAugmentConfig) -> Tensor:
    """(B, T, M) with masks of the mean over time and channels in some rows."""
    values = mel.values
    batch, time, mels = values.shape
    chosen = torch.rand(batch, device=values.device) < config.probability
    hidden = torch.zeros(batch, time, mels, dtype=torch.bool, device=values.device)
    place = torch.arange(time, device=values.device)
    channel = torch.arange(mels, device=values.device)
    for _ in range(config.num_time):
        width = torch.rand(batch, 1, device=values.device) * config.max_time_s * rates.LISTEN_FRAME_RATE
        at = torch.rand(batch, 1, device=values.device) * (mel.lengths[:, None] - width).clamp(min=0)
        hidden |= ((place >= at) & (place < at + width))[:, :, None]
    for _ in range(config.num_mels):
        width = torch.rand(batch, 1, device=values.device) * config.max_mels
        at = torch.rand(batch, 1, device=values.device) * (mels - width)
        hidden |= ((channel >= at) & (channel < at + width))[:, None, :]
    hidden &= chosen[:, None, None]
    return values.masked_fill(hidden, float(values[mel.mask].mean()))


@torch.no_grad()
def _prosody(clean: Tensor, heard: Tensor) -> Tensor:
    """wavs (B, S) -> per token (B, T, 3): level in bels of what is heard, log2 of F0 over 100 Hz, voicing."""
    missing = -clean.shape[1] % rates.SAMPLES_PER_TOKEN
    clean, heard = (nn.functional.pad(wav, (0, missing)) for wav in (clean, heard))
    level = heard.unflatten(1, (-1, rates.SAMPLES_PER_TOKEN)).square().mean(-1).clamp(min=1e-6).log10()
    f0 = pitch(clean, rates.LISTEN_SAMPLE_RATE, rates.SAMPLES_PER_TOKEN)
    voiced = f0 > 0
    return torch.stack([level, torch.where(voiced, (f0 / 100).clamp(min=0.1).log2(), 0.0), voiced.float()], -1)
