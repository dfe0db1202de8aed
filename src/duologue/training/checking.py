"""Checks the clips of an audio corpus, and draws the distributions.

Shapes: S samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from duologue.config import write_json
from duologue.rates import LISTEN_SAMPLE_RATE
from duologue.scoring import word_errors
from duologue.training.data import Clip, Clips, Wav

Transcribe = Callable[[Wav, int, str], str]
"""wav (S,), its sample rate and its language -> what is said."""

FAULTS = {
    "wrong rate": f"stored at another sample rate than {LISTEN_SAMPLE_RATE} Hz",
    "narrow band": "nothing above 4 kHz: recorded at 8 kHz or less",
    "silent": "no speech can be heard",
    "clipped": "samples stay at full scale",
    "too short": "shorter than the limit",
    "too long": "longer than the limit",
    "text too fast": "more text than can be said in that time",
    "text too slow": "less text than the time suggests",
    "wrong text": "a recognizer reads other words",
    "double text": "the same text in the same voice came before",
}
_FULL_SCALE = 32766 / 32768
_LETTERS = {"zh": 4.0, "ja": 2.0, "ko": 2.0}  # letters of a Latin script that one character is worth


@dataclass(frozen=True)
class CheckLimits:
    """Limits of a clip without fault.

    Attributes:
        min_s, max_s: length; the tokenizer was trained on pieces of up to 30 s.
        min_level_db: dBFS RMS of the loudest 20 ms.
        max_clipped: share of the samples at full scale.
        min_band_db: level above 4 kHz relative to the whole.
        letters_per_s: range of the speed of the text; CJK characters count as several letters.
        max_errors: word error rate of the recognizer.
    """

    min_s: float = 0.3
    max_s: float = 30.0
    min_level_db: float = -45.0
    max_clipped: float = 0.001
    min_band_db: float = -60.0
    letters_per_s: tuple[float, float] = (3.0, 30.0)
    max_errors: float = 0.5


@dataclass(frozen=True)
class CheckedClip:
    """The measures of one clip. `letters_per_s` is None without text, `errors` and `heard` without a recognizer."""

    id: str
    split: str
    voice: str
    seconds: float
    level_db: float
    clipped: float
    band_db: float
    letters_per_s: float | None
    errors: float | None
    heard: str | None
    faults: tuple[str, ...]


@dataclass(frozen=True)
class CheckReport:
    """Result of a check.

    Attributes:
        skipped: measure -> why it was not taken.
    """

    clips: list[CheckedClip]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def faults(self) -> dict[str, int]:
        """Number of clips with each fault."""
        counts = Counter(fault for clip in self.clips for fault in clip.faults)
        return {fault: counts[fault] for fault in FAULTS}

    def to_json(self) -> dict[str, Any]:
        """Counts and the clips with faults."""
        return {
            "num_clips": len(self.clips),
            "hours": sum(clip.seconds for clip in self.clips) / 3600,
            "num_faulty": sum(bool(clip.faults) for clip in self.clips),
            "faults": self.faults,
            "skipped": self.skipped,
            "splits": dict(Counter(clip.split for clip in self.clips)),
            "voices": dict(Counter(clip.voice for clip in self.clips).most_common(100)),
            "clips": [asdict(clip) for clip in self.clips if clip.faults],
        }


def check_corpus(
    folder: str | Path,
    limits: CheckLimits | None = None,
    transcribe: Transcribe | None = None,
    why_not: str = "no recognizer was named",
    limit: int | None = None,
) -> CheckReport:
    """Measures every clip of a corpus folder.

    Args:
        transcribe: a recognizer; None leaves out "wrong text" for the reason `why_not`.
        limit: check only this number of clips, spread evenly.

    Raises:
        ValueError: the folder holds no clips.
    """
    limits, clips = limits or CheckLimits(), Clips(folder)
    indices = np.arange(len(clips))
    if limit is not None and limit < len(clips):
        indices = np.linspace(0, len(clips) - 1, limit).astype(int)
    seen: set[tuple[str, str]] = set()
    checked = []
    for index in tqdm(indices.tolist(), desc="check", unit="clip", mininterval=1.0):
        clip = clips.records[index]
        checked.append(_checked(clip, clips.wav(index), limits, transcribe, (clip.text, clip.voice) in seen))
        seen |= {(clip.text, clip.voice)} if clip.text else set()
    return CheckReport(checked, {} if transcribe else {"wrong text": why_not})


def _checked(clip: Clip, wav: Wav, limits: CheckLimits, transcribe: Transcribe | None, double: bool) -> CheckedClip:
    seconds = clip.num_samples / clip.sample_rate
    level, band = _level_db(wav, clip.sample_rate), _band_db(wav, clip.sample_rate)
    clipped = float(np.mean(np.abs(wav) >= _FULL_SCALE)) if len(wav) else 0.0
    speed = _letters(clip.text, clip.language) / seconds if clip.text and seconds else None
    heard = errors = None
    if transcribe is not None and clip.text and len(wav):
        heard = transcribe(wav, clip.sample_rate, clip.language)
        edits, words = word_errors(clip.text, heard, clip.language)
        errors = edits / words if words else None
    silent = level < limits.min_level_db
    found = {
        "wrong rate": clip.sample_rate != LISTEN_SAMPLE_RATE or len(wav) != clip.num_samples,
        "narrow band": not silent and band < limits.min_band_db,
        "silent": silent,
        "clipped": clipped > limits.max_clipped,
        "too short": seconds < limits.min_s,
        "too long": seconds > limits.max_s,
        "text too fast": speed is not None and speed > limits.letters_per_s[1],
        "text too slow": speed is not None and speed < limits.letters_per_s[0],
        "wrong text": errors is not None and errors > limits.max_errors,
        "double text": double,
    }
    faults = tuple(fault for fault, is_so in found.items() if is_so)
    return CheckedClip(clip.id, clip.split, clip.voice, seconds, level, clipped, band, speed, errors, heard, faults)


def model_recognizer(name: str, device: str = "cpu") -> Transcribe:
    """The recognizer of a model, on the codes of its tokenizer.

    Args:
        name: a preset or a model folder.

    Raises:
        ValueError: there is no such model, or it has no recognizer.
    """
    import torch

    from duologue.audio import resample
    from duologue.conversation.chatbot import model_folder
    from duologue.layers import Padded
    from duologue.models import open_folder, transcribe

    opened = open_folder(model_folder(name))
    tokenizer, recognizer = opened.load_tokenizer(device).eval(), opened.load_recognizer(device)
    if recognizer is None:
        raise ValueError(f"{name} has no recognizer; name another model, or a CTranslate2 folder of Whisper")

    def read(wav: Wav, rate: int, language: str) -> str:
        heard = torch.from_numpy(resample(wav, rate, LISTEN_SAMPLE_RATE))[None].to(device)
        with torch.inference_mode():
            (codes,) = tokenizer(Padded.full(heard)).rows()
        return transcribe(codes.tolist(), tokenizer, recognizer)

    return read


def draw(report: CheckReport, out: str | Path) -> Path:
    """Draws histograms of the measures and the number of clips with each fault; returns the PNG's path."""
    from matplotlib.figure import Figure  # of the extra `train`

    columns: dict[str, list[float]] = {
        "length in s": [clip.seconds for clip in report.clips],
        "loudest 20 ms in dBFS": [clip.level_db for clip in report.clips],
        "level above 4 kHz in dB": [clip.band_db for clip in report.clips],
        "letters per second": [clip.letters_per_s for clip in report.clips if clip.letters_per_s is not None],
        "word error rate": [clip.errors for clip in report.clips if clip.errors is not None],
    }
    figure = Figure(figsize=(14, 7), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    for axis, (name, values) in zip(axes, columns.items(), strict=False):
        if values:
            axis.hist(np.clip(values, *np.percentile(values, [0, 99.5])), bins=50, color="tab:blue")
        else:
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
        axis.set_title(name, fontsize=10)
        axis.set_ylabel("clips", fontsize=8)
        axis.grid(alpha=0.3)
    faults = report.faults
    axes[-1].barh(list(faults), list(faults.values()), color="tab:orange")
    axes[-1].set_title(f"faults of {len(report.clips)} clips", fontsize=10)
    axes[-1].invert_yaxis()
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


def save(report: CheckReport, folder: str | Path) -> list[Path]:
    """Writes check.json and check.png into a folder; returns their paths."""
    path = Path(folder) / "check.json"
    write_json(path, report.to_json())
    return [path, draw(report, path.with_suffix(".png"))]


def _level_db(wav: Wav, rate: int) -> float:
    """Level of the loudest 20 ms, in dBFS."""
    size = min(rate // 50, len(wav))
    if not size:
        return -120.0
    frames = wav[: len(wav) // size * size].reshape(-1, size)
    return float(10 * np.log10(np.mean(frames**2, axis=1).max() + 1e-12))


def _band_db(wav: Wav, rate: int) -> float:
    """Level above 4 kHz relative to the whole, in dB."""
    power: NDArray[np.float64] = np.abs(np.fft.rfft(wav)) ** 2 if len(wav) else np.zeros(1)
    above = power[np.fft.rfftfreq(max(len(wav), 1), 1 / rate) > 4200]
    return float(10 * np.log10((above.sum() + 1e-12) / (power.sum() + 1e-12)))


def _letters(text: str, language: str) -> float:
    return sum(char.isalnum() for char in text) * _LETTERS.get(language, 1.0)
