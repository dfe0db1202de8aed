"""Who said what, as token ids: the turns of a conversation and their file.

History is kept as the ids that were heard and produced, never as text that is tokenized again: caches continue, and
nothing changes by being written down. Immutable: to fork a conversation is to keep it, to add a turn makes a new one.

    {"kind": "Conversation", "version": 1, "vocabulary": "<hash>",
     "turns": [{"role": "user", "modality": "speech", "ids": [...], "language": "en", ...}, ...]}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from duologue.config import parse_config, read_json, to_mapping, write_json

CONVERSATION_VERSION = 1


class Role(StrEnum):
    """Who speaks. `OBSERVATION` is the result of a tool."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    OBSERVATION = "observation"


class Modality(StrEnum):
    """What the ids of a turn are: text, speech, or both (a reply in runs; a user's turn that mixes them)."""

    TEXT = "text"
    SPEECH = "speech"
    INTERLEAVED = "interleaved"


@dataclass(frozen=True)
class Turn:
    """One stretch of one speaker.

    Attributes:
        ids: text and speech ids of the joint vocabulary, no control ids: those are the template's. Not the end id.
        language: "en", "zh", ... or empty where unknown; so are `voice` and `style`.
        interrupted: a reply that was cut when the user spoke; its ids end with the last speech token that was heard.
    """

    role: Role
    modality: Modality
    ids: tuple[int, ...]
    language: str = ""
    voice: str = ""
    style: str = ""
    interrupted: bool = False

    def __post_init__(self) -> None:
        if self.interrupted and self.role is not Role.ASSISTANT:
            raise ValueError(f"only a turn of the assistant can be interrupted, not one of the {self.role}")
        if any(token < 0 for token in self.ids):
            raise ValueError(f"token ids must not be negative, got {min(self.ids)}")


@dataclass(frozen=True)
class Conversation:
    """Turns in the order in which they were spoken.

    Attributes:
        vocabulary: hash of the vocabulary that the ids belong to (`Vocabulary.hash`), or empty where nobody checks.
    """

    turns: tuple[Turn, ...] = ()
    vocabulary: str = ""

    def __len__(self) -> int:
        return len(self.turns)

    def __iter__(self) -> Iterator[Turn]:
        return iter(self.turns)

    def plus(self, *turns: Turn) -> Conversation:
        """The conversation with these turns after its own."""
        return replace(self, turns=self.turns + turns)

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` takes."""
        return {"kind": "Conversation", "version": CONVERSATION_VERSION, **to_mapping(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str = "") -> Conversation:
        """Read `to_json`'s values.

        Args:
            where: the file they come from, for the messages.

        Raises:
            ValueError: another kind of file, an unknown version or key, a missing key or a value of the wrong type.
        """
        named = where or "the data"
        if data.get("kind") != "Conversation":
            raise ValueError(f"{named} is not a saved conversation")
        if data.get("version") != CONVERSATION_VERSION:
            raise ValueError(
                f"{named} is a conversation of version {data.get('version')!r}; this program reads version "
                f"{CONVERSATION_VERSION}"
            )
        return parse_config(cls, {k: v for k, v in data.items() if k not in ("kind", "version")}, where)

    def save(self, path: str | Path) -> None:
        """Write a JSON file; an old one is replaced whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Conversation:
        """Read a file that `save` wrote. Raises ValueError as `from_json` and for a file that is not JSON."""
        return cls.from_json(read_json(path), str(path))
