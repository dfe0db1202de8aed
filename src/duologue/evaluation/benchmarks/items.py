"""The one row type of all benchmarks: what is asked, and how the answer is scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from duologue.config import read_json_lines


class Scoring(StrEnum):
    """How an answer is scored. The judged ones need `--judge`; the others are computed offline."""

    CONTAINS = "contains"  # an accepted answer stands in the reply
    CLOSED = "closed"  # valid or invalid, yes or no, or a whole number
    CHOICE = "choice"  # a letter of a multiple-choice question
    REFUSAL = "refusal"  # the right answer to a harmful request is a refusal
    REPEAT = "repeat"  # the reply must have the words of the reference
    READ = "read"  # the text is read aloud
    CORRECT = "correct"  # judged: right or wrong by the reference
    OPEN = "open"  # judged: 1 to 5
    REFERENCE = "reference"  # judged: 1 to 5, with a reference
    DIALOGUE = "dialogue"  # judged: 1 to 5, all turns at once
    CHAT = "chat"  # judged: 0 to 10, as in table 6 of arXiv 2412.02612
    ELSEWHERE = "elsewhere"  # only the benchmark's own script scores it

    @property
    def is_judged(self) -> bool:
        return self in JUDGED


JUDGED = (Scoring.CORRECT, Scoring.OPEN, Scoring.REFERENCE, Scoring.DIALOGUE, Scoring.CHAT)


@dataclass(frozen=True)
class SoundPlace:
    """A sound file, or one cell of the column `audio` of a Parquet file."""

    path: Path
    row: int | None = None

    def read(self) -> Path | bytes:
        """The file, or the bytes of one. Raises ValueError if the Parquet file has no such sound."""
        return self.path if self.row is None else _read_cell(self.path, self.row)


@dataclass(frozen=True)
class BenchmarkQuestion:
    """One turn of the user.

    Attributes:
        sound: None for a written turn.
        text: transcript of the sound, for judges and reports; the question itself where there is no sound.
        references: accepted or suggested answers.
    """

    sound: SoundPlace | None
    text: str
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchmarkItem:
    """One conversation of a benchmark.

    Attributes:
        id: unique in the benchmark.
        subset: data set within the benchmark.
        language: "en", "zh", or empty for several.
        fields: the benchmark's own row without its sound.
        voice: a recording of the voice that the reply should have; the file may be missing.
    """

    id: str
    subset: str
    questions: tuple[BenchmarkQuestion, ...]
    scoring: Scoring
    language: str = "en"
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)
    voice: SoundPlace | None = None


@dataclass(frozen=True)
class GivenTurn:
    """The reply to one turn, as it lies on disk.

    Attributes:
        sound: path relative to the folder of the results; empty without sound.
        first_audio_s, total_s: seconds after the end of the question.
    """

    text: str
    sound: str = ""
    first_audio_s: float | None = None
    audio_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True)
class GivenAnswer:
    """The replies to one item; `error` says why there are none."""

    id: str
    subset: str
    turns: tuple[GivenTurn, ...] = ()
    error: str = ""

    @property
    def text(self) -> str:
        """Of the last turn, which is the scored one; empty after an error."""
        return self.turns[-1].text if self.turns else ""

    @property
    def sound(self) -> str:
        """Of the last turn."""
        return self.turns[-1].sound if self.turns else ""


Loader = Callable[[Path], list[BenchmarkItem]]
ResultWriter = Callable[[Path, Path, str, Sequence[tuple[BenchmarkItem, GivenAnswer]]], None]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        load: reads the data folder; raises ValueError if it does not have the layout.
        write: writes the benchmark's own result layout: (target folder, folder of the results, model name, answers).
    """

    name: str
    title: str
    load: Loader
    write: ResultWriter | None = None


def read_rows(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file. Raises ValueError if a row lacks one of the keys."""
    rows = []
    for where, row in read_json_lines(path):
        if missing := [key for key in keys if key not in row]:
            raise ValueError(f"{where} has no {missing[0]!r}")
        rows.append(row)
    return rows


def texts(value: object) -> tuple[str, ...]:
    """A text or a list of texts as a tuple without empty ones; None gives no text."""
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return tuple(str(one).strip() for one in values if str(one).strip())


def existing(sound: Path, where: str) -> SoundPlace:
    """Raises ValueError if there is no such file."""
    if not sound.is_file():
        raise ValueError(f"{where} names the sound {sound.name}, which is missing: {sound}")
    return SoundPlace(sound)


def _read_cell(path: Path, row: int) -> bytes:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        left = row
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if left < size:
                cell = file.read_row_group(group, columns=["audio"]).column("audio")[left].as_py()
                data = cell.get("bytes") if isinstance(cell, dict) else None
                if not data:
                    raise ValueError(f"{path}, row {row} has no sound in the column 'audio'")
                return bytes(data)
            left -= size
    raise ValueError(f"{path} has no row {row}")
