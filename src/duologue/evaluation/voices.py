"""A voice before and after its training: recordings, vocoder alone, and speech from the tokens of the recordings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from duologue import rates
from duologue.evaluation.conversations import Waveform
from duologue.evaluation.intelligibility import Naturalness, error_row, if_available, quality_row
from duologue.evaluation.intervals import bootstrap
from duologue.evaluation.page import PageRow
from duologue.evaluation.recognition import SoundRecognizer, open_recognizer
from duologue.evaluation.report import Row, difference_row
from duologue.evaluation.sound_quality import SpeakerEmbedder
from duologue.progress import steps

RECORDING = "recordings"
NO_MODEL = "no speaker_model was given"


@dataclass(frozen=True, eq=False)
class VoiceClip:
    """A recording of the voice: wav (S,) float32 at 16 kHz, its text, and its number in the corpus."""

    id: str
    text: str
    wav: NDArray[np.float32]
    index: int


Synthesis = Callable[[VoiceClip], NDArray[np.float32]]  # at 22.05 kHz


@dataclass(frozen=True)
class Judges:
    """What listens; None with the reason why not."""

    recognizer: SoundRecognizer | None
    why_not: str
    naturalness: Naturalness | None
    why_no_mos: str
    embedder: SpeakerEmbedder | None


def compare_voices(
    clips: Sequence[VoiceClip], syntheses: Mapping[str, Synthesis], judges: Judges
) -> tuple[list[Row], list[PageRow]]:
    """Word error rate, DNSMOS and likeness to the recordings for each kind of sound, and the rows of a page of players.

    Args:
        clips: recordings that were not trained on.
        syntheses: kinds of sound by name, such as "before" and "after".
    """
    rates_of = {RECORDING: rates.LISTEN_SAMPLE_RATE, **dict.fromkeys(syntheses, rates.SPEAK_SAMPLE_RATE)}
    sounds: dict[str, list[NDArray[np.float32]]] = {name: [] for name in rates_of}
    for clip in steps(clips, "sound of the voice", "clips"):
        sounds[RECORDING].append(clip.wav)
        for name, synthesis in syntheses.items():
            sounds[name].append(synthesis(clip))
    rows: list[Row] = []
    heard: dict[str, list[str]] = {}
    for name, wavs in sounds.items():
        rate = rates_of[name]
        if judges.recognizer is None:
            rows.append(Row(name, "WER", None, "%", skipped=judges.why_not))
        else:
            heard[name] = [judges.recognizer.transcribe(wav, rate) for wav in wavs]
            pairs = [(clip.text, text) for clip, text in zip(clips, heard[name], strict=True)]
            rows.append(error_row(name, "WER", pairs))
        if judges.naturalness is None:
            rows.append(Row(name, "DNSMOS", None, "MOS", skipped=judges.why_no_mos))
        else:
            rows.append(quality_row(name, "DNSMOS", [judges.naturalness(wav, rate) for wav in wavs]))
        if name != RECORDING:
            rows.append(_likeness_row(name, wavs, sounds[RECORDING], judges.embedder))
    by_name = {(row.group, row.name): row for row in rows}
    for name in syntheses:
        lost = difference_row(name, "WER lost", by_name[name, "WER"], by_name[RECORDING, "WER"], None)
        rows.append(lost)
    shown = [
        PageRow(
            group=name,
            detail=clip.id,
            question=clip.text,
            answer=clip.text,
            heard=heard[name][number] if name in heard else None,
            question_sound=Waveform(clip.wav, rates.LISTEN_SAMPLE_RATE),
            answer_sound=Waveform(sounds[name][number], rates_of[name]),
        )
        for number, clip in enumerate(clips)
        for name in syntheses
    ]
    return rows, shown


def _likeness_row(
    name: str,
    wavs: Sequence[NDArray[np.float32]],
    recordings: Sequence[NDArray[np.float32]],
    embedder: SpeakerEmbedder | None,
) -> Row:
    title = "speaker likeness to the recordings (cosine)"
    if embedder is None:
        return Row(name, title, None, skipped=NO_MODEL)
    values = [
        embedder.likeness(embedder.embed(wav, rates.SPEAK_SAMPLE_RATE), embedder.embed(own, rates.LISTEN_SAMPLE_RATE))
        for wav, own in zip(wavs, recordings, strict=True)
    ]
    interval = bootstrap(values, [1.0] * len(values), [str(number) for number in range(len(values))])
    return Row(name, title, float(np.mean(values)), aim_is="at least", num=len(values), interval=interval)


def open_judges(recognizer: str, speaker_model: str) -> Judges:
    """Opens what listens.

    Args:
        recognizer: CTranslate2 folder of a Whisper; empty for the usual places.
        speaker_model: ONNX file of a speaker embedder; empty for none.

    Raises:
        ValueError: a file that is named is missing or of another kind.
    """
    opened, why_not = open_recognizer(Path(recognizer) if recognizer else None)
    naturalness, why_no_mos = if_available(Naturalness)
    return Judges(opened, why_not, naturalness, why_no_mos, SpeakerEmbedder(speaker_model) if speaker_model else None)
