"""The page, a real browser and the real server: a question is asked aloud, answered, the answer interrupted."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra: browser)")
pytest.importorskip("fastapi", reason="fastapi is not installed (extra: serve)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra: serve)")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra: serve)")

from playwright.sync_api import Browser, expect, sync_playwright

import duologue
from duologue.serving.app import create_app
from duologue.serving.server import Server, listen, url_of
from duologue.serving.settings import Settings
from tests.browser import Visit, launch, needs_chromium, stretches

pytestmark = needs_chromium
QUESTION = Path(duologue.__file__).parent / "pocket" / "question.wav"
FINISHED = re.compile("done|incomplete")


@contextmanager
def serving(model: Path | str) -> Iterator[tuple[str, Server]]:
    """The real server in a thread, and its address."""
    settings = Settings(port=0)
    ready = threading.Event()
    server = Server(create_app(duologue.load(model), settings), on_ready=ready.set)
    listening = listen(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    assert ready.wait(300)
    yield url_of(listening), server
    server.should_exit = True
    thread.join(300)
    assert not thread.is_alive()


@contextmanager
def browsing(folder: Path, before_s: float, after_s: float) -> Iterator[Browser]:
    """A browser into whose microphone the recorded question is spoken again and again."""
    wav, rate = soundfile.read(QUESTION)
    wav = soxr.resample(wav / np.abs(wav).max() / 2, rate, 48_000)
    silence = [np.zeros(round(seconds * 48_000)) for seconds in (before_s, after_s)]
    soundfile.write(folder / "question.wav", np.concatenate([silence[0], wav, silence[1]]), 48_000, subtype="PCM_16")
    with sync_playwright() as playwright:
        browser = launch(playwright, folder / "question.wav")
        yield browser
        browser.close()


def test_a_question_is_asked_answered_and_interrupted(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_folder) as (url, server), browsing(tmp_path, 0.6, 1.2) as browser:
        visit = Visit.open(browser, url)
        page = visit.page
        expect(page.locator("#line-words")).to_contain_text("not trained", timeout=120_000)
        page.get_by_role("button", name="Talk hands-free").click()
        interrupted = page.locator(".turn.they").filter(has_text="Interrupted after")
        expect(interrupted.first).to_be_visible(timeout=120_000)
        page.get_by_role("button", name="Stop listening").click()
        visit.type("One more, in writing.")
        expect(visit.answer_to("One more, in writing.")).to_have_class(FINISHED, timeout=120_000)
        for connection in list(server.server_state.connections):  # as a network drops them
            connection.transport.abort()
        expect(page.get_by_text("Connected again.").first).to_be_attached(timeout=120_000)
        visit.type("Are you still there?")
        expect(visit.answer_to("Are you still there?")).to_have_class(FINISHED, timeout=120_000)
        expect(page.locator(".seam").filter(has_text="A new conversation")).to_have_count(0)  # the same one goes on
        words, wav = visit.saved(tmp_path)
        visit.close()
    replies = [turn for turn in words["turns"] if turn["role"] == "assistant"]
    cut = next(turn for turn in replies if turn["cut_ms"] is not None)
    assert cut["status"] == "interrupted"
    assert {run["kind"] for turn in replies for run in turn["tokens"]} == {"text", "speech"}
    assert any(turn["timings"] and turn["timings"]["first_audio_ms"] for turn in replies)
    asked = next(turn for turn in words["turns"] if turn["role"] == "user")
    assert asked["spoken"]
    assert stretches(wav[:, 0])
    assert stretches(wav[:, 1])
