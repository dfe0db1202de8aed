"""Dialogues as messages with sound files: ms-swift, LLaMA-Factory, and the LLaMA-Omni family."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from duologue.config import read_json
from duologue.training.sources.items import (
    Dialogue,
    ImportedTurn,
    ImportOptions,
    Source,
    SourceItem,
    foreign_codes,
    read_sound,
    refuse,
)

_PLACE = re.compile(r"<\|?(?:audio|speech)\|?>")  # stands for the next sound in the text
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class _Message:
    role: str
    text: str
    sounds: tuple[Any, ...] = ()


def read_swift(path: Path, options: ImportOptions) -> Source:
    """Reads lines {"messages": [{role, content}], "audios": [paths]} of ms-swift.

    Its other layouts are read too: `conversations`, `conversation`, `query` and `response`, `instruction` and `output`.
    System messages are left out.
    """
    return _source(_rows(path), path, options, _standard)


def read_factory(path: Path, options: ImportOptions) -> Source:
    """Reads the files that LLaMA-Factory's dataset_info.json names, with their columns and tags.

    Args:
        path: dataset_info.json or its folder.
    """
    info = path / "dataset_info.json" if path.is_dir() else path
    sources = []
    left_out = {}
    for name, about in read_json(info).items():
        file = about.get("file_name") if isinstance(about, dict) else None
        if not file:
            left_out[name] = "its data is not on this disk (no file_name)"
        elif about.get("ranking"):
            left_out[name] = "it holds preferences, not dialogues"
        else:
            data = _rows(info.parent / file)
            sources.append(_source(data, info, options, partial(_factory, about=about), prefix=f"{name}-"))
    for source in sources:
        left_out.update(source.left_out)
    items = [item for source in sources for item in source]
    return Source(items, len(items), left_out)


def read_omni(path: Path, options: ImportOptions) -> Source:
    """Reads {id, conversation: [{from, text, speech}]} of LLaMA-Omni and InstructS2S-200K.

    VocalNet's {id, speech, conversations: [{from, value}]} is read too.
    """
    return _source(_rows(path), path, options, _omni)


def _source(rows: Sequence[Any], path: Path, options: ImportOptions, layout: Any, prefix: str = "") -> Source:
    folder = path if path.is_dir() else path.parent

    def read(row: Any) -> Dialogue:
        if not isinstance(row, dict):
            refuse("the entry is no JSON object")
        try:
            messages = layout(row)
        except (AttributeError, KeyError, TypeError):
            refuse("the entry has another layout")
        turns = [_turn(each, options, folder) for each in messages if each.role != "system"]
        return Dialogue(tuple(turns), str(row.get("language") or ""))

    def name(number: int, row: Any) -> str:
        known = row.get("id") if isinstance(row, dict) else None
        return f"{prefix}{number:08d}" if known in (None, "") else f"{prefix}{known}"

    items = [SourceItem(name(number, row), partial(read, row)) for number, row in enumerate(rows)]
    return Source(items, len(items), foreign_codes(_keys(rows)))


def _rows(path: Path) -> list[Any]:
    """The entries of a .jsonl file, or of a .json file with an array; of all such files of a folder."""
    files = [path] if not path.is_dir() else sorted([*path.glob("*.json"), *path.glob("*.jsonl")])
    rows: list[Any] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            raise ValueError(f"{file} is missing or is no text file") from None
        try:
            if text.lstrip().startswith("["):
                rows += json.loads(text)
                continue
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from None
        for line in text.split("\n"):  # `splitlines` would also cut texts at separators of Unicode
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError:
                rows.append(None)  # skipped with a reason
    if not rows:
        raise ValueError(f"{path} holds no entries")
    return rows


def _keys(rows: Sequence[Any]) -> Iterator[str]:
    """All keys of the entries and of their messages."""
    for row in rows:
        if isinstance(row, dict):
            yield from row
            for value in row.values():
                yield from (
                    (key for each in value if isinstance(each, dict) for key in each) if isinstance(value, list) else ()
                )


def _standard(row: Mapping[str, Any]) -> list[_Message]:
    pairs: list[tuple[Any, Any]] = []
    if "messages" in row:
        pairs = [(each.get("role"), each.get("content")) for each in _objects(row["messages"])]
    elif listed := row.get("conversations") or row.get("conversation"):
        for each in _objects(listed):
            if "human" in each:
                pairs += [("user", each["human"]), ("assistant", each.get("assistant"))]
            else:
                pairs.append((each.get("from") or each.get("role"), each.get("value") or each.get("content")))
    else:
        question = row.get("query") or _joined(row.get("instruction"), row.get("input"))
        for asked, answered in row.get("history") or ():
            pairs += [("user", asked), ("assistant", answered)]
        pairs += [("user", question), ("assistant", row.get("response") or row.get("output"))]
    return _placed(pairs, row.get("audios") or ())


def _factory(row: Mapping[str, Any], about: Mapping[str, Any]) -> list[_Message]:
    columns, tags = about.get("columns") or {}, about.get("tags") or {}
    sounds = row.get(columns.get("audios", "audios")) or ()
    if about.get("formatting", "alpaca") == "alpaca":
        asked = (row.get(columns.get(key, usual)) for key, usual in (("prompt", "instruction"), ("query", "input")))
        pairs: list[tuple[Any, Any]] = []
        for before, answered in row.get(columns.get("history", "history")) or ():
            pairs += [("user", before), ("assistant", answered)]
        pairs += [("user", _joined(*asked)), ("assistant", row.get(columns.get("response", "output")))]
        return _placed(pairs, sounds)
    role_of = {tags.get(f"{role}_tag", usual): role for role, usual in (("user", "human"), ("assistant", "gpt"))}
    role_of[tags.get("system_tag", "system")] = "system"
    role_key, content_key = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    messages = _objects(row.get(columns.get("messages", "conversations")))
    pairs = [(role_of.get(each.get(role_key), each.get(role_key)), each.get(content_key)) for each in messages]
    return _placed(pairs, sounds)


def _omni(row: Mapping[str, Any]) -> list[_Message]:
    if "conversation" not in row:
        pairs = [(each.get("from"), each.get("value")) for each in _objects(row.get("conversations"))]
        return _placed(pairs, [row["speech"]] if row.get("speech") else ())
    return [
        _Message(_role(each.get("from")), _PLACE.sub("", each.get("text") or ""), _sounds(each.get("speech")))
        for each in _objects(row["conversation"])
    ]


def _placed(pairs: Sequence[tuple[Any, Any]], sounds: Sequence[Any]) -> list[_Message]:
    """Gives the sounds to the messages whose text holds their places, in order."""
    left = list(sounds) if isinstance(sounds, list | tuple) else [sounds]
    messages = []
    for role, content in pairs:
        if isinstance(content, list):  # parts, as in OpenAI's messages
            own = [part.get("audio") or part.get("audio_url") for part in _objects(content) if "audio" in part["type"]]
            text = " ".join(part.get("text") or "" for part in _objects(content) if part["type"] == "text")
            messages.append(_Message(_role(role), text, tuple(own)))
            continue
        text = content or ""
        num = len(_PLACE.findall(text))
        if num > len(left):
            refuse("there are more places for sound than sounds")
        messages.append(_Message(_role(role), _PLACE.sub("", text), tuple(left[:num])))
        del left[:num]
    if left:
        refuse("there are more sounds than places for them")
    return messages


def _turn(message: _Message, options: ImportOptions, folder: Path) -> ImportedTurn:
    text = " ".join(message.text.split())
    if len(message.sounds) > 1:
        refuse("a turn has several sounds")
    if not message.sounds:
        return ImportedTurn(message.role, text) if text else refuse("a turn has neither text nor sound")
    sound = message.sounds[0]
    if isinstance(sound, str) and sound.startswith("{"):  # Fun-Audio-Chat's LLaMA-Factory
        try:
            sound = json.loads(sound)
        except ValueError:
            refuse("a sound is damaged JSON")
    if isinstance(sound, Mapping) and sound.get("text"):
        text = " ".join(str(sound["text"]).split())
    elif message.role == "user" and text and not options.transcripts:
        refuse("a user's turn has text beside its sound; if it is the transcript, say --transcripts")
    if message.role == "assistant" and not text:
        refuse("a spoken reply has no transcript")
    return ImportedTurn(message.role, text, read_sound(sound, options, folder))


def _role(name: Any) -> str:
    return _ROLES.get(name) or refuse(f"the role {name} is neither a user's nor an assistant's")


def _sounds(value: Any) -> tuple[Any, ...]:
    return (value,) if value else ()


def _objects(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        refuse("the messages are no list of objects")
    return value


def _joined(*texts: Any) -> str:
    return "\n".join(text for text in texts if text)
