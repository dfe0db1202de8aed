"""The held-out test set on disk: dialogues and the clips they are spoken with.

    clips*.jsonl      one clip a line: id, text, role, voice, style, split, intent, sample_rate, offset, num_samples
    clips*.pcm        flat int16, little endian; `offset` counts samples in it
    dialogues*.jsonl  one dialogue a line: id, intent, split, turns [{role, text, clip, style, sound, answers}]

Splits: "test" has voices that were heard in training, "test_unseen" has voices that never were, "test_warped" has
natural voices with F0 and envelope as they never were in training. A test set need not have all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from duologue.config import read_json_lines
from duologue.pcm import from_int16

SEEN, UNSEEN, WARPED = "test", "test_unseen", "test_warped"
SPLITS = (SEEN, UNSEEN, WARPED)
SPLIT_NAMES = {SEEN: "seen voices", UNSEEN: "unseen voices", WARPED: "warped voices"}
HOW_TO_MAKE = "python -m recipes.pocket.corpus --out runs/pocket/corpus --only test"

_Item = TypeVar("_Item")


@dataclass(frozen=True, eq=False)
class TestClip:
    """One spoken text. `role` is "user" or "reply"; a clip without text is a sound that is no speech."""

    __test__ = False  # pytest: not a test class

    id: str
    text: str
    role: str
    voice: str
    style: str
    split: str
    sample_rate: int
    samples: NDArray[np.int16]

    @property
    def wav(self) -> NDArray[np.float32]:
        """(S,) float32 in [-1, 1]."""
        return from_int16(self.samples)


@dataclass(frozen=True)
class TestTurn:
    """A question and the reply that the curriculum gives to it.

    Attributes:
        question: clip id of the spoken question.
        reply: clip id of the reference reply.
        answers: texts of which one must be in the reply.
        style: how the reply should sound: "plain", "faster", "lower2", ...
    """

    __test__ = False

    question_text: str
    question: str
    reply_text: str
    reply: str
    style: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class TestDialogue:
    __test__ = False

    id: str
    intent: str
    split: str
    turns: tuple[TestTurn, ...]


@dataclass(frozen=True)
class TestSet:
    """All clips by id, the dialogues in the order of their files."""

    __test__ = False

    clips: dict[str, TestClip]
    dialogues: tuple[TestDialogue, ...]

    def speech(self, role: str, split: str | None = None) -> list[TestClip]:
        """The clips of a role ("user" or "reply") that hold speech."""
        return [c for c in self.clips.values() if c.role == role and c.text and split in (None, c.split)]

    def limited(self, num: int | None) -> TestSet:
        """At most `num` dialogues, spread evenly over the set so that intents stay mixed, and their clips."""
        if num is None or num >= len(self.dialogues):
            return self
        chosen = spread(self.dialogues, num)
        needed = {clip for dialogue in chosen for turn in dialogue.turns for clip in (turn.question, turn.reply)}
        clips = {key: clip for key, clip in self.clips.items() if key in needed}
        return TestSet(clips, tuple(chosen))


def spread(items: Sequence[_Item], num: int) -> list[_Item]:
    """At most `num` of the items, evenly spread over them."""
    num = min(num, len(items))
    return [items[i * len(items) // num] for i in range(num)]


def load_test_set(folder: str | Path) -> TestSet:
    """Reads a folder that `recipes/pocket/corpus.py` wrote.

    Raises:
        ValueError: no such folder (with the command that makes it), a missing file, or a line that is not as above.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder with a test set; make one with: {HOW_TO_MAKE}")
    clips = {clip.id: clip for clip in read_clips(folder)}
    dialogues = tuple(
        _dialogue(row, where, clips)
        for shard in sorted(folder.glob("dialogues*.jsonl"))
        for where, row in read_json_lines(shard)
        if row.get("split") in SPLITS
    )
    if not dialogues:
        raise ValueError(f"{folder} holds no test dialogues; make a test set with: {HOW_TO_MAKE}")
    return TestSet(clips, dialogues)


def read_clips(folder: Path) -> Iterator[TestClip]:
    """Yields the clips of an audio corpus. Raises ValueError for a missing file or a line that describes no clip."""
    for shard in sorted(folder.glob("clips*.jsonl")):
        yield from _read_shard(shard)


def _read_shard(shard: Path) -> Iterator[TestClip]:
    path = shard.with_suffix(".pcm")
    if not path.is_file():
        raise ValueError(f"{path} is missing, which {shard.name} describes")
    samples: NDArray[np.int16] = np.memmap(path, np.dtype("<i2"), "r") if path.stat().st_size else np.zeros(0, np.int16)
    for where, row in read_json_lines(shard):
        try:
            start, size = int(row["offset"]), int(row["num_samples"])
            names = ("id", "text", "role", "voice", "style", "split")
            head = {name: str(row[name]) for name in names}
            sample_rate = int(row["sample_rate"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where} describes no clip ({error})") from None
        if start < 0 or size < 0 or start + size > len(samples):
            raise ValueError(f"{where} needs samples {start} to {start + size}, but {path.name} has {len(samples)}")
        yield TestClip(**head, sample_rate=sample_rate, samples=samples[start : start + size])


def _dialogue(row: dict[str, Any], where: str, clips: dict[str, TestClip]) -> TestDialogue:
    try:
        said = row["turns"]
        if len(said) % 2 or [turn["role"] for turn in said] != ["user", "assistant"] * (len(said) // 2):
            raise ValueError("user and assistant must take turns")
        turns = tuple(
            TestTurn(
                question_text=str(user["text"]),
                question=str(user["clip"][0]),
                reply_text=str(reply["text"]),
                reply=str(reply["clip"][0]),
                style=str(reply["style"]),
                answers=tuple(str(answer) for answer in reply["answers"]),
            )
            for user, reply in zip(said[::2], said[1::2], strict=True)
        )
        dialogue = TestDialogue(str(row["id"]), str(row["intent"]), str(row["split"]), turns)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{where} describes no dialogue ({error})") from None
    for turn in dialogue.turns:
        for clip in (turn.question, turn.reply):
            if clip not in clips:
                raise ValueError(f"{where} names the clip {clip!r}, which is missing")
    if not dialogue.turns:
        raise ValueError(f"{where} describes a dialogue without turns")
    return dialogue
