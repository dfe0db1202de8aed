"""WebDataset shards, read by `webdataset` (extra `data`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from duologue.training.sources.items import (
    SOUND_SUFFIXES,
    ImportOptions,
    Source,
    SourceItem,
    Utterance,
    foreign_codes,
    read_sound,
    read_text,
    refuse,
)


def read_webdataset(path: Path, options: ImportOptions) -> Source:
    """Reads the samples of one tar file or of all in a folder.

    A sample has one sound (`KEY.wav`, `KEY.flac`, ...) and a text: `KEY.txt`, or the key `text` of `KEY.json`, which
    may also hold `speaker` and `language`. The rest of a damaged tar file is left out.

    Raises:
        ValueError: there is no tar file.
    """
    import webdataset

    # Paths of existing files only: the library runs what follows "pipe:".
    files = [path] if path.is_file() else sorted([*path.rglob("*.tar"), *path.rglob("*.tar.gz")])
    if not files:
        raise ValueError(f"{path} holds no .tar files")
    left_out: dict[str, str] = {}

    def damaged(shard: Path, error: Exception) -> bool:
        left_out[shard.name] = f"the rest of this shard cannot be read: {error}"
        return False

    def items() -> Iterator[SourceItem]:
        for file in files:
            samples = webdataset.WebDataset(
                [str(file.resolve())], shardshuffle=False, empty_check=False, handler=partial(damaged, file)
            )
            for sample in samples:
                left_out.update(foreign_codes(name for name in sample if not name.startswith("__")))
                yield SourceItem(sample["__key__"], partial(_read, sample, options, file.parent))

    return Source(items(), None, left_out)


def _read(sample: dict[str, Any], options: ImportOptions, folder: Path) -> Utterance:
    sounds = [name for name in sample if name.lower().rpartition(".")[2] in SOUND_SUFFIXES]
    wanted = options.columns.get("audio")
    if wanted is not None:
        sounds = [name for name in sounds if name == wanted]
    if len(sounds) > 1:
        refuse(f"there are several sounds ({', '.join(sorted(sounds))}); name one: --columns audio=SUFFIX")
    try:
        about = json.loads(sample.get("json", b"{}"))
    except ValueError:
        refuse("the .json cannot be read")
    if not isinstance(about, dict):
        refuse("the .json holds no object")
    text = about.get(options.columns.get("text", "text"))
    if text is None and "txt" in sample:
        text = sample["txt"].decode("utf-8", "replace")
    wav = read_sound(sample[sounds[0]] if sounds else None, options, folder)
    return Utterance(read_text(text), wav, str(about.get("speaker") or ""), str(about.get("language") or ""))
