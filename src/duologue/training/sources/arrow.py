"""Hugging Face data sets on disk, read by `datasets` (extra `data`): parquet files, and folders of `save_to_disk`.

Sound is not decoded by `datasets`. Nothing is fetched and no code of a data set runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from duologue.training.sources.items import (
    Dialogue,
    ImportedTurn,
    ImportOptions,
    Source,
    SourceItem,
    Utterance,
    foreign_codes,
    is_foreign,
    read_sound,
    read_text,
    refuse,
)

_GUESSES = {
    "audio": ("audio", "speech", "wav"),
    "text": ("text", "transcription", "transcript", "sentence", "normalized_text"),
    "voice": ("speaker_id", "speaker", "client_id", "voice"),
    "language": ("language", "lang", "locale"),
    "id": ("id", "key", "uid"),
    "question": ("question",),
    "question_audio": ("question_audio", "speech_input", "input_audio"),
    "answer": ("answer", "output"),
    "answer_audio": ("answer_audio", "output_audio"),
}
_FOREIGN_IDENTITY = "identity"  # the part of VoiceAssistant-400K in which another assistant says who it is


def read_datasets(path: Path, options: ImportOptions) -> Source:
    """Reads utterances: a column of sound and a column of text.

    Raises:
        ValueError: no such columns, or a column of another tokenizer's codes was asked for.
    """

    def read(row: dict[str, Any], columns: dict[str, str], folder: Path) -> Utterance:
        text = read_text(row[columns["text"]])
        wav = read_sound(row[columns["audio"]], options, folder)
        return Utterance(text, wav, _name(row, columns, "voice"), _name(row, columns, "language"))

    return _source(path, options, ("audio", "text"), read)


def read_exchanges(path: Path, options: ImportOptions) -> Source:
    """Reads a spoken question and its answer in each row, as in VoiceAssistant-400K.

    The answer is written where there is no sound. Rows of the part "identity" are skipped: there another assistant
    says who it is.

    Raises:
        ValueError: as in `read_datasets`.
    """

    def read(row: dict[str, Any], columns: dict[str, str], folder: Path) -> Dialogue:
        if row.get("split_name") == _FOREIGN_IDENTITY:
            refuse("the answer names another assistant (split_name: identity)")
        question = row[columns["question"]] if "question" in columns else ""
        asked = read_sound(row[columns["question_audio"]], options, folder)
        said = row.get(columns.get("answer_audio", ""))
        reply = None if said is None else read_sound(said, options, folder)
        user = ImportedTurn("user", " ".join((question or "").split()), asked)
        turns = (user, ImportedTurn("assistant", read_text(row[columns["answer"]]), reply))
        return Dialogue(turns, _name(row, columns, "language"))

    return _source(path, options, ("question_audio", "answer"), read)


_ReadRow = Callable[[dict[str, Any], dict[str, str], Path], Utterance | Dialogue]


def _source(path: Path, options: ImportOptions, needed: tuple[str, ...], read: _ReadRow) -> Source:
    splits, total = _open(path)
    names = list(dict.fromkeys(name for rows in splits.values() for name in rows.column_names or ()))
    if codes := [name for name in options.columns.values() if is_foreign(name)]:
        raise ValueError(f"{codes[0]} is no column of sound or text: {foreign_codes(codes)[codes[0]]}")
    if unknown := [name for name in options.columns.values() if name not in names]:
        raise ValueError(f"{path} has no column {unknown[0]!r}; its columns are {', '.join(names)}")
    found = {what: next((name for name in guesses if name in names), "") for what, guesses in _GUESSES.items()}
    columns = {what: name for what, name in {**found, **options.columns}.items() if name}
    if missing := [what for what in needed if what not in columns]:
        raise ValueError(
            f"{path} has no column for {missing[0]}; name it: --columns {missing[0]}=NAME. "
            f"Its columns are {', '.join(names)}"
        )
    folder = path if path.is_dir() else path.parent

    def items() -> Iterator[SourceItem]:
        for split, rows in splits.items():
            for number, row in enumerate(_undecoded(rows)):
                known = _name(row, columns, "id") or "-".join(
                    str(row[key]) for key in ("split_name", "index", "round") if row.get(key) not in (None, "")
                )
                yield SourceItem(known or f"{split}-{number:08d}", partial(read, row, columns, folder), split)

    return Source(items(), total, foreign_codes(names))


def _open(path: Path) -> tuple[dict[str, Any], int | None]:
    """Splits of a data set by name, and the number of all rows if it is known."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # must be set before the import
    import datasets

    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        loaded = datasets.load_from_disk(str(path))
        splits = dict(loaded) if isinstance(loaded, dict) else {"": loaded}
        return splits, sum(len(rows) for rows in splits.values())
    import pyarrow.parquet as pq

    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        raise ValueError(f"{path} holds no parquet files and is no folder of save_to_disk")
    # A stream: without it all data would be copied into the cache of `datasets`.
    where = {"path": str(path)} if path.is_dir() else {"path": "parquet", "data_files": str(path)}
    splits = dict(datasets.load_dataset(**where, streaming=True))
    try:
        return splits, sum(pq.read_metadata(file).num_rows for file in files)
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses
        raise ValueError(f"{path} holds a parquet file that cannot be read: {error}") from None


def _undecoded(rows: Any) -> Any:
    """The same rows with sound as {path, bytes}."""
    import datasets

    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Audio):
            rows = rows.cast_column(name, datasets.Audio(decode=False))
    return rows


def _name(row: dict[str, Any], columns: dict[str, str], what: str) -> str:
    value = row.get(columns.get(what, ""))
    return "" if value is None else str(value)
