"""Cuts of lhotse, read by `lhotse` (extra `data`); the sound by our own reader."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from duologue.sound_files import load_channels
from duologue.training.sources.items import (
    SAMPLE_RATE,
    SOUND_NAME,
    ImportOptions,
    Source,
    SourceItem,
    Utterance,
    Wav,
    read_text,
    refuse,
)

_MAX_RECORDING_S = 6 * 3600.0


def read_lhotse(path: Path, options: ImportOptions) -> Source:
    """Reads one utterance for each supervision of each cut.

    Paths of recordings start from the folder of the manifest, `options.audio_root` or the working directory.

    Args:
        path: cuts.jsonl, cuts.jsonl.gz.

    Raises:
        ValueError: lhotse cannot read the manifest as cuts.
    """
    import lhotse

    if not path.is_file():
        raise ValueError(f"{path} is not a file: give a manifest of cuts, such as cuts.jsonl.gz")
    try:
        cuts = lhotse.CutSet.from_file(path)
    except Exception as error:  # of many kinds
        raise ValueError(f"{path} cannot be read as cuts: {error}") from None
    roots = [options.audio_root] if options.audio_root else [path.parent, Path()]

    @lru_cache(4)  # cuts of one long recording follow each other
    def recording(file: Path | bytes) -> list[Wav]:
        return load_channels(file, SAMPLE_RATE, _MAX_RECORDING_S, SOUND_NAME)[0]

    def read(cut: Any, supervision: Any) -> Utterance:
        if not isinstance(cut, lhotse.MonoCut):
            refuse(f"{type(cut).__name__} is not supported: only cuts of one channel are")
        if supervision is None:
            refuse("the cut has no supervision")
        if not cut.has_recording:
            refuse("the cut has no recording")
        if cut.recording.transforms:
            refuse("the recording has transforms, such as another speed; store its sound first")
        text = read_text(supervision.text)
        start, duration = cut.start + supervision.start, supervision.duration
        if duration > options.max_s:
            refuse(f"the sound is longer than {options.max_s:.0f} s; cut it first")
        sources = [each for each in cut.recording.sources if cut.channel in each.channels]
        if not sources or sources[0].type not in ("file", "memory"):  # a command is never run
            refuse(f"the recording is a {sources[0].type if sources else 'missing channel'}, not a file")
        origin = sources[0].source
        channels = recording(origin if isinstance(origin, bytes) else _found(origin, roots))
        index = sources[0].channels.index(cut.channel)
        if index >= len(channels):
            refuse(f"the sound has {len(channels)} channels, not {index + 1}")
        wav = channels[index][max(round(start * SAMPLE_RATE), 0) : round((start + duration) * SAMPLE_RATE)]
        if not len(wav):
            refuse("the cut lies behind the end of its recording")
        return Utterance(text, wav, supervision.speaker or "", supervision.language or "")

    def items() -> Iterator[SourceItem]:
        for cut in cuts:
            several = len(cut.supervisions) > 1
            for supervision in cut.supervisions or [None]:
                name = f"{cut.id}-{supervision.id}" if several else cut.id
                yield SourceItem(name, partial(read, cut, supervision))

    return Source(items())


def _found(file: str, roots: list[Path]) -> Path:
    for root in roots:
        if (root / file).is_file():
            return (root / file).resolve()
    return refuse("the sound file is missing")
