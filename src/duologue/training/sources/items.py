"""What every source yields: items, each read into an utterance or a dialogue on demand.

Shapes: S samples at `SAMPLE_RATE`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from duologue.audio import check_wav, resample
from duologue.rates import LISTEN_SAMPLE_RATE
from duologue.sound_files import load_channels, mix_down

Wav = NDArray[np.float32]

SAMPLE_RATE = LISTEN_SAMPLE_RATE
SOUND_SUFFIXES = ("wav", "flac", "ogg", "opus", "mp3", "m4a", "mp4", "aac", "webm", "amr")
SOUND_NAME = "the sound file"  # in reasons, which are counted
_FOREIGN = re.compile(r"(^|_)(snac|mimi|encodec|codec|codes?|units?|(speech|audio)_tokens?|token)($|_)", re.I)
_URL = re.compile(r"^\w+://")


@dataclass(frozen=True)
class ImportOptions:
    """Choices of an import.

    Attributes:
        language, voice: where the source names none.
        role: of utterances: "free", "user" or "reply" (the voice of the chatbot).
        columns: name of the column or key for each of text, audio, voice, language, question, answer, question_audio,
            answer_audio; others are guessed.
        audio_root: folder that paths of sound files start from; by default that of the file that names them.
        sample_rate: in Hz, of sound that is stored as bare numbers.
        transcripts: text beside the sound of a user's turn is its transcript, not an instruction.
        max_s: longer sounds are skipped.
    """

    language: str = "en"
    voice: str = ""
    role: str = "free"
    columns: Mapping[str, str] = field(default_factory=dict)
    audio_root: Path | None = None
    sample_rate: int | None = None
    transcripts: bool = False
    max_s: float = 120.0


@dataclass(frozen=True)
class Utterance:
    """One clip. `wav`: (S,) float32 in [-1, 1]."""

    text: str
    wav: Wav
    voice: str = ""
    language: str = ""


@dataclass(frozen=True)
class ImportedTurn:
    """A turn of a dialogue; `wav` (S,) is None where nothing is spoken, `text` empty where no transcript is known."""

    role: str
    text: str
    wav: Wav | None = None
    voice: str = ""


@dataclass(frozen=True)
class Dialogue:
    """Turns of a user and the assistant in alternation, the last one the assistant's.

    Raises:
        ValueError: the turns are others.
    """

    turns: tuple[ImportedTurn, ...]
    language: str = ""

    def __post_init__(self) -> None:
        if not self.turns or [turn.role for turn in self.turns] != ["user", "assistant"] * (len(self.turns) // 2):
            refuse("the turns are not those of a user and the assistant in alternation")


@dataclass(frozen=True)
class SourceItem:
    """One entry of a source.

    Attributes:
        id: unique in the source.
        read: decodes the sound; called in a thread. It raises ValueError with the reason why the item is skipped.
        split: of the source; empty where it has none.
    """

    id: str
    read: Callable[[], Utterance | Dialogue]
    split: str = ""


@dataclass(frozen=True)
class Source:
    """The items of a source, in an order that never changes.

    Attributes:
        total: number of items; None where only reading tells.
        left_out: column or file that is not used -> the reason. A reader may add to it while it runs.
    """

    items: Iterable[SourceItem]
    total: int | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[SourceItem]:
        return iter(self.items)


def is_foreign(column: str) -> bool:
    """Whether a column is named like the codes of another speech tokenizer."""
    return bool(_FOREIGN.search(column))


def foreign_codes(columns: Iterable[str]) -> dict[str, str]:
    """The columns that hold codes of another speech tokenizer, each with the reason why it is left out."""
    reason = "codes of another speech tokenizer mean nothing to this one; import their sound instead"
    return {name: reason for name in columns if is_foreign(name)}


def refuse(reason: str) -> NoReturn:
    """Raises ValueError: the reason why an item is skipped."""
    raise ValueError(reason)


def read_sound(value: Any, options: ImportOptions, folder: Path) -> Wav:
    """Reads the sound of any layout as (S,) at `SAMPLE_RATE`.

    Args:
        value: a path, the bytes of a file, {path, bytes} or {array, sampling_rate} of Hugging Face, or a list of
            samples, of which `options.sample_rate` states the rate.
        folder: where a relative path starts, unless `options.audio_root` is given.

    Raises:
        ValueError: missing, damaged, too long or not finite.
    """
    if isinstance(value, Mapping) and value.get("array") is not None:
        return _from_numbers(value["array"], int(value["sampling_rate"]), options)
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None or (isinstance(value, str | bytes) and not value):
        refuse("there is no sound")
    if isinstance(value, list | np.ndarray):
        if options.sample_rate is None:
            refuse("the sound is bare numbers; state their rate: --sample-rate HZ")
        return _from_numbers(value, options.sample_rate, options)
    if isinstance(value, str | Path):
        if _URL.match(str(value)):
            refuse("the sound is a URL; download it first")
        value = (options.audio_root or folder) / value
        if not value.is_file():
            refuse("the sound file is missing")
    elif not isinstance(value, bytes):
        refuse(f"the sound is {type(value).__name__}, which holds no sound file")
    channels, _ = load_channels(value, SAMPLE_RATE, options.max_s, SOUND_NAME)
    return mix_down(channels)


def read_text(value: Any) -> str:
    """Text with single spaces. Raises ValueError for none."""
    text = " ".join(value.split()) if isinstance(value, str) else ""
    return text or refuse("the transcript is empty")


def _from_numbers(samples: Any, rate: int, options: ImportOptions) -> Wav:
    wav = check_wav(np.asarray(samples, np.float32), rate, SOUND_NAME)
    if len(wav) > options.max_s * rate:
        refuse(f"{SOUND_NAME} is longer than {options.max_s:.0f} s; cut it first")
    return resample(wav, rate, SAMPLE_RATE)
