"""The suite `voice`: recordings of a speaker, and what models make of their speech tokens.

It judges a new voice beside the recordings, the vocoder alone, and the model without the voice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from duologue import machine, rates
from duologue.audio import SpeakMel, resample
from duologue.checkpoint import file_hash
from duologue.conversation.chatbot import model_folder
from duologue.evaluation.conversations import Waveform
from duologue.evaluation.intelligibility import Naturalness, error_row, if_available, quality_row
from duologue.evaluation.intervals import bootstrap
from duologue.evaluation.page import PageRow
from duologue.evaluation.parts import tokenize
from duologue.evaluation.recognition import SoundRecognizer
from duologue.evaluation.report import Report, Row, difference_row
from duologue.evaluation.sound_quality import SpeakerEmbedder
from duologue.evaluation.testset import TestClip, read_clips, spread
from duologue.layers import Padded
from duologue.models import Card, Decoder, open_folder, synthesize
from duologue.progress import steps

RECORDING, VOCODER, BEFORE, AFTER = "recording", "vocoder", "before", "after"
LIKENESS = "speaker likeness to the recording (cosine)"
MAX_CLIP_S = 12.0

Synthesis = Callable[[TestClip], NDArray[np.float32]]  # a recording -> its words at 22.05 kHz


@dataclass(frozen=True)
class VoiceJudges:
    """What listens; None with the reason why not."""

    recognizer: SoundRecognizer | None
    why_no_text: str
    naturalness: Naturalness | None
    why_no_mos: str
    embedder: SpeakerEmbedder | None

    @classmethod
    def open(cls, recognizer: SoundRecognizer | None, why_no_text: str, speaker_model: Path | None) -> VoiceJudges:
        """Opens DNSMOS and an embedder. Raises ValueError if the file of the embedder is missing or another one."""
        embedder = None if speaker_model is None else SpeakerEmbedder(speaker_model)
        return cls(recognizer, why_no_text, *if_available(Naturalness), embedder)


def evaluate_voice(
    model: str, before: str | None, corpus: Path, judges: VoiceJudges, num_clips: int, device: str = "cpu"
) -> tuple[Report, list[PageRow]]:
    """All rows, and the rows of the page of players.

    Args:
        model: preset or folder of the model with the voice.
        before: the model without it, with the same tokenizer; None for no comparison.
        corpus: folder of recordings; its validation clips are taken, at most `num_clips`.

    Raises:
        ValueError: there are no validation clips, or the models have other tokenizers.
    """
    folders = {AFTER: open_folder(model_folder(model))}
    if before is not None:
        folders = {BEFORE: open_folder(model_folder(before)), **folders}
    hashes = {name: file_hash(folder.tokenizer_path) for name, folder in folders.items()}
    if len(set(hashes.values())) > 1:
        raise ValueError(f"{before} and {model} have different speech tokenizers, so their voices cannot be compared")
    valid = [clip for clip in read_clips(corpus) if clip.split == "valid"]
    clips = spread([clip for clip in valid if len(clip.samples) <= MAX_CLIP_S * clip.sample_rate], num_clips)
    if not clips:
        raise ValueError(f"{corpus} has no clip of split 'valid' and at most {MAX_CLIP_S:g} s")
    codes, _ = tokenize(folders[AFTER].load_tokenizer(device), clips)
    decoders = {name: folder.load_decoder(device) for name, folder in folders.items()}
    syntheses: dict[str, Synthesis] = {VOCODER: _vocoder_alone(decoders[AFTER])}
    for name, folder in folders.items():
        syntheses[name] = partial(_from_tokens, decoders[name], folder.card, codes)
    rows, shown = compare_voices(clips, syntheses, judges)
    about: dict[str, Any] = {"name": folders[AFTER].card.name, "before": before, "tokenizer": hashes[AFTER]}
    settings = {"corpus": str(corpus), "num_clips": len(clips)}
    return Report("voice", about, machine.describe(), tuple(rows), settings), shown


def compare_voices(
    clips: Sequence[TestClip], syntheses: Mapping[str, Synthesis], judges: VoiceJudges
) -> tuple[list[Row], list[PageRow]]:
    """Word error rate, DNSMOS and likeness to the recordings for each kind of sound, and the rows of the page."""
    sounds = {RECORDING: [(clip.wav, clip.sample_rate) for clip in clips]}
    for name, synthesis in syntheses.items():
        sounds[name] = [(synthesis(clip), rates.SPEAK_SAMPLE_RATE) for clip in steps(clips, name, "clips")]
    rows: list[Row] = []
    heard: dict[str, list[str]] = {}
    for name, made in sounds.items():
        if judges.recognizer is None:
            rows.append(Row(name, "WER", None, "%", skipped=judges.why_no_text))
        else:
            recognizer = judges.recognizer
            heard[name] = [recognizer.transcribe(*sound) for sound in steps(made, f"text of {name}", "clips")]
            rows.append(
                error_row(name, "WER", [(clip.text, text) for clip, text in zip(clips, heard[name], strict=True)])
            )
        if judges.naturalness is None:
            rows.append(Row(name, "DNSMOS", None, "MOS", skipped=judges.why_no_mos))
        else:
            rows.append(quality_row(name, "DNSMOS", [judges.naturalness(*sound) for sound in made]))
        if name != RECORDING:
            rows.append(_likeness_row(name, made, sounds[RECORDING], judges.embedder))
    errors = {row.group: row for row in rows if row.name == "WER"}
    rows += [difference_row(name, "WER lost", errors[name], errors[RECORDING], None) for name in syntheses]
    shown = [
        PageRow(
            group=name,
            detail=clip.id,
            question=clip.text,
            answer="",
            heard=heard[name][number] if name in heard else None,
            question_sound=Waveform(clip.wav, clip.sample_rate),
            answer_sound=Waveform(*sounds[name][number]),
        )
        for number, clip in enumerate(clips)
        for name in syntheses
    ]
    return rows, shown


def _likeness_row(
    name: str,
    made: Sequence[tuple[NDArray[np.float32], int]],
    recordings: Sequence[tuple[NDArray[np.float32], int]],
    embedder: SpeakerEmbedder | None,
) -> Row:
    if embedder is None:
        return Row(name, LIKENESS, None, skipped="no model of speakers was given")
    values = [
        embedder.likeness(embedder.embed(*one), embedder.embed(*own)) for one, own in zip(made, recordings, strict=True)
    ]
    interval = bootstrap(values, [1.0] * len(values), [str(number) for number in range(len(values))])
    return Row(name, LIKENESS, float(np.mean(values)), aim_is="at least", num=len(values), interval=interval)


def _from_tokens(
    decoder: Decoder, card: Card, codes: Mapping[str, NDArray[np.int64]], clip: TestClip
) -> NDArray[np.float32]:
    return synthesize(codes[clip.id], decoder, card)


def _vocoder_alone(decoder: Decoder) -> Synthesis:
    """Mel of a recording -> speech: what no training of the flow can improve."""
    mel = SpeakMel()

    @torch.inference_mode()
    def speak(clip: TestClip) -> NDArray[np.float32]:
        device = next(decoder.parameters()).device
        spoken = resample(clip.wav, clip.sample_rate, rates.SPEAK_SAMPLE_RATE)
        frames = Padded.full(mel(torch.from_numpy(spoken)[None]).to(device))
        state = decoder.vocoder.init_state(1)
        wav = Padded.concat([decoder.vocoder.step(frames, state), decoder.vocoder.flush(state)])
        return wav.rows()[0].cpu().numpy()

    return speak
