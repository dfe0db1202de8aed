"""Data sets of speech and text in their own folders: LibriSpeech, AISHELL-1, LibriTTS, and pairs of story endings.

    LibriSpeech/test-clean/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt and ID.flac
    data_aishell/transcript/aishell_transcript_v0.8.txt and wav/test/SPEAKER/ID.wav
    LibriTTS/test-clean/SPEAKER/CHAPTER/ID.normalized.txt and ID.wav
    sStoryCloze/pairs.jsonl     id, context, right, wrong (sounds), right_text, wrong_text

The last layout is this package's own, because the published sets have no transcripts in a known place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from duologue.config import read_lines
from duologue.evaluation.benchmarks.items import BenchmarkItem, BenchmarkQuestion, Scoring, existing, read_rows, texts

LIBRISPEECH, AISHELL, LIBRITTS, CHAT = "LibriSpeech", "data_aishell", "LibriTTS", "chat"
STORIES = ("sTopic-StoryCloze", "sStoryCloze")


@dataclass(frozen=True)
class TranscribedSound:
    """A recording and its words."""

    id: str
    sound: Path
    text: str
    language: str


@dataclass(frozen=True)
class StoryPair:
    """The beginning of a story with its right and a wrong end, as sounds and texts."""

    id: str
    context: Path
    right: Path
    wrong: Path
    right_text: str
    wrong_text: str


@dataclass(frozen=True)
class SpeechSet:
    """A test set: its name in the tables, the folder below the data, and its reader."""

    name: str
    folder: str
    read: Callable[[Path], list[TranscribedSound]]


def read_librispeech(folder: Path) -> list[TranscribedSound]:
    """Raises ValueError if a recording is missing."""
    found = []
    for path in sorted(folder.glob("*/*/*.trans.txt")):
        for _, line in read_lines(path):
            key, _, text = line.partition(" ")
            found.append(TranscribedSound(key, existing(path.parent / f"{key}.flac", str(path)).path, text, "en"))
    return found


def read_aishell(folder: Path) -> list[TranscribedSound]:
    """The test recordings that have a transcript. Raises ValueError if there is no transcript file."""
    path = folder / "transcript" / "aishell_transcript_v0.8.txt"
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    lines = (line.partition(" ") for _, line in read_lines(path))
    transcripts = {key: text.strip() for key, _, text in lines}
    sounds = sorted((folder / "wav" / "test").glob("*/*.wav"))
    known = [sound for sound in sounds if sound.stem in transcripts]
    return [TranscribedSound(sound.stem, sound, transcripts[sound.stem], "zh") for sound in known]


def read_libritts(folder: Path) -> list[TranscribedSound]:
    """Raises ValueError if a recording is missing."""
    found = []
    for path in sorted(folder.glob("*/*/*.normalized.txt")):
        key = path.name.removesuffix(".normalized.txt")
        sound = existing(path.parent / f"{key}.wav", str(path)).path
        found.append(TranscribedSound(key, sound, path.read_text(encoding="utf-8").strip(), "en"))
    return found


def read_stories(folder: Path) -> list[StoryPair]:
    """Raises ValueError if a field or a sound is missing."""
    path = folder / "pairs.jsonl"
    pairs = []
    for number, row in enumerate(read_rows(path, ("id", "context", "right", "wrong", "right_text", "wrong_text"))):
        where = f"{path}, line {number + 1}"
        context, right, wrong = (
            existing(folder / str(row[name]), where).path for name in ("context", "right", "wrong")
        )
        pairs.append(StoryPair(str(row["id"]), context, right, wrong, str(row["right_text"]), str(row["wrong_text"])))
    return pairs


def read_chat(path: Path) -> list[BenchmarkItem]:
    """The questions of one JSON Lines file: sound, text, [reference]. Raises ValueError if one is missing."""
    items = []
    for number, row in enumerate(read_rows(path, ("sound", "text"))):
        sound = existing(path.parent / row["sound"], f"{path}, line {number + 1}")
        question = BenchmarkQuestion(sound, str(row["text"]), texts(row.get("reference")))
        items.append(BenchmarkItem(f"{path.stem}/{number:05d}", path.stem, (question,), Scoring.CHAT, "en"))
    return items


ASR_SETS = (
    SpeechSet("LibriSpeech test-clean", f"{LIBRISPEECH}/test-clean", read_librispeech),
    SpeechSet("LibriSpeech test-other", f"{LIBRISPEECH}/test-other", read_librispeech),
    SpeechSet("AISHELL-1 test", AISHELL, read_aishell),
)
TTS_SET = SpeechSet("LibriTTS test-clean", f"{LIBRITTS}/test-clean", read_libritts)
