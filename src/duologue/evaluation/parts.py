"""The parts of the chain judged alone: what the tokens keep, and what the decoder makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from duologue import rates
from duologue.audio import resample
from duologue.evaluation.intelligibility import Naturalness, Recogniser, codebook_usage, error_row
from duologue.evaluation.prosody import PLAIN, probe, token_prosody
from duologue.evaluation.report import Row, difference_row
from duologue.evaluation.testset import SPLIT_NAMES, SPLITS, TestClip, TestSet
from duologue.layers import Padded
from duologue.models import Models
from duologue.tokenizer.recognizer import Recognizer
from duologue.tokenizer.speech_recognizer import SpeechRecognizer
from duologue.tokenizer.tokenizer import SpeechTokenizer

NUM_DECODER_CLIPS = 100  # reference replies that are resynthesised
MAX_DECODER_S = 12.0
_MAX_CLIP_S = 30.0  # one piece of the tokenizer
_BATCH = 16


def tokenizer_rows(models: Models, test_set: TestSet, recognizer: Recognizer | SpeechRecognizer | None) -> list[Row]:
    """What the tokens keep: words, by the tokenizer's own recognition head; use of the codebook; pitch and level."""
    group = "tokenizer"
    clips = [c for c in (*test_set.speech("user"), *test_set.speech("reply")) if _seconds(c) <= _MAX_CLIP_S]
    codes, texts = tokenize(models.tokenizer, clips, recognizer)
    rows = []
    for split in SPLITS:
        name = f"WER of its recognition head, {SPLIT_NAMES[split]}"
        pairs = [(c.text, texts[c.id]) for c in clips if c.role == "user" and c.split == split and c.id in texts]
        if recognizer is None:
            rows.append(
                Row(group, name, None, skipped="the recognition head is not beside the model: give --recognizer")
            )
        else:
            rows.append(error_row(group, name, pairs, aim=0.05))
    usage, perplexity = codebook_usage(list(codes.values()), models.vocabulary.codebook_size)
    num = sum(map(len, codes.values()))
    rows.append(Row(group, "codebook usage", usage, "%", 0.6, "at least", num, f"perplexity {perplexity:.0f}"))
    order = np.random.default_rng(0).permutation(len(clips))
    chosen = [clips[i] for i in order]
    vectors = models.tokenizer.quantizer.codebook.weight.detach().float().cpu().numpy()
    targets = [token_prosody(_at_16k(clip))[: len(codes[clip.id])] for clip in chosen]
    for column, name in enumerate(("level read from the tokens", "F0 read from the tokens")):
        try:
            value = probe([codes[clip.id] for clip in chosen], [target[:, column] for target in targets], vectors)
            rows.append(Row(group, name, value, "R2", num=len(chosen)))
        except ValueError as error:
            rows.append(Row(group, name, None, "R2", skipped=str(error)))
    return rows


def decoder_rows(
    models: Models,
    test_set: TestSet,
    recogniser: Recogniser | None,
    why_not: str,
    naturalness: Naturalness | None,
    why_no_mos: str,
) -> list[Row]:
    """Tokens -> speech: reference replies, tokenized and resynthesised, beside the same recordings as they were."""
    group = "decoder"
    clips = plain_replies(test_set)
    codes, _ = tokenize(models.tokenizer, clips)
    made = {c.id: _resynthesize(models, codes[c.id]) for c in tqdm(clips, "resynthesis", disable=None, leave=False)}
    rows = []
    if recogniser is None:
        rows.append(Row(group, "WER after resynthesis", None, skipped=why_not))
    else:
        reference = error_row(
            group, "WER of the reference audio", [(c.text, recogniser.transcribe(c.wav, c.sample_rate)) for c in clips]
        )
        again = error_row(
            group,
            "WER after resynthesis",
            [(c.text, recogniser.transcribe(made[c.id], rates.SPEAK_SAMPLE_RATE)) for c in clips],
        )
        rows += [again, reference, difference_row(group, "WER lost by resynthesis", again, reference, 0.1)]
    if naturalness is None:
        rows.append(Row(group, "DNSMOS after resynthesis", None, "MOS", skipped=why_no_mos))
    elif clips:
        before = float(np.mean([naturalness(c.wav, c.sample_rate) for c in clips]))
        after = float(np.mean([naturalness(made[c.id], rates.SPEAK_SAMPLE_RATE) for c in clips]))
        rows += [
            Row(group, "DNSMOS after resynthesis", after, "MOS", num=len(clips)),
            Row(group, "DNSMOS of the reference audio", before, "MOS", num=len(clips)),
            Row(group, "DNSMOS lost by resynthesis", before - after, "MOS", 0.3, num=len(clips)),
        ]
    return rows


def plain_replies(test_set: TestSet, num: int = NUM_DECODER_CLIPS) -> list[TestClip]:
    """At most `num` reference replies of at most 12 s in the plain style, spread evenly over the set."""
    clips = [c for c in test_set.speech("reply") if c.style == PLAIN and _seconds(c) <= MAX_DECODER_S]
    num = min(num, len(clips))
    return [clips[i * len(clips) // num] for i in range(num)]


@torch.inference_mode()
def tokenize(
    tokenizer: SpeechTokenizer, clips: Sequence[TestClip], recognizer: Recognizer | SpeechRecognizer | None = None
) -> tuple[dict[str, NDArray[np.int64]], dict[str, str]]:
    """Codes of each clip of at most 30 s by id, and with a recognition head the text of the user's clips."""
    codes: dict[str, NDArray[np.int64]] = {}
    texts: dict[str, str] = {}
    device = tokenizer.quantizer.codebook.weight.device
    order = sorted(clips, key=lambda clip: (clip.role, len(clip.samples)))
    for at in tqdm(range(0, len(order), _BATCH), "tokenizer", disable=None, leave=False):
        batch = order[at : at + _BATCH]
        wav = Padded.stack([torch.from_numpy(_at_16k(clip)) for clip in batch])
        quantized = tokenizer.quantize_piece(Padded(wav.values.to(device), wav.lengths.to(device)))
        for clip, row in zip(batch, quantized.codes.rows(), strict=True):
            codes[clip.id] = row.cpu().numpy()
        if recognizer is not None and any(clip.role == "user" for clip in batch):
            heard = recognizer.transcribe(Padded(quantized.values, quantized.codes.lengths))
            texts |= {clip.id: text for clip, text in zip(batch, heard, strict=True)}
    return codes, texts


@torch.inference_mode()
def _resynthesize(models: Models, codes: NDArray[np.int64]) -> NDArray[np.float32]:
    """(T,) codes -> wav (S,) at the reply's sample rate, with the settings of a conversation."""
    state = models.decoder.init_state(1, models.card.num_steps, models.card.guidance_scale)
    device = next(models.decoder.parameters()).device
    wav: Padded = models.decoder(Padded.full(torch.from_numpy(codes)[None].to(device)), state)
    made: NDArray[np.float32] = wav.rows()[0].clamp(-1.0, 1.0).float().cpu().numpy()
    return made


def _seconds(clip: TestClip) -> float:
    return len(clip.samples) / clip.sample_rate


def _at_16k(clip: TestClip) -> NDArray[np.float32]:
    return resample(clip.wav, clip.sample_rate, rates.LISTEN_SAMPLE_RATE)
