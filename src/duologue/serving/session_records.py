"""Conversations as records of a store: settings, items and token ids, never audio.

{"version": 1, "vocabulary": "<hash>", "key": "<name of the key>", "conversation": "conv_...", "config": {...},
 "items": [{"body": {...}, "turn": {...}, "full_turn": {...}, "spoken_ms": 0.0, "heard_ms": null, "speed": 1.0}]}
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from pydantic import TypeAdapter, ValidationError

from duologue.config import parse_config, to_mapping
from duologue.serving.items import Item, Items, SavedConversation
from duologue.serving.objects import AnyItem, SessionConfig
from duologue.serving.send_queue import SessionEnded
from duologue.serving.session_store import SessionStore, StoreError
from duologue.turns import Turn
from duologue.vocabulary import Vocabulary

log = logging.getLogger(__name__)

RECORD_VERSION = 1
MOVED = "the conversation goes on over another connection"
# Events that report a change of a conversation. It has been made when they enter the send queue.
CHANGES = frozenset(
    {
        "session.updated",
        "conversation.item.done",
        "conversation.item.deleted",
        "conversation.item.truncated",
        "conversation.item.input_audio_transcription.completed",
    }
)
_BODY: TypeAdapter[AnyItem] = TypeAdapter(AnyItem)


class SessionWriter:
    """Writes one live conversation to the store after its changes. Belongs to the event loop.

    A failure of the store is logged and ends no conversation; the next change writes everything again.

    Args:
        store: None writes nothing.
        key: name of the client's key.
    """

    def __init__(self, store: SessionStore | None, session_id: str, key: str, saved: SavedConversation) -> None:
        self._store, self._session_id, self._key, self._saved = store, session_id, key, saved
        self._changed = asyncio.Event()
        self._writing: asyncio.Task[bool] | None = None

    def note(self, kind: str) -> None:
        """Takes notice of a server event of this type."""
        if kind in CHANGES:
            self._changed.set()

    async def run(self) -> None:
        """Writes after each change. Raises SessionEnded if another server has taken the conversation."""
        while self._store is not None:
            await self._changed.wait()
            if not await self.write():
                raise SessionEnded(1000, MOVED, "moved")

    async def write(self) -> bool:
        """Writes the conversation unless it is empty; returns False if another server owns it."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
        # A cancelled caller leaves the write running: the revision must become that of the store.
        self._writing = asyncio.create_task(self._write())
        return await asyncio.shield(self._writing)

    async def _write(self) -> bool:
        self._changed.clear()
        saved = self._saved
        if self._store is None or not (len(saved.items) or saved.revision):
            return True
        snapshot = [_Snapshot(item) for item in saved.items if item.body.status != "in_progress"]
        try:
            written = await asyncio.to_thread(self._store_as, self._store, saved.config, snapshot, saved.revision + 1)
        except StoreError as error:
            log.error("a conversation could not be stored: %s", error)
            return True
        if written:
            saved.revision += 1
        return written

    def _store_as(self, store: SessionStore, config: SessionConfig, snapshot: list[_Snapshot], revision: int) -> bool:
        items = self._saved.items
        record = {
            "version": RECORD_VERSION,
            "vocabulary": items.vocabulary.hash,
            "key": self._key,
            "conversation": items.id,
            "config": config.model_dump(mode="json"),
            "items": [item.to_json() for item in snapshot],
        }
        return store.write(self._session_id, revision, json.dumps(record, separators=(",", ":")).encode())


class _Snapshot:
    """The present values of an item; bodies and turns are immutable."""

    def __init__(self, item: Item) -> None:
        self.body, self.turn, self.full_turn = item.body, item.turn, item.full_turn
        self.numbers = {"spoken_ms": item.spoken_ms, "heard_ms": item.heard_ms, "speed": item.speed}

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"body": self.body.model_dump(mode="json", exclude_none=True), **self.numbers}
        if self.turn is not None:
            values["turn"] = to_mapping(self.turn)
        if self.full_turn is not None:  # that of a reply that was heard to its end is the turn itself
            values["full_turn"] = True if self.full_turn == self.turn else to_mapping(self.full_turn)
        return values


async def take_stored(
    store: SessionStore, session_id: str, key: str, vocabulary: Vocabulary
) -> SavedConversation | None:
    """Returns a stored conversation and makes the caller its owner.

    Returns None if there is none, another key owns it, its ids belong to another model, or the store fails.
    """
    try:
        for _ in range(2):  # another server may write once more between reading and taking
            found = await asyncio.to_thread(store.read, session_id)
            if found is None:
                return None
            revision, record = found
            saved = _parse(record, revision, key, vocabulary)
            if saved is None or await asyncio.to_thread(store.write, session_id, revision + 1, record):
                return saved
    except StoreError as error:
        log.error("a stored conversation could not be taken: %s", error)
    return None


def _parse(record: bytes, revision: int, key: str, vocabulary: Vocabulary) -> SavedConversation | None:
    """Returns the conversation of a record, owned by the caller at the next revision."""
    try:
        values = json.loads(record)
        if values["version"] != RECORD_VERSION or values["vocabulary"] != vocabulary.hash or values["key"] != key:
            return None
        items = Items(vocabulary, values["conversation"], [_item(one) for one in values["items"]])
        return SavedConversation(SessionConfig.model_validate_json(json.dumps(values["config"])), items, revision + 1)
    except (KeyError, TypeError, ValueError, ValidationError):
        log.error("a stored conversation is damaged")
        return None


def _item(values: dict[str, Any]) -> Item:
    turn = parse_config(Turn, values["turn"]) if "turn" in values else None
    full = values.get("full_turn")
    return Item(
        _BODY.validate_json(json.dumps(values["body"])),
        turn,
        turn if full is True else None if full is None else parse_config(Turn, full),
        spoken_ms=float(values["spoken_ms"]),
        heard_ms=values["heard_ms"],
        speed=float(values["speed"]),
    )
