"""The page in a real browser: headless Chromium with a fake microphone, driven through playwright, against a scripted
server (`page_server.py`). What the page says it heard is checked against the files that it saves.

`test_page_live.py` does the same with the real server.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from tests.browser import PHONE, SCRIPTED_SOUND, WHOLE_ANSWERS, Open, launch, needs_chromium, stretches, wait_for
from tests.page_server import RATE, PageServer, tone

pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra: browser)")
from playwright.sync_api import Browser, Page, expect, sync_playwright

pytestmark = needs_chromium

LOOP_S, SPEAKS_S = 4.0, (0.6, 2.2)  # the fake microphone's file, which loops, and when it speaks
HERTZ = 180.0
MOST_LOOPS = 10  # within which an answer is interrupted; two are enough
ANSWER_S = 30.0  # of an answer that is interrupted: longer than a slow machine takes for the loop


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    microphone = tmp_path_factory.mktemp("microphone") / "voice.wav"
    time_s = np.arange(round(LOOP_S * 48_000)) / 48_000
    voice = 0.25 * np.sin(2 * np.pi * HERTZ * time_s) * (0.7 + 0.3 * np.sin(2 * np.pi * 4 * time_s))
    voice *= (time_s > SPEAKS_S[0]) & (time_s < SPEAKS_S[1])
    soundfile.write(microphone, voice, 48_000, subtype="PCM_16")
    with sync_playwright() as playwright:
        browser = launch(playwright, microphone)
        yield browser
        browser.close()


def test_typed_question_is_answered_aloud_without_gaps(visit: Open, page_server: PageServer, tmp_path: Path) -> None:
    one = visit(script=WHOLE_ANSWERS)
    shown = one.record_status()
    one.type("What is two plus three?")
    expect(one.turn("you", "What is two plus three?")).to_have_count(1)
    expect(one.turn("they", page_server.script.answer)).to_have_count(1)
    wait_for(lambda: "Speaking" in shown() and shown()[-1] == "Ready", one.page)
    [created] = page_server.of("conversation.item.create")
    assert created["item"]["content"] == [{"type": "input_text", "text": "What is two plus three?"}]
    words, wav = one.saved(tmp_path)
    [(first, end)] = stretches(wav[:, 1])
    sent = np.concatenate([tone(0.4, 500)] * 6) / 32768
    assert abs(end - first - len(sent)) < 30
    heard = wav[first - 1 : first - 1 + len(sent), 1]
    assert np.abs(heard - sent).max() < 2e-4  # every sample, in its place
    assert words["playback"]["gaps"] == 0
    user, reply = words["turns"]
    assert (user["role"], user["spoken"], reply["role"], reply["status"]) == ("user", False, "assistant", "done")
    assert reply["text"] == page_server.script.answer
    assert reply["audio_ms"] == 2400
    assert reply["heard_after_ms"] > 50
    assert [run["kind"] for run in reply["tokens"]] == ["text", "speech"] * 6
    assert reply["timings"]["first_audio_ms"] == 322
    reports = [event["played_ms"] for event in page_server.of("playback.ack")]
    assert reports == sorted(reports)
    assert len(reports) > 5
    assert reports[-1] == 2400  # all of it


def test_talks_hands_free_and_interrupts_to_the_millisecond(
    visit: Open, page_server: PageServer, tmp_path: Path
) -> None:
    script = page_server.script
    script.seconds, script.block_s, script.pause_s, script.plays_first = ANSWER_S, 1.0, 0.05, True
    one = visit()
    one.page.get_by_role("button", name="Talk hands-free").click()
    expect(one.page.locator("#status")).to_have_text("Listening")
    # A busy machine hands over less sound than time passes: what counts is the sound, and that it goes on.
    cut, *_ = wait_while_heard(lambda: page_server.of("conversation.item.truncate"), page_server, one.page)
    one.page.get_by_role("button", name="Stop listening").click()
    expect(one.turn("you", page_server.script.heard).first).to_be_visible()
    expect(one.turn("they", "Interrupted after").first).to_be_visible()

    # What the server heard is the microphone's file at 24 kHz.
    heard = np.frombuffer(bytes(page_server.sound), "<i2") / 32768
    spectrum = np.abs(np.fft.rfft(heard * np.hanning(len(heard))))
    assert abs(np.argmax(spectrum) * 24_000 / len(heard) - HERTZ) < 5
    assert np.abs(heard).max() > 0.1  # the browser's gain control may raise it

    words, wav = one.saved(tmp_path)
    # A gap of a busy machine splits the answer, and does not count as heard.
    heard_ms = np.cumsum([(end - first) / 24 for first, end in stretches(wav[:, 1])])
    assert 0 < cut["audio_end_ms"] < 1000 * ANSWER_S  # in the middle of the answer
    part = int(np.argmin(np.abs(heard_ms - cut["audio_end_ms"])))
    assert abs(heard_ms[part] - cut["audio_end_ms"]) < 8 * (part + 1)  # a fade of 4 ms is beyond what counts as heard
    reply = next(turn for turn in words["turns"] if turn["role"] == "assistant")
    assert (reply["status"], reply["cut_ms"]) == ("interrupted", cut["audio_end_ms"])
    assert reply["pause_ms"] > 0  # 500 ms of sound, which a busy machine hands over in less time
    assert reply["heard_after_ms"] > reply["pause_ms"]
    detection = [
        update["session"]["audio"]["input"]["turn_detection"]
        for update in page_server.of("session.update")
        if "turn_detection" in update["session"].get("audio", {}).get("input", {})
    ]
    assert detection[0]["type"] == "server_vad"
    assert detection[-1] is None  # nobody listens after Stop


def _came(found: Callable[[], Any], server: PageServer, heard: int) -> bool:
    return bool(found()) or len(server.sound) > heard


def wait_while_heard(found: Callable[[], Any], server: PageServer, page: Page) -> Any:
    """What comes while the server hears the microphone; fails after `MOST_LOOPS`, or when no more sound comes."""
    while not (result := found()):
        heard = len(server.sound)
        assert heard < MOST_LOOPS * LOOP_S * 2 * RATE, "nothing came"
        wait_for(partial(_came, found, server, heard), page)
    return result


def test_gaps_are_counted_and_shown(visit: Open, page_server: PageServer) -> None:
    page_server.script.seconds = 1.2
    one = visit(script=SCRIPTED_SOUND)
    one.type("Slowly, please.")
    expect(one.turn("they", "2 gaps in its sound")).to_have_count(1)
    expect(one.page.locator("#gaps")).to_contain_text("2, 704 ms")
    jitter = one.page.locator("#jitter").inner_text()
    assert int(jitter.removesuffix(" ms")) > 80  # it waits longer from now on


def test_push_to_talk_by_keyboard_and_escape(visit: Open, page_server: PageServer) -> None:
    page_server.script.seconds = 60.0  # longer than the machine may take to press the key
    one = visit()
    page = one.page
    page.keyboard.down("Space")
    expect(page.locator("#status")).to_have_text("Listening while you hold")
    wait_for(lambda: len(page_server.of("input_audio_buffer.append")) > 15, page)
    page.keyboard.up("Space")
    expect(one.turn("you", page_server.script.heard)).to_have_count(1)
    expect(page.locator("#status")).to_have_text("Speaking")
    page.wait_for_timeout(300)
    page.keyboard.press("Escape")
    [cut] = wait_for(lambda: page_server.of("conversation.item.truncate"), page)
    assert len(page_server.of("response.cancel")) <= 1
    assert 100 < cut["audio_end_ms"] < 60_000
    expect(page.locator("#status")).to_have_text("Ready")
    order = [event["type"] for event in page_server.received if "append" not in event["type"]]
    assert order.index("input_audio_buffer.commit") < order.index("response.create")
    page.get_by_label("Hold to talk").check()
    page.get_by_role("button", name="Hold to talk").focus()
    page.keyboard.press("Enter")  # switches, as a screen reader does
    expect(page.get_by_role("button", name="Release to send")).to_have_attribute("aria-pressed", "true")
    heard = len(page_server.sound)
    wait_for(lambda: len(page_server.sound) > heard + RATE // 2, page)  # 250 ms
    page.keyboard.press("Enter")
    wait_for(lambda: len(page_server.of("input_audio_buffer.commit")) == 2, page)


def test_reconnects_and_goes_on_with_the_conversation(visit: Open, page_server: PageServer) -> None:
    page_server.script.seconds = 0.4
    one = visit()
    one.type("One.")
    expect(one.turn("they", page_server.script.answer)).to_have_count(1)
    page_server.drop()
    expect(one.page.get_by_role("alert")).to_contain_text("The connection was lost")
    wait_for(lambda: any("session_id=sess_" in path for path in page_server.asked), one.page)
    expect(one.page.get_by_role("alert")).to_be_hidden()
    one.type("Two.")
    expect(one.turn("they", page_server.script.answer)).to_have_count(2)
    expect(one.page.locator(".seam")).to_have_count(0)
    page_server.script.keeps = False
    page_server.drop()
    expect(one.page.locator(".seam")).to_have_text("A new conversation: the server no longer has the earlier one")


def test_full_server_in_words_until_there_is_a_place(visit: Open, page_server: PageServer) -> None:
    page_server.script.full = True
    one = visit()
    one.type("Hello?")
    expect(one.page.get_by_role("alert")).to_contain_text("The server is full: it holds 2 conversations at a time")
    expect(one.page.locator("#line-words")).to_have_text("Not connected")
    tries = len(page_server.asked)
    one.page.get_by_role("button", name="Try now").click()
    wait_for(lambda: len(page_server.asked) > tries, one.page)
    page_server.script.full = False
    expect(one.turn("they", page_server.script.answer)).to_have_count(1)  # by itself; nothing was lost


def test_question_into_an_answer_that_had_just_begun_is_asked_again(visit: Open, page_server: PageServer) -> None:
    page_server.script.busy = True
    one = visit()
    one.type("And this?")
    expect(one.turn("they", page_server.script.answer)).to_have_count(1)
    assert [e["type"] for e in page_server.received if e["type"].startswith("response.")] == [
        "response.create",
        "response.cancel",
        "response.create",
    ]
    expect(one.page.get_by_role("alert")).to_be_hidden()


def test_turns_stand_in_the_order_of_the_server(visit: Open) -> None:
    order = visit().page.evaluate(
        """async () => {
          const { Conversation } = await import("/conversation.js");
          const talk = new Conversation(() => 0);
          const item = (id, role) => ({ id, type: "message", role, content: [] });
          const added = (id, role, previous_item_id) =>
            talk.take({ type: "conversation.item.added", item: item(id, role), previous_item_id });
          talk.take({ type: "input_audio_buffer.speech_started", item_id: "spoken" });
          talk.typed("typed", "What was typed while the server was still hearing");
          added("spoken", "user", null);
          added("answer", "assistant", "spoken");
          added("typed", "user", "answer");
          return talk.turns.map((turn) => turn.id);
        }"""
    )
    assert order == ["spoken", "answer", "typed"]


def test_server_with_a_key_asks_for_it(visit: Open, page_server: PageServer) -> None:
    page_server.script.key = "a-key-of-the-page"
    one = visit()
    one.type("Hello?")
    expect(one.page.get_by_role("alert")).to_have_text(
        "This server needs an API key. Its keys are those of its option --keys."
    )
    one.page.get_by_role("button", name="Enter a key").click()
    one.page.get_by_label("API key").fill(page_server.script.key)
    one.page.get_by_role("button", name="Done").click()
    one.type("Hello again?")
    expect(one.turn("they", page_server.script.answer)).to_have_count(1)


def test_refused_and_missing_microphone_in_words(visit: Open, page_server: PageServer) -> None:
    one = visit(microphone=False)
    devtools = one.context.new_cdp_session(one.page)
    devtools.send("Browser.setPermission", {"permission": {"name": "microphone"}, "setting": "denied"})
    one.page.get_by_role("button", name="Talk hands-free").click()
    expect(one.page.get_by_role("alert")).to_contain_text("does not let this page use the microphone")
    expect(one.page.get_by_role("button", name="Talk hands-free")).to_be_visible()  # not stuck in listening
    one.type("Then I write.")
    expect(one.turn("they", page_server.script.answer)).to_have_count(1)

    missing = "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', 'NotFoundError') }"
    two = visit(script=missing)
    two.page.get_by_role("button", name="Talk hands-free").dispatch_event("click")
    expect(two.page.get_by_role("alert")).to_contain_text("No microphone was found")


def test_without_a_loudspeaker_answers_come_in_writing(visit: Open, page_server: PageServer) -> None:
    begins_late = """
        let begin;
        const begun = new Promise((resolve) => (begin = resolve));
        window.begin = () => {
          window.state = "running";
          begin();
        };
        Object.defineProperty(AudioContext.prototype, "state", { get: () => window.state ?? "suspended" });
        AudioContext.prototype.resume = () => begun;
    """
    one = visit(script=begins_late)
    for words in ("Can you hear me?", "And now?"):
        one.type(words)
        expect(one.answer_to(words)).to_have_class(re.compile("done"))
        expect(one.answer_to(words)).to_contain_text(page_server.script.answer)
    expect(one.page.get_by_role("alert")).to_contain_text("finds no loudspeaker")
    expect(one.page.locator("#status")).to_have_text("Ready")
    page_server.script.seconds = 30.0
    one.page.evaluate("window.begin()")  # a slow machine, not a missing loudspeaker
    expect(one.page.get_by_role("alert")).to_contain_text("The loudspeaker is there now")
    one.type("Say it aloud.")
    expect(one.page.locator("#status")).to_have_text("Speaking")


def test_settings_reach_the_server_and_stay(visit: Open, page_server: PageServer) -> None:
    page_server.script.about = {"follows_instructions": True, "voices": ["anna", "ben"]}
    one = visit()
    page = one.page
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Voice").select_option("ben")
    page.get_by_label("Answer with").select_option("text")
    page.get_by_label("It ends").select_option("semantic_vad")
    page.get_by_label("It waits").select_option("low")
    page.get_by_label("Instructions").fill("Be brief.")
    page.get_by_role("button", name="Done").click()
    page.get_by_role("button", name="Talk hands-free").click()
    wait_for(lambda: len(page_server.of("session.update")) >= 7, page)
    sessions = [update["session"] for update in page_server.of("session.update")]
    assert sessions[0]["output_modalities"] == ["text"]
    detection = sessions[0]["audio"]["input"]["turn_detection"]
    assert (detection["type"], detection["eagerness"]) == ("semantic_vad", "low")
    assert any(session.get("instructions") == "Be brief." for session in sessions)
    assert any(session.get("audio", {}).get("output", {}).get("voice") == "ben" for session in sessions)
    assert any(
        session.get("include") == ["duologue.tokens", "duologue.timings", "duologue.playback"] for session in sessions
    )
    assert all(session["type"] == "realtime" for session in sessions)
    page.get_by_role("button", name="Stop listening").click()
    one.type("In writing.")
    expect(one.turn("they", page_server.script.answer)).to_have_count(1)
    page.reload()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Answer with")).to_have_value("text")


def test_names_order_and_contrast(visit: Open) -> None:
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme).page
        contrasts = page.evaluate(CONTRASTS)
        assert {pair: ratio for pair, ratio in contrasts.items() if ratio < 4.5} == {}
    names = []
    for _ in range(9):
        page.keyboard.press("Tab")
        names.append(
            page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.innerText")
        )
    wanted = ["Skip to the talk button", "Inside", "Save", "Settings", "Transcript", "Talk hands-free"]
    assert names[: len(wanted)] == wanted
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button')].filter(b => !b.innerText.trim() && !b.ariaLabel && !b.hidden"
        " && b.offsetParent && !b.textContent.trim()).map(b => b.id)"
    )
    assert unnamed == []
    assert page.evaluate("document.documentElement.lang") == "en"


CONTRASTS = """() => {
  const style = getComputedStyle(document.documentElement);
  const light = (name) => {
    const [r, g, b] = style.getPropertyValue(name).match(/[0-9a-f]{2}/gi).map((two) => parseInt(two, 16) / 255)
      .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const result = {};
  const pairs = [];
  for (const ink of ["--ink", "--ink-2", "--you", "--they"])
    for (const ground of ["--paper", "--surface", "--sunken"]) pairs.push([ink, ground]);
  pairs.push(["--on-accent", "--they"], ["--bad", "--bad-soft"], ["--bad", "--paper"], ["--ink", "--they-soft"]);
  pairs.push(["--they", "--they-soft"]);
  for (const [one, two] of pairs) {
    const [low, high] = [light(one), light(two)].sort((a, b) => a - b);
    result[`${one} on ${two}`] = (high + 0.05) / (low + 0.05);
  }
  return result;
}"""


def test_phone_fits_and_the_inside_opens_over_it(visit: Open, page_server: PageServer) -> None:
    one = visit(viewport=PHONE, has_touch=True, is_mobile=True)
    page = one.page
    one.type("What is two plus three?")
    expect(one.turn("they", page_server.script.answer)).to_have_count(1)
    page.evaluate("document.getElementById('line-words').textContent = 'a-model-with-a-long-name, not trained'")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.evaluate("document.getElementById('settings-button').getBoundingClientRect().right") <= PHONE["width"]
    expect(page.get_by_role("heading", name="Inside the answer")).to_be_hidden()
    page.get_by_role("button", name="Inside", exact=True).click()
    expect(page.get_by_role("heading", name="Inside the answer")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("heading", name="Inside the answer")).to_be_hidden()
    sizes = page.evaluate(
        "[...document.querySelectorAll('.dock button, .bar button')].filter(b => b.offsetParent)"
        ".map(b => Math.min(b.offsetWidth, b.offsetHeight))"
    )
    assert min(sizes) >= 40  # for a finger


def test_resampler_and_wire_format(visit: Open) -> None:
    measured = visit().page.evaluate(UNITS)
    assert measured["error"] < 2e-3
    assert measured["alias"] < 2e-3
    assert measured["chunked"] == 0
    assert measured["roundTrip"] == 0
    assert measured["rates"] == [24000, 24000, 24000, 24000]


UNITS = """async () => {
  const { Resampler } = await import("/resampler.js");
  const { base64Of, samplesOf, pcmOf } = await import("/sound.js");
  const sine = (rate, hertz, count) =>
    Float32Array.from({ length: count }, (_, i) => Math.sin((2 * Math.PI * hertz * i) / rate));
  const out = {};
  out.error = 0;
  for (const rate of [48000, 44100, 16000]) {
    const made = new Resampler(rate, 24000).process(sine(rate, 1000, rate / 10));
    for (let i = 200; i < made.length - 10; i += 1) {
      out.error = Math.max(out.error, Math.abs(made[i] - Math.sin((2 * Math.PI * 1000 * i) / 24000)));
    }
  }
  const high = new Resampler(48000, 24000).process(sine(48000, 17000, 9600)).slice(200);
  out.alias = Math.max(...high.map(Math.abs));
  const wave = sine(44100, 700, 4410);
  const whole = new Resampler(44100, 24000).process(wave);
  const pieces = new Resampler(44100, 24000);
  const parts = [];
  for (let at = 0, size = 1; at < wave.length; at += size, size = (size * 7) % 129 || 1) {
    parts.push(...pieces.process(wave.subarray(at, at + size)));
  }
  const apart = (one, two) => Math.max(...Array.from(one, (value, i) => Math.abs(value - two[i])));
  out.chunked = parts.length === whole.length ? apart(parts, whole) : -1;
  const pcm = pcmOf(sine(24000, 440, 500));
  out.roundTrip = apart(samplesOf(base64Of(pcm)).map((value) => value * 32768), pcm);
  out.rates = [48000, 44100, 16000, 24000].map((rate) => {
    const one = new Resampler(rate, 24000);
    return one.process(new Float32Array(rate + (rate === 24000 ? 0 : one.half))).length; // a second of sound
  });
  return out;
}"""
