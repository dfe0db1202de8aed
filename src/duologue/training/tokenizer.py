"""Stage `tokenizer`: the codes are learned by recognising speech through them (arXiv:2412.02612)."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jiwer
import numpy as np
import torch
from torch import Tensor, nn

from duologue import rates
from duologue.audio import pitch
from duologue.checkpoint import load_component, save_component
from duologue.config import read_json
from duologue.layers import Padded
from duologue.tokenizer.encoder import pool
from duologue.tokenizer.recognizer import Recognizer, RecognizerConfig
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from duologue.tokenizer.whisper import from_whisper
from duologue.training.data import AugmentConfig, Clips, LengthBatches, Wav, augment
from duologue.training.loop import Batch, LoopConfig


@dataclass(frozen=True)
class TokenizerRecipe:
    """Attributes:
    corpora: folders of clips.
    start_from: a folder of an earlier run of this stage (`final`), or of a Whisper checkpoint in transformers' format,
        which is cut after `tokenizer.encoder.num_layers`; empty for random weights.
    pronunciations: JSON file with the phones of every word, for the CTC head on the frames; empty to spell there too.
    batch_s: seconds of sound in a batch.
    commitment_weight: the paper says 10.0, the released config multiplies 0.25 by 10.
    quantize_from_step: before this step the vectors pass unquantized, so that there is something to quantize.
    """

    corpora: tuple[str, ...]
    loop: LoopConfig
    start_from: str = ""
    tokenizer: SpeechTokenizerConfig = field(default_factory=SpeechTokenizerConfig)
    recognizer: RecognizerConfig = field(default_factory=RecognizerConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    pronunciations: str = ""
    batch_s: float = 100.0
    max_clip_s: float = 12.0
    asr_weight: float = 0.7
    ctc_weight: float = 0.3
    frame_ctc_weight: float = 0.3
    commitment_weight: float = 1.0
    prosody_weight: float = 0.1
    quantize_from_step: int = 600
    num_valid_clips: int = 200


class _Model(nn.Module):
    """The tokenizer with the heads that train it, as one set of weights."""

    def __init__(self, tokenizer: SpeechTokenizer, recognizer: Recognizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.recognizer = recognizer


class TokenizerStage:
    """Training of `SpeechTokenizer` and `Recognizer`."""

    phases: Mapping[str, nn.Module]
    weights: Mapping[str, float]

    def __init__(self, recipe: TokenizerRecipe) -> None:
        torch.manual_seed(recipe.loop.seed)
        self.recipe = recipe
        start = Path(recipe.start_from)
        encoder = recipe.tokenizer.encoder
        if recipe.start_from and (start / "config.json").exists():
            self.tokenizer, self.recognizer = from_whisper(
                start, encoder.num_layers, encoder.block_frames, recipe.tokenizer.quantizer
            )
        elif recipe.start_from:
            self.tokenizer = load_component(start / "tokenizer", SpeechTokenizer, SpeechTokenizerConfig)
            self.recognizer = load_component(start / "recognizer", Recognizer, RecognizerConfig)
        else:
            self.tokenizer = SpeechTokenizer(recipe.tokenizer)
            self.recognizer = Recognizer(recipe.recognizer)
        self.sounds = _Sounds(recipe.pronunciations)
        self.recognizer = _with_phones(self.recognizer, self.sounds.phones)
        self.phases = {"model": _Model(self.tokenizer, self.recognizer)}
        self.weights = {
            "asr": recipe.asr_weight,
            "ctc": recipe.ctc_weight,
            "frame_ctc": recipe.frame_ctc_weight,
            "commitment": recipe.commitment_weight,
            "prosody": recipe.prosody_weight,
        }
        self.clips = [Clips(folder, splits=("train",)) for folder in recipe.corpora]
        self.index = [
            (corpus, i)
            for corpus, clips in enumerate(self.clips)
            for i, clip in enumerate(clips.records)
            if clip.num_samples <= recipe.max_clip_s * clip.sample_rate
        ]
        lengths = np.array([self.clips[c].records[i].num_samples / rates.LISTEN_SAMPLE_RATE for c, i in self.index])
        self.batches = LengthBatches(lengths, recipe.batch_s, recipe.loop.seed)
        self.valid = Clips(recipe.corpora[0], splits=("valid",))

    def batch(self, index: int) -> Batch:
        chosen, rng = self.batches(index)
        wavs, texts, sounds, prosody = [], [], [], []
        for number in chosen:
            corpus, i = self.index[number]
            clip = self.clips[corpus].records[i]
            sound = self.clips[corpus].wav(i)
            if clip.role != "reply" or rng.random() < 0.5:  # the reply voice must be clean as often as not
                sound = augment(sound, clip.sample_rate, self.recipe.augment, rng, lambda: self._other(rng))
            wavs.append(torch.from_numpy(sound))
            texts.append(torch.tensor(self.recognizer.encode_text(clip.text), dtype=torch.int64))
            sounds.append(torch.tensor(self.sounds(clip.text), dtype=torch.int64) if self.sounds.phones else texts[-1])
            prosody.append(_prosody(wavs[-1]))
        wav, text, phones = Padded.stack(wavs), Padded.stack(texts), Padded.stack(sounds)
        return {
            "wav": wav.values,
            "wav_lengths": wav.lengths,
            "text": text.values,
            "text_lengths": text.lengths,
            "sounds": phones.values,
            "sounds_lengths": phones.lengths,
            "prosody": Padded.stack(prosody).values,
            "start": torch.from_numpy(rng.integers(0, self._max_start(wav), len(chosen))),
        }

    def losses(self, phase: str, batch: Batch, step: int) -> dict[str, Tensor]:
        wav = Padded(batch["wav"], batch["wav_lengths"])
        text = Padded(batch["text"], batch["text_lengths"])
        sounds = Padded(batch["sounds"], batch["sounds_lengths"])
        state = self.tokenizer.encoder.init_state(len(wav.lengths))
        # Clips begin anywhere in a 30 s piece, so that every position of it is learned.
        block = self.tokenizer.config.encoder.block_frames
        state.start = batch["start"] * block
        num_valid = -(-wav.lengths // rates.LISTEN_HOP) + state.start * rates.ENCODER_STRIDE
        frames = self.tokenizer.encoder.encode_frames(self.tokenizer.features(wav), state, num_valid)
        hidden = Padded(pool(frames.values), frames.lengths // rates.POOL)
        quantized = self.tokenizer.quantizer(hidden)
        through = step >= self.recipe.quantize_from_step
        if through:
            self.tokenizer.quantizer.update(hidden, quantized.codes)
        values = Padded(quantized.values if through else hidden.values, hidden.lengths)
        heads = self.recognizer.losses(values, frames, text, sounds, batch["prosody"])
        commitment = {"commitment": quantized.commitment_loss} if through else {}
        return vars(heads) | commitment

    def evaluate(self) -> dict[str, float]:
        """Word error rates of both heads on validation clips, as they are, and the use of the codebook."""
        texts, decoded, spelled = [], [], []
        used = torch.zeros(self.tokenizer.config.quantizer.codebook_size, dtype=torch.int64)
        num = min(self.recipe.num_valid_clips, len(self.valid))
        order = sorted(range(num), key=lambda i: self.valid.records[i].num_samples)
        for at in range(0, num, 25):
            chosen = order[at : at + 25]
            wav = Padded.stack([torch.from_numpy(self.valid.wav(i)) for i in chosen])
            quantized = self.tokenizer.quantize_piece(wav)
            values = Padded(quantized.values, quantized.codes.lengths)
            texts += [self._spoken(self.valid.records[i].text) for i in chosen]
            decoded += self.recognizer.transcribe(values)
            spelled += self.recognizer.transcribe_ctc(values)
            used += torch.bincount(quantized.codes.values[quantized.codes.mask], minlength=len(used))
        share = used / used.sum()
        recent = self.tokenizer.quantizer.ema_count
        return {
            "wer": jiwer.wer(texts, decoded),
            "wer_ctc": jiwer.wer(texts, spelled),
            "codebook_usage": float((used > 0).float().mean()),
            "codebook_usage_ema": float((recent > 0.1 * recent.mean()).float().mean()),
            "perplexity": float(torch.exp(-(share * (share + 1e-12).log()).sum())),
        }

    def sample(self, folder: Path) -> None:
        """Writes what is heard in a few validation clips beside what was said."""
        lines = []
        for i in range(min(20, len(self.valid))):
            quantized = self.tokenizer.quantize_piece(Padded.full(torch.from_numpy(self.valid.wav(i))[None]))
            heard = self.recognizer.transcribe(Padded(quantized.values, quantized.codes.lengths))[0]
            lines.append({"said": self._spoken(self.valid.records[i].text), "heard": heard})
        (folder / "transcripts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def save(self, folder: Path) -> None:
        save_component(folder / "tokenizer", self.tokenizer, self.tokenizer.config)
        save_component(folder / "recognizer", self.recognizer, self.recognizer.config)

    def _spoken(self, text: str) -> str:
        return self.recognizer.decode_text(self.recognizer.encode_text(text))

    def _other(self, rng: np.random.Generator) -> Wav:
        corpus, i = self.index[int(rng.integers(len(self.index)))]
        return self.clips[corpus].wav(i)

    def _max_start(self, wav: Padded) -> int:
        config = self.tokenizer.config.encoder
        longest = -(-wav.values.shape[1] // (rates.LISTEN_HOP * rates.ENCODER_STRIDE))
        return max((config.max_positions - longest) // config.block_frames, 1)


def words_of(text: str) -> list[str]:
    """The words of an English text in small letters, apostrophes inside them kept."""
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())


class _Sounds:
    """Texts as numbers of phones, from 1 on, by a table of pronunciations."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._words: dict[str, list[str]] = read_json(path) if path else {}
        self.phones = tuple(sorted({phone for word in self._words.values() for phone in word}))
        self._numbers = {phone: number for number, phone in enumerate(self.phones, 1)}

    def __call__(self, text: str) -> list[int]:
        words = words_of(text)
        missing = next((word for word in words if word not in self._words), None)
        if missing is not None:
            raise ValueError(f"{self._path} does not say how {missing!r} is pronounced; make it anew from this corpus")
        return [self._numbers[phone] for word in words for phone in self._words[word]]


def _with_phones(recognizer: Recognizer, phones: tuple[str, ...]) -> Recognizer:
    """The recognizer with a frame head for these phones; a new head where it has another."""
    if recognizer.config.phones == phones:
        return recognizer
    changed = Recognizer(dataclasses.replace(recognizer.config, phones=phones))
    kept = {key: value for key, value in recognizer.state_dict().items() if not key.startswith("frame_ctc.")}
    changed.load_state_dict(kept, strict=False)
    return changed


def _prosody(wav: Tensor) -> Tensor:
    """wav (S,) -> per token (T, 3): level in bels, log2 of F0 over 100 Hz, voicing."""
    padded = nn.functional.pad(wav, (0, -len(wav) % rates.SAMPLES_PER_TOKEN))[None]
    level = padded.unflatten(1, (-1, rates.SAMPLES_PER_TOKEN)).square().mean(-1).clamp(min=1e-6).log10()
    f0 = pitch(padded, rates.LISTEN_SAMPLE_RATE, rates.SAMPLES_PER_TOKEN)
    voiced = f0 > 0
    return torch.stack([level, torch.where(voiced, (f0 / 100).clamp(min=0.1).log2(), 0.0), voiced.float()], -1)[0]
