"""Reads the wordings of the curriculum, the data in `wordings/*.yaml`.

Each file maps the name of an intent, or of a turn inside a dialogue, to its phrasings. A name occurs in one file only.
Braces are slots that an item of the curriculum fills.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from duologue.config import parse_config, read_yaml

FOLDER = Path(__file__).parent / "wordings"


@dataclass(frozen=True)
class Phrasings:
    """Wordings of one kind of question and of its replies.

    Attributes:
        train: spoken in training; a pair of one of these and an item may be held out for the test.
        test: spoken in the test only.
        wider: further wordings for training alone, because more wordings help with new ones. They were written with the
            words of `test` in view, but none of them is in `test`.
        replies: one is drawn for each question; empty where the dialogue makes the reply.
        answers: accepted key answers where the item has none of its own.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    wider: tuple[str, ...] = ()
    replies: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


def load_phrasings(folder: Path = FOLDER) -> dict[str, Phrasings]:
    """All phrasings by name.

    Raises:
        ValueError: a file does not have this form, or two files define the same name.
    """
    found: dict[str, Phrasings] = {}
    for path in sorted(folder.glob("*.yaml")):
        for name, entry in read_yaml(path).items():
            if name in found:
                raise ValueError(f"{path} has the phrasings {name!r}, which another file has too")
            found[name] = parse_config(Phrasings, entry, f"{path}, {name}")
    return found


PHRASINGS = load_phrasings()
