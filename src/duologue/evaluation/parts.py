"""The parts of the chain judged alone: what the tokens keep, and what the decoder makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from duologue import rates
from duologue.audio import resample
from duologue.evaluation.intelligibility import Naturalness, codebook_usage, error_row, quality_row
from duologue.evaluation.prosody import PLAIN, probe, token_prosody
from duologue.evaluation.recognition import SoundRecognizer
from duologue.evaluation.report import Row, difference_row
from duologue.evaluation.testset import SEEN, SPLIT_NAMES, SPLITS, UNSEEN, WARPED, TestClip, TestSet, spread
from duologue.layers import Padded
from duologue.models import Models, synthesize
from duologue.progress import steps
from duologue.tokenizer.recognizer import Recognizer
from duologue.tokenizer.speech_recognizer import SpeechRecognizer
from duologue.tokenizer.tokenizer import SpeechTokenizer

NUM_DECODER_CLIPS = 100  # reference replies that are resynthesized
MAX_DECODER_S = 12.0
TRANSCRIPT_AIMS = {SEEN: 0.08, UNSEEN: 0.15, WARPED: 0.15}
_MAX_CLIP_S = 30.0  # one piece of the tokenizer
_BATCH = 16


def short_speech(test_set: TestSet) -> list[TestClip]:
    """The clips that hold speech and fit into one piece of the tokenizer."""
    clips = (*test_set.speech("user"), *test_set.speech("reply"))
    return [clip for clip in clips if _seconds(clip) <= _MAX_CLIP_S]


def tokenizer_rows(
    models: Models, test_set: TestSet, codes: Mapping[str, NDArray[np.int64]], texts: Mapping[str, str]
) -> list[Row]:
    """What the tokens keep: words, by the tokenizer's own recognition head; use of the codebook; pitch and level.

    Args:
        codes, texts: of `short_speech(test_set)`, as `tokenize` gives them.
    """
    group = "tokenizer"
    clips = short_speech(test_set)
    rows = []
    dialogue_of = {turn.question: dialogue.id for dialogue in test_set.dialogues for turn in dialogue.turns}
    for split in SPLITS:
        name = f"WER of its recognition head, {SPLIT_NAMES[split]}"
        read = [c for c in clips if c.role == "user" and c.split == split and c.id in texts]
        if models.recognizer is None:
            rows.append(
                Row(group, name, None, "%", TRANSCRIPT_AIMS[split], skipped="the model has no recognition head")
            )
            continue
        pairs, units = [(c.text, texts[c.id]) for c in read], [dialogue_of.get(c.id, c.id) for c in read]
        rows.append(error_row(group, name, pairs, TRANSCRIPT_AIMS[split], units))
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
    recognizer: SoundRecognizer | None,
    why_not: str,
    naturalness: Naturalness | None,
    why_no_mos: str,
) -> list[Row]:
    """Tokens -> speech: reference replies, tokenized and resynthesized, beside the same recordings as they were."""
    group = "decoder"
    clips = plain_replies(test_set)
    codes, _ = tokenize(models.tokenizer, clips)
    made = {
        c.id: synthesize(codes[c.id], models.decoder, models.card)
        for c in steps(clips, "part 2 of 6, resynthesis", "clips")
    }
    rows = []
    if recognizer is None:
        rows.append(Row(group, "WER after resynthesis", None, "%", skipped=why_not))
    else:
        recorded = [(c.text, recognizer.transcribe(c.wav, c.sample_rate)) for c in clips]
        reference = error_row(group, "WER of the reference audio", recorded)
        resynthesized = [(c.text, recognizer.transcribe(made[c.id], rates.SPEAK_SAMPLE_RATE)) for c in clips]
        again = error_row(group, "WER after resynthesis", resynthesized)
        rows += [again, reference, difference_row(group, "WER lost by resynthesis", again, reference, 0.03)]
    if naturalness is None:
        rows.append(Row(group, "DNSMOS after resynthesis", None, "MOS", skipped=why_no_mos))
    else:
        after = quality_row(
            group,
            "DNSMOS after resynthesis",
            [naturalness(made[c.id], rates.SPEAK_SAMPLE_RATE) for c in clips],
        )
        before = quality_row(group, "DNSMOS of the reference audio", [naturalness(c.wav, c.sample_rate) for c in clips])
        rows += [after, before, difference_row(group, "DNSMOS lost by resynthesis", before, after, 0.3, "MOS")]
    return rows


def plain_replies(test_set: TestSet, num: int = NUM_DECODER_CLIPS) -> list[TestClip]:
    """At most `num` reference replies of at most 12 s in the plain style, spread evenly over the set."""
    clips = [c for c in test_set.speech("reply") if c.style == PLAIN and _seconds(c) <= MAX_DECODER_S]
    return spread(clips, num)


@torch.inference_mode()
def tokenize(
    tokenizer: SpeechTokenizer,
    clips: Sequence[TestClip],
    recognizer: Recognizer | SpeechRecognizer | None = None,
    name: str = "speech tokens",
) -> tuple[dict[str, NDArray[np.int64]], dict[str, str]]:
    """Codes of each clip of at most 30 s by id, and with a recognition head the text of the user's clips.

    Args:
        name: of the work, for the progress line.
    """
    codes: dict[str, NDArray[np.int64]] = {}
    texts: dict[str, str] = {}
    device = tokenizer.quantizer.codebook.weight.device
    order = sorted(clips, key=lambda clip: (clip.role, len(clip.samples)))
    for at in steps(range(0, len(order), _BATCH), name, "batches"):
        batch = order[at : at + _BATCH]
        wav = Padded.stack([torch.from_numpy(_at_16k(clip)) for clip in batch])
        quantized = tokenizer.quantize_piece(Padded(wav.values.to(device), wav.lengths.to(device)))
        for clip, row in zip(batch, quantized.codes.rows(), strict=True):
            codes[clip.id] = row.cpu().numpy()
        if recognizer is not None and any(clip.role == "user" for clip in batch):
            heard = recognizer.transcribe(Padded(quantized.values, quantized.codes.lengths))
            texts |= {clip.id: text for clip, text in zip(batch, heard, strict=True)}
    return codes, texts


def _seconds(clip: TestClip) -> float:
    return len(clip.samples) / clip.sample_rate


def _at_16k(clip: TestClip) -> NDArray[np.float32]:
    return resample(clip.wav, clip.sample_rate, rates.LISTEN_SAMPLE_RATE)
