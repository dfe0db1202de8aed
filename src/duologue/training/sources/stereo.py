"""Stereo conversations of moshi-finetune: the left channel is the model, the right one the user.

A conversation is cut into turns, because this chatbot takes turns. Words of the model come from the alignments. Those
of the user do too, where another speaker is aligned; else the level of the right channel shows when the user speaks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from duologue.config import read_json, read_json_lines
from duologue.sound_files import MAX_FILE_S, load_channels
from duologue.training.sources.items import (
    SAMPLE_RATE,
    SOUND_NAME,
    Dialogue,
    ImportedTurn,
    ImportOptions,
    Source,
    SourceItem,
    Wav,
    refuse,
)

_MAIN = "SPEAKER_MAIN"
_CHANNELS = {"assistant": 0, "user": 1}
_PAUSE_S = 1.0  # a longer one ends a run of speech
_BACKCHANNEL_S = 1.0  # the user's runs up to this length inside a reply are left out
_MARGIN_S = 0.1
_FRAME = SAMPLE_RATE // 50
_SPEECH_DB = -45.0


@dataclass(frozen=True)
class _Run:
    """Speech of one side without a long pause, in seconds."""

    role: str
    start: float
    end: float
    text: str = ""


def read_moshi(path: Path, options: ImportOptions) -> Source:
    """Reads lines {"path", "duration"}; beside each sound lies a .json {"alignments": [[word, [start, end], speaker]]}.

    Raises:
        ValueError: a line is no JSON object with a path.
    """
    rows = [(where, row.get("path")) for where, row in read_json_lines(path)]
    if bad := [where for where, file in rows if not isinstance(file, str)]:
        raise ValueError(f"{bad[0]} names no path")

    def read(name: str) -> Dialogue:
        file = (options.audio_root or path.parent) / name
        if not file.is_file():
            refuse("the sound file is missing")
        channels, _ = load_channels(file, SAMPLE_RATE, MAX_FILE_S, SOUND_NAME)
        if len(channels) != 2:
            refuse(f"the sound has {len(channels)} channels, not 2")
        if not (beside := file.with_suffix(".json")).is_file():
            refuse("there is no .json with alignments beside the sound")
        words = _words(read_json(beside).get("alignments"))
        runs = _runs(_Run("assistant", start, end, text) for text, start, end, speaker in words if speaker == _MAIN)
        others = [_Run("user", start, end, text) for text, start, end, speaker in words if speaker != _MAIN]
        turns = _turns(runs + _runs(others or _heard(channels[1])))
        if any(turn.end - turn.start > options.max_s for turn in turns):
            refuse(f"a turn is longer than {options.max_s:.0f} s")
        return Dialogue(tuple(_cut(turn, channels) for turn in turns))

    return Source([SourceItem(str(file), partial(read, str(file))) for _, file in rows], len(rows))


def _words(alignments: Any) -> list[tuple[str, float, float, str]]:
    try:
        return [(str(word), float(start), float(end), str(who)) for word, (start, end), who in alignments]
    except (TypeError, ValueError):
        return refuse("the alignments are no list of [word, [start, end], speaker]")


def _heard(wav: Wav) -> list[_Run]:
    """Frames of 20 ms in which a channel is louder than -45 dBFS and 10 dB above its floor."""
    frames = wav[: len(wav) // _FRAME * _FRAME].reshape(-1, _FRAME)
    level = 10 * np.log10(np.mean(frames**2, axis=1) + 1e-12)
    if not len(level):
        return []
    threshold = max(_SPEECH_DB, min(float(np.percentile(level, 10)) + 10, -20.0))
    seconds = _FRAME / SAMPLE_RATE
    return [_Run("user", i * seconds, (i + 1) * seconds) for i in np.flatnonzero(level > threshold).tolist()]


def _runs(words: Iterable[_Run]) -> list[_Run]:
    """Joins what pauses of less than a second divide."""
    runs: list[_Run] = []
    for word in sorted(words, key=lambda each: each.start):
        if runs and word.start - runs[-1].end < _PAUSE_S:
            runs[-1] = _joined(runs[-1], word)
        else:
            runs.append(word)
    return runs


def _turns(runs: list[_Run]) -> list[_Run]:
    """Alternating turns, from the first of the user to the last of the model."""
    replies = [run for run in runs if run.role == "assistant"]
    turns: list[_Run] = []
    for run in sorted(runs, key=lambda each: each.start):
        inside = any(reply.start <= run.start and run.end <= reply.end for reply in replies)
        if run.role == "user" and inside and run.end - run.start <= _BACKCHANNEL_S:
            continue
        if turns and turns[-1].role == run.role:
            turns[-1] = _joined(turns[-1], run)
        elif turns or run.role == "user":
            turns.append(run)
    return turns[: len(turns) // 2 * 2]


def _joined(first: _Run, second: _Run) -> _Run:
    return replace(first, end=max(first.end, second.end), text=f"{first.text} {second.text}".strip())


def _cut(turn: _Run, channels: list[Wav]) -> ImportedTurn:
    start = max(round((turn.start - _MARGIN_S) * SAMPLE_RATE), 0)
    wav = channels[_CHANNELS[turn.role]][start : round((turn.end + _MARGIN_S) * SAMPLE_RATE)]
    if not len(wav):
        refuse("an alignment lies behind the end of the sound")
    return ImportedTurn(turn.role, turn.text, wav)
