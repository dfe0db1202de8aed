"""Chromium for tests of the page, driven through playwright: a fake microphone, and a visit that watches for faults.

`DUOLOGUE_CHROMIUM` names the browser where it is not on the path.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra: browser)")
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Error,
    Page,
    Playwright,
    Request,
    expect,
)

TIMEOUT_S = 120.0  # a busy machine is not a failing test
expect.set_options(timeout=1000 * TIMEOUT_S)

CHROMIUM = os.environ.get("DUOLOGUE_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium (apt-get install chromium, or name one in DUOLOGUE_CHROMIUM)"
)
# The page's player begins when it has the whole answer: the network and the machine cannot cause a gap.
WHOLE_ANSWERS = """
  window.AudioWorkletNode = class extends AudioWorkletNode {
    constructor(context, name, options) {
      const hour = 3600 * context.sampleRate;
      if (name === "player") options.processorOptions = { jitter: hour, jitterMax: hour };
      super(context, name, options);
    }
  };
"""

# The page's player without an audio thread. Its clock goes on by `PAUSE_S` between two blocks of an answer, and to the
# end of the answer once that is complete.
SCRIPTED_SOUND = """
  const BLOCK = 128;
  const PAUSE_S = 0.75;
  const processors = {};
  let portOfNext;
  window.currentFrame = 0;
  window.registerProcessor = (name, processor) => (processors[name] = processor);
  window.AudioWorkletProcessor = class {
    port = portOfNext;
  };
  window.AudioContext = class {
    state = "running";
    destination = {};
    audioWorklet = { addModule: (url) => import(url) };
  };
  window.AudioWorkletNode = class {
    constructor(context, name, options) {
      portOfNext = { postMessage: (data) => queueMicrotask(() => this.port.onmessage({ data })) };
      this.port = { postMessage: (data) => this.take(data) };
      this.processor = new processors[name](options);
    }
    connect() {}
    take(data) {
      if (data.do === "push" && this.processor.items.length) this.render(PAUSE_S * 24000);
      this.processor.port.onmessage({ data });
      while (data.do === "end" && this.processor.items.length) this.render(1024);
    }
    render(samples) {
      for (let at = 0; at < samples; at += BLOCK) {
        this.processor.process([], [[new Float32Array(BLOCK)]]);
        window.currentFrame += BLOCK;
      }
    }
  };
"""

DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


def launch(playwright: Playwright, microphone: Path) -> Browser:
    """Chromium whose microphone plays this 48 kHz 16-bit file in a loop."""
    arguments = [
        "--headless=new",
        "--no-sandbox",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={microphone}",
        "--autoplay-policy=no-user-gesture-required",
    ]
    return playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)


@dataclass
class Visit:
    """A page in a context of its own, and what must not happen in it."""

    page: Page
    context: BrowserContext
    home: str
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, browser: Browser, url: str, microphone: bool = True, script: str = "", **options: Any) -> Visit:
        """A new page; `options` are playwright's of a context."""
        permissions = ["microphone"] if microphone else []
        context = browser.new_context(**{"viewport": DESKTOP, "permissions": permissions, **options})
        context.set_default_timeout(1000 * TIMEOUT_S)
        visit = cls(context.new_page(), context, url)
        visit.page.on("console", visit.said)
        visit.page.on("pageerror", visit.threw)
        visit.page.on("request", visit.requested)
        if script:
            visit.page.add_init_script(script)
        visit.page.goto(url)
        return visit

    def close(self) -> None:
        """Nothing may have been asked of another server, thrown or complained about; a dropped line may."""
        self.context.close()
        assert self.foreign == []
        assert [error for error in self.errors if "WebSocket connection" not in error] == []

    def said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def threw(self, error: Error) -> None:
        self.errors.append(str(error))

    def requested(self, request: Request) -> None:
        if not request.url.startswith((self.home, "blob:")):
            self.foreign.append(request.url)

    def type(self, words: str) -> None:
        self.page.get_by_label("Message").fill(words)
        self.page.keyboard.press("Enter")

    def record_status(self) -> Callable[[], list[str]]:
        """From now on notes each text of the status line, however short it stands; returns what reads the notes."""
        self.page.evaluate(
            """() => {
              const line = document.querySelector("#status");
              window.shownStatus = [line.textContent];
              const note = () => window.shownStatus.push(line.textContent);
              new MutationObserver(note).observe(line, { childList: true, characterData: true, subtree: true });
            }"""
        )
        return lambda: list(self.page.evaluate("window.shownStatus"))

    def turn(self, who: str, words: str) -> Any:
        return self.page.locator(f".turn.{who}").filter(has_text=words)

    def answer_to(self, words: str) -> Any:
        """The reply after the user's turn with these words."""
        return self.turn("you", words).locator("xpath=following-sibling::li[contains(@class, 'they')]").first

    def saved(self, tmp_path: Path) -> tuple[dict[str, Any], NDArray[np.float64]]:
        """The conversation as the page saves it: its words, and (samples, 2) of sound."""
        page = self.page
        page.get_by_role("button", name="Save").click()
        with page.expect_download() as words:
            page.get_by_role("button", name="Words, JSON").click()
        with page.expect_download() as sound:
            page.get_by_role("button", name="Sound, WAV").click()
        page.keyboard.press("Escape")
        words.value.save_as(tmp_path / "talk.json")
        sound.value.save_as(tmp_path / "talk.wav")
        wav, rate = soundfile.read(tmp_path / "talk.wav")
        assert rate == 24_000
        return json.loads((tmp_path / "talk.json").read_text()), wav


Open = Callable[..., Visit]  # opens a page; see the fixture `visit`


def wait_for(found: Callable[[], Any], page: Page, seconds: float = TIMEOUT_S) -> Any:
    end = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < end, "nothing came"
        page.wait_for_timeout(20)
    return result


def stretches(side: NDArray[np.float64]) -> list[tuple[int, int]]:
    """(first, end) of every stretch of sound, in samples; pauses of less than 5 ms belong to it."""
    loud = np.flatnonzero(np.abs(side) > 0.002)
    if not len(loud):
        return []
    breaks = np.flatnonzero(np.diff(loud) > 120)
    firsts, ends = loud[np.r_[0, breaks + 1]], loud[np.r_[breaks, len(loud) - 1]] + 1
    return list(zip(firsts.tolist(), ends.tolist(), strict=True))
