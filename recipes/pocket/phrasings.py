"""The wordings of the curriculum, which are data: `wordings/*.yaml`, read here and nowhere else.

Each file maps the name of an intent, or of a turn inside a dialogue, to its phrasings. A name stands in one file only.
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
        wider: further wordings for training alone: the more wordings a model has heard, the better it understands a
            new one. They were written with the words of `test` in view, but none of them is one of `test`.
        replies: one is drawn for a question; none where the dialogue makes the reply.
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
        ValueError: a file is not of this form, or two files have the same name in them.
    """
    found: dict[str, Phrasings] = {}
    for path in sorted(folder.glob("*.yaml")):
        for name, entry in read_yaml(path).items():
            if name in found:
                raise ValueError(f"{path} has the phrasings {name!r}, which another file has too")
            found[name] = parse_config(Phrasings, entry, f"{path}, {name}")
    return found


PHRASINGS = load_phrasings()
