"""Conversations in a store: what is written, who owns it, and how a client comes back to another server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from duologue.serving.session_store import FolderStore, SessionStore, StoreError, open_store
from duologue.turns import Role
from tests.live_server import TIMEOUT_S, LiveServer, Talk, kept, scripted_bot, serving, talking

ID, OTHER = f"sess_{'0a' * 16}", f"sess_{'0b' * 16}"
KEYS = ("first-key-of-the-tests", "second-key-of-the-tests")


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.005)


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    """A Redis server of its own, on a Unix socket."""
    pytest.importorskip("redis", reason="redis is not installed")
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("there is no redis-server on this machine")
    path = tmp_path / "redis.sock"
    command = [program, "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(tmp_path)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        eventually(path.exists)
        yield f"unix://{path}"
    finally:
        server.terminate()
        server.wait()


def check_revisions(first: SessionStore, second: SessionStore) -> None:
    """Two servers on one store."""
    assert first.read(ID) is None
    assert first.write(ID, 1, b"one")
    assert second.read(ID) == (1, b"one")
    assert second.write(ID, 2, b"two")
    assert not first.write(ID, 2, b"late"), "the second server owns it"
    assert not first.write(ID, 1, b"later")
    assert first.read(ID) == (2, b"two")
    assert second.write(ID, 5, b"five")
    assert first.read(ID) == (5, b"five")
    assert first.read(OTHER) is None
    for malformed in ("", "sess_", "../../etc/passwd", f"{ID}/..", f"{ID}*", ID.upper(), f"{ID}\n"):
        assert first.read(malformed) is None


def test_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "sessions"
    check_revisions(FolderStore(folder, 60.0), open_store(str(folder), 60.0))
    (file,) = (path for path in folder.rglob("*") if path.is_file())
    assert file.name == f"{ID}.00000005.json"
    if os.name == "posix":
        assert file.stat().st_mode & 0o077 == 0
        assert folder.stat().st_mode & 0o077 == 0


def test_redis(redis_url: str) -> None:
    check_revisions(open_store(redis_url, 60.0), open_store(redis_url, 60.0))
    brief = open_store(redis_url, 0.05)
    assert brief.write(OTHER, 1, b"one")
    eventually(lambda: brief.read(OTHER) is None)


def test_redis_that_is_gone() -> None:
    pytest.importorskip("redis", reason="redis is not installed")
    with pytest.raises(ValueError, match="the Redis server of the sessions cannot be reached"):
        open_store("redis://:a-password@127.0.0.1:9/0", 60.0)


def test_expired_files_are_not_read_and_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path, 60.0)
    assert store.write(ID, 1, b"one")
    path = tmp_path / "0a" / f"{ID}.00000001.json"
    long_ago = time.time() - 61.0
    os.utime(path, (long_ago, long_ago))
    assert store.read(ID) is None
    monkeypatch.setattr("duologue.serving.session_store.SWEEP_S", 0.0)
    assert store.write(OTHER, 1, b"one")
    assert not path.exists()
    assert store.read(OTHER) == (1, b"one")


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="is not writable"):
        FolderStore(tmp_path, 60.0)


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot hold sessions"):
        FolderStore(tmp_path / "file", 60.0)
    store = FolderStore(tmp_path / "folder", 60.0)
    shutil.rmtree(tmp_path / "folder")
    (tmp_path / "folder").touch()
    with pytest.raises(StoreError, match="cannot be written"):
        store.write(ID, 1, b"one")


# Clients.


def stored(folder: Path, session_id: str) -> dict[str, Any]:
    """The record of a session; {} if there is none."""
    found = FolderStore(folder, 60.0).read(session_id)
    return {} if found is None else json.loads(found[1])


def reply(talk: Talk) -> dict[str, Any]:
    talk.send("response.create")
    done: dict[str, Any] = talk.until("response.done")[-1]["response"]
    return done


def idle(server: LiveServer) -> bool:
    return not server.service.admission.num_active


def test_a_client_goes_on_with_another_server(tiny_folder: Path, tmp_path: Path) -> None:
    """The first server is not asked: it is as good as dead."""
    first_bot, second_bot = scripted_bot(tiny_folder), scripted_bot(tiny_folder)
    with serving(*first_bot, store=str(tmp_path)) as first, serving(*second_bot, store=str(tmp_path)) as second:
        with talking(first) as talk:
            session = talk.session["id"]
            assert not list(tmp_path.rglob("*.json")), "an empty conversation is not stored"
            hello = talk.write("Hello there.")
            reply(talk)
            talk.update(instructions="Be brief.")
            eventually(lambda: stored(tmp_path, session).get("config", {}).get("instructions") == "Be brief.")
            with talking(second, f"session_id={session}") as again:
                assert (again.session["id"], again.session["instructions"]) == (session, "Be brief.")
                items = [again.until("conversation.item.done")[-1]["item"] for _ in range(2)]
                assert [item["role"] for item in items] == ["user", "assistant"]
                assert not idle(first)
                again.write("And now?")
                reply(again)
                # The first server learns at its next change that the conversation has moved.
                talk.send("conversation.item.delete", item_id=hello["id"])
                with pytest.raises(ConnectionClosed):
                    talk.until("nothing more")
                assert (talk.socket.close_code, talk.socket.close_reason) == (
                    1000,
                    "the conversation goes on over another connection",
                )
            prompt, before = second.engine.prompts[-1], first.engine.prompts[-1]
            assert prompt[: len(before)] == before, "the ids of the history are the same"
            eventually(lambda: idle(second))
            assert second.service.metrics.sessions_resumed._value.get() == 1
        eventually(lambda: idle(first))
        # Back at the first server, whose memory is older than the store.
        with talking(first, f"session_id={session}") as last:
            assert last.session["id"] == session
            roles = [last.until("conversation.item.done")[-1]["item"]["role"] for _ in range(4)]
            assert roles == ["user", "assistant"] * 2


def test_a_stored_history_is_the_history(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(*scripted_bot(tiny_folder), store=str(tmp_path)) as server:
        with talking(server) as talk:
            session = talk.session["id"]
            talk.write("Hello there.")
            item = reply(talk)["output"][0]
            talk.send("conversation.item.truncate", item_id=item["id"], content_index=0, audio_end_ms=300)
            talk.until("conversation.item.truncated")
            talk.update(output_modalities=["text"])
            talk.write("Write it down.")
            reply(talk)
        before = kept(server, session)
        eventually(lambda: idle(server))
        server.loop.call_soon_threadsafe(server.service.resumable.clear)
        eventually(lambda: not len(server.service.resumable))
        assert len(json.dumps(stored(tmp_path, session))) < 8192, "ids, never audio"
        with talking(server, f"session_id={session}"):
            pass
        after = kept(server, session)
    assert after is not before
    assert after.config.model_copy(update={"expires_at": 0}) == before.config.model_copy(update={"expires_at": 0})
    assert (after.items.id, len(after.items)) == (before.items.id, len(before.items)) == (before.items.id, 4)
    for one, other in zip(before.items, after.items, strict=True):
        assert (one.body, one.turn, one.full_turn) == (other.body, other.turn, other.full_turn)
        assert (one.spoken_ms, one.heard_ms, one.speed) == (other.spoken_ms, other.heard_ms, other.speed)
    cut = after.items.order[1]
    assert cut.turn is not None
    assert cut.full_turn is not None
    assert (cut.turn.role, cut.turn.interrupted) == (Role.ASSISTANT, True)
    assert 0 < len(cut.turn.ids) < len(cut.full_turn.ids)


def test_memory_is_used_while_it_is_as_new_as_the_store(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(*scripted_bot(tiny_folder), store=str(tmp_path)) as server:
        with talking(server) as talk:
            session = talk.session["id"]
            talk.write("Hello there.")
            reply(talk)
        first = kept(server, session)
        for _ in range(2):
            with talking(server, f"session_id={session}") as again:
                assert again.session["id"] == session
            assert kept(server, session) is first
            assert first.items.order[1].sound is not None, "only memory holds the audio"


def test_strangers_and_damaged_records_get_a_new_conversation(tiny_folder: Path, tmp_path: Path) -> None:
    store = FolderStore(tmp_path, 60.0)
    with serving(*scripted_bot(tiny_folder), store=str(tmp_path), resume_s=0.0, api_keys=KEYS) as server:

        def opened(key: str, session_id: str = "", write: bool = False) -> str:
            headers = {"Authorization": f"Bearer {key}"}
            with connect(f"{server.url}/realtime?session_id={session_id}", additional_headers=headers) as socket:
                talk = Talk(socket)
                if write:
                    talk.write("Hello there.")
            eventually(lambda: idle(server))
            return str(talk.session["id"])

        session = opened(KEYS[0], write=True)
        assert opened(KEYS[1], session) != session
        assert opened(KEYS[0], session) == session
        found = store.read(session)
        assert found is not None
        revision, record = found
        other_model = json.dumps({**json.loads(record), "vocabulary": "another"}).encode()
        for damaged in (other_model, record[:-9], b"[]", record.replace(b'"body"', b'"bod"')):
            revision += 1
            assert store.write(session, revision, damaged)
            assert opened(KEYS[0], session) != session, damaged
        assert store.write(session, revision + 1, record)
        assert opened(KEYS[0], session) == session


def test_a_store_that_fails_ends_no_conversation(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sessions"
    with serving(*scripted_bot(tiny_folder), store=str(folder)) as server, talking(server) as talk:
        shutil.rmtree(folder)
        folder.touch()
        talk.write("Hello there.")
        assert reply(talk)["status"] == "completed"
        with talking(server, f"session_id={ID}") as other:
            assert other.session["id"] != ID
        folder.unlink()
        folder.mkdir()
        talk.write("Once more.")
        eventually(lambda: len(list(folder.rglob("*.json"))) == 1)
