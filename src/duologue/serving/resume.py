"""Conversations whose client was dropped, kept for a while in memory: `/v1/realtime?session_id=sess_...` goes on."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field


@dataclass(eq=False)
class _Kept:
    key: str
    state: object
    timer: asyncio.TimerHandle


@dataclass(eq=False)
class Shelf:
    """Holds states by session id until they are taken or their time is over. Lives on the event loop.

    Attributes:
        keep_s: how long; 0 keeps nothing.
        max_kept: states at a time; the oldest goes first.
    """

    keep_s: float
    max_kept: int
    _kept: dict[str, _Kept] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, session_id: str, key: str, state: object) -> None:
        """Keeps the state of a session that was opened under this key's name."""
        if self.keep_s <= 0:
            return
        self._drop(session_id)
        while len(self._kept) >= self.max_kept:
            self._drop(next(iter(self._kept)))
        timer = asyncio.get_running_loop().call_later(self.keep_s, self._drop, session_id)
        self._kept[session_id] = _Kept(key, state, timer)

    def take(self, session_id: str, key: str) -> object | None:
        """The state, which is then no longer kept; None if there is none or it belongs to another key."""
        kept = self._kept.get(session_id)
        if kept is None or kept.key != key:
            return None
        self._drop(session_id)
        return kept.state

    def clear(self) -> None:
        """Forgets everything."""
        for session_id in list(self._kept):
            self._drop(session_id)

    def _drop(self, session_id: str) -> None:
        if (kept := self._kept.pop(session_id, None)) is not None:
            kept.timer.cancel()
