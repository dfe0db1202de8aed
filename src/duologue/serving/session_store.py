"""Stores of conversations by session id: a folder, or a Redis server that several servers share.

A record has a revision. A write succeeds only if its revision is new, so that the last server that took a conversation
owns it, and an earlier one cannot overwrite it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
import time
from pathlib import Path
from typing import Any, Protocol

REDIS_SCHEMES = ("redis://", "rediss://", "unix://")
SWEEP_S = 600.0  # interval between two searches for expired files
_SESSION_ID = re.compile(r"sess_[0-9a-f]{32}")


class StoreError(Exception):
    """The store cannot be reached. The message is one sentence."""


class SessionStore(Protocol):
    """Records by session id. Both methods block; call them in a thread. Both raise StoreError."""

    def read(self, session_id: str) -> tuple[int, bytes] | None:
        """Returns the newest revision and its record; None if there is none or the id is malformed."""

    def write(self, session_id: str, revision: int, record: bytes) -> bool:
        """Stores a record; returns False if the store holds this revision or a newer one. Its time to live begins."""


def open_store(place: str, keep_s: float) -> SessionStore:
    """Opens the store at a folder, or at the URL of a Redis server.

    Args:
        keep_s: time to live of a record after its last write, in seconds.

    Raises:
        ValueError: the folder is not writable, the server cannot be reached, or redis is not installed.
    """
    if not place.startswith(REDIS_SCHEMES):
        return FolderStore(Path(place), keep_s)
    try:
        import redis
    except ImportError:
        raise ValueError('redis is not installed: run pip install -e ".[redis]" in the folder of Duologue') from None

    client = redis.Redis.from_url(place, socket_timeout=5.0, socket_connect_timeout=5.0)
    try:
        client.ping()
    except redis.RedisError as error:
        raise ValueError(f"the Redis server of the sessions cannot be reached ({error})") from None
    return RedisStore(client, keep_s, redis.RedisError)


class FolderStore:
    """Records as files `FOLDER/ab/sess_ab....REVISION.json`, readable by their owner only.

    A revision is created as a hard link, which fails if it exists: two servers never both write it. Servers on several
    machines need a shared folder with hard links, such as NFS.
    """

    def __init__(self, folder: Path, keep_s: float) -> None:
        self.folder, self.keep_s = folder, keep_s
        self._lock, self._swept_at = threading.Lock(), 0.0
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ValueError(f"{folder} cannot hold sessions: {error.strerror}") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"{folder} is not writable; sessions need a writable folder")

    def read(self, session_id: str) -> tuple[int, bytes] | None:
        if not _SESSION_ID.fullmatch(session_id):
            return None
        try:
            for revision, path in reversed(self._revisions(session_id)):
                with contextlib.suppress(FileNotFoundError):  # replaced by a newer one in the meantime
                    if path.stat().st_mtime >= time.time() - self.keep_s:
                        return revision, path.read_bytes()
        except OSError as error:
            raise StoreError(f"{self.folder} cannot be read: {error.strerror}") from None
        return None

    def write(self, session_id: str, revision: int, record: bytes) -> bool:
        scratch = self._home(session_id) / f".{secrets.token_hex(8)}.new"
        try:
            scratch.parent.mkdir(exist_ok=True, mode=0o700)
            earlier = self._revisions(session_id)
            if earlier and earlier[-1][0] >= revision:
                return False
            try:
                with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(record)
                os.link(scratch, scratch.with_name(f"{session_id}.{revision:08d}.json"))
            except FileExistsError:
                return False
            finally:
                scratch.unlink(missing_ok=True)
            for _, path in earlier:
                path.unlink(missing_ok=True)
            self._sweep()
        except OSError as error:
            raise StoreError(f"{self.folder} cannot be written: {error.strerror}") from None
        return True

    def _home(self, session_id: str) -> Path:
        return self.folder / session_id.removeprefix("sess_")[:2]

    def _revisions(self, session_id: str) -> list[tuple[int, Path]]:
        """Returns the revisions of a session in ascending order; there is more than one only during a write."""
        paths = self._home(session_id).glob(f"{session_id}.*.json")
        return sorted((int(path.suffixes[0][1:]), path) for path in paths)

    def _sweep(self) -> None:
        """Deletes expired files, at most once in `SWEEP_S`."""
        with self._lock:
            if time.monotonic() - self._swept_at < SWEEP_S and self._swept_at:
                return
            self._swept_at = time.monotonic()
        oldest = time.time() - self.keep_s
        for path in (*self.folder.glob("??/sess_*.json"), *self.folder.glob("??/.*.new")):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    path.unlink()


class RedisStore:
    """Records as hashes `duologue:sess_...` with the fields `revision` and `record`, which expire by themselves.

    Args:
        client: a `redis.Redis`.
        errors: the class of its errors.
    """

    _WRITE = """
    local held = redis.call('HGET', KEYS[1], 'revision')
    if held and tonumber(held) >= tonumber(ARGV[1]) then return 0 end
    redis.call('HSET', KEYS[1], 'revision', ARGV[1], 'record', ARGV[2])
    redis.call('PEXPIRE', KEYS[1], ARGV[3])
    return 1
    """

    def __init__(self, client: Any, keep_s: float, errors: type[Exception]) -> None:
        self._client, self._keep_ms, self._errors = client, max(round(1000 * keep_s), 1), errors

    def read(self, session_id: str) -> tuple[int, bytes] | None:
        if not _SESSION_ID.fullmatch(session_id):
            return None
        try:
            revision, record = self._client.hmget(_redis_key(session_id), "revision", "record")
        except self._errors as error:
            raise StoreError(f"the Redis server cannot be read: {error}") from None
        return None if revision is None or record is None else (int(revision), bytes(record))

    def write(self, session_id: str, revision: int, record: bytes) -> bool:
        try:
            written = self._client.eval(self._WRITE, 1, _redis_key(session_id), revision, record, self._keep_ms)
        except self._errors as error:
            raise StoreError(f"the Redis server cannot be written: {error}") from None
        return bool(written)


def _redis_key(session_id: str) -> str:
    return f"duologue:{session_id}"
