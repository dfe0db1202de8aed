"""LJSpeech's metadata.csv, and folders of sound files with texts beside them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from duologue.config import read_lines
from duologue.training.sources.items import (
    SOUND_SUFFIXES,
    ImportOptions,
    Source,
    SourceItem,
    Utterance,
    read_sound,
    read_text,
    refuse,
)


def read_ljspeech(path: Path, options: ImportOptions) -> Source:
    """Reads `id|text|normalized text` lines beside `wavs/`. The normalized text is taken where there is one.

    With four columns or more the second is the speaker, as in multi-speaker variants.

    Args:
        path: metadata.csv or its folder.
    """
    table = path / "metadata.csv" if path.is_dir() else path
    rows = [line.split("|") for _, line in read_lines(table)]

    def read(row: list[str]) -> Utterance:
        name, *rest = row
        voice = rest.pop(0) if len(rest) > 2 else ""
        text = read_text(next((text for text in reversed(rest) if text.strip()), ""))
        return Utterance(text, read_sound(_named(table.parent, name, options), options, table.parent), voice)

    return Source([SourceItem(row[0], partial(read, row)) for row in rows], len(rows))


def read_folder(path: Path, options: ImportOptions) -> Source:
    """Reads every sound file below a folder, with the `.txt` of the same name.

    The folder of a file is its voice, where files lie in folders.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower().lstrip(".") in SOUND_SUFFIXES)

    def read(file: Path) -> Utterance:
        beside = file.with_suffix(".txt")
        if not beside.is_file():
            refuse("there is no .txt of the same name")
        try:
            text = read_text(beside.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError:
            refuse("the .txt is not UTF-8")
        return Utterance(text, read_sound(file.resolve(), options, path), _folder_name(file, path))

    return Source([SourceItem(file.relative_to(path).as_posix(), partial(read, file)) for file in files], len(files))


def _named(folder: Path, name: str, options: ImportOptions) -> Path:
    """The sound file of an id: in `wavs/` or where the id says, with a suffix or without."""
    roots = [options.audio_root] if options.audio_root else [folder / "wavs", folder]
    for root in roots:
        for suffix in ("", *(f".{suffix}" for suffix in SOUND_SUFFIXES)):
            if (file := root / f"{name}{suffix}").is_file():
                return file.resolve()
    return refuse("the sound file is missing")


def _folder_name(file: Path, root: Path) -> str:
    return "" if file.parent == root else file.parent.relative_to(root).as_posix()
