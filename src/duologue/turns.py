"""Conversations as token ids, and their file format.

Ids are stored as they were heard and generated; text is never tokenized again, so KV caches stay valid.
A conversation is immutable.

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
    """The speaker of a turn. `OBSERVATION` is the result of a tool."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    OBSERVATION = "observation"


class Modality(StrEnum):
    """The kind of ids in a turn: text, speech or both."""

    TEXT = "text"
    SPEECH = "speech"
    INTERLEAVED = "interleaved"


@dataclass(frozen=True)
class Turn:
    """One turn of one speaker.

    Attributes:
        ids: text and speech ids of the joint vocabulary, without control ids and end id.
        language: "en", "zh", ...; empty if unknown, like `voice` and `style`.
        interrupted: the reply was cut by barge-in; its ids end with the last speech token heard.
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
    """Turns in chronological order.

    Attributes:
        vocabulary: hash of the vocabulary of the ids (`Vocabulary.hash`); empty to skip the check.
    """

    turns: tuple[Turn, ...] = ()
    vocabulary: str = ""

    def __len__(self) -> int:
        return len(self.turns)

    def __iter__(self) -> Iterator[Turn]:
        return iter(self.turns)

    def plus(self, *turns: Turn) -> Conversation:
        """Returns the conversation with these turns appended."""
        return replace(self, turns=self.turns + turns)

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values that `from_json` reads."""
        return {"kind": "Conversation", "version": CONVERSATION_VERSION, **to_mapping(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str = "") -> Conversation:
        """Parses the values of `to_json`.

        Args:
            where: the file's name for error messages.

        Raises:
            ValueError: another kind of file, or an unknown version or key, a missing key or a wrong type.
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
        """Writes a JSON file atomically."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Conversation:
        """Reads a file that `save` wrote. Raises ValueError as `from_json`, or if the file is not JSON."""
        return cls.from_json(read_json(path), str(path))
