"""The states of the page that people meet: empty, unsure, disconnected, refused, below a path, in a frame; and its
accessibility, by axe-core's rules in four widths and two color schemes.

With `DUOLOGUE_SCREENSHOTS=FOLDER` the pictures of `docs/images` are made. axe-core comes with
`npm install --no-package-lock --prefix tests/node`.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from duologue.evaluation.conversations import Waveform
from duologue.evaluation.page import PageRow, write_rows
from duologue.evaluation.report import Report, Row
from tests.browser import Open, Visit, launch, needs_chromium, wait_for
from tests.page_server import POLICY, PageServer

pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra: browser)")
from playwright.sync_api import Browser, Page, expect, sync_playwright

pytestmark = needs_chromium

AXE = Path(__file__).parent / "node" / "node_modules" / "axe-core" / "axe.min.js"
WIDTHS = (360, 768, 1280, 1920)
MODEL = {
    "questions": ["What is the capital of France?", "Who are you?"],
    "num_parameters": 21_400_000,
    "voices": ["default"],
    "records": True,
}
WRITTEN = "localStorage.setItem('duologue.settings', JSON.stringify({modality: 'text'}))"  # answers without sound


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    microphone = tmp_path_factory.mktemp("microphone") / "noise.wav"
    noise = 0.2 * np.random.default_rng(0).standard_normal(2 * 48_000)
    soundfile.write(microphone, noise, 48_000, subtype="PCM_16")
    with sync_playwright() as playwright:
        browser = launch(playwright, microphone)
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def _model(page_server: PageServer) -> None:
    page_server.script.about = dict(MODEL)


def test_the_empty_page_says_what_it_is_and_asks_its_suggestions(visit: Open, page_server: PageServer) -> None:
    one = visit(script=WRITTEN)
    page = one.page
    expect(page.locator("#welcome")).to_contain_text("This is a spoken chatbot")
    expect(page.locator("#model-words")).to_have_text("Model: mock, 21 million parameters.")
    expect(page.locator("#records-words")).to_be_visible()
    expect(page.get_by_role("complementary")).to_be_hidden()  # the inside of answers, on demand
    chips = page.get_by_role("list", name="You can ask").get_by_role("button")
    assert chips.all_inner_texts() == MODEL["questions"]
    page.get_by_role("button", name="Settings").click()
    for setting in ("Voice", "Instructions"):  # the model has one voice and follows no instructions
        expect(page.get_by_label(setting, exact=True)).to_be_hidden()
    page.get_by_role("button", name="Done").click()
    chips.first.click()
    expect(one.turn("you", "What is the capital of France?")).to_have_count(1)
    expect(one.turn("they", page_server.script.answer)).to_have_count(1)
    expect(page.locator("#welcome")).to_be_hidden()
    assert not re.search(r"\d+ ms|\d s\b", page.locator("#turns").inner_text())  # no figures


def test_words_heard_with_low_confidence_are_marked(visit: Open, page_server: PageServer) -> None:
    page_server.script.unsure = -1.2
    one = visit(script=WRITTEN)
    page = one.page
    page.keyboard.down("Space")
    wait_for(lambda: len(page_server.of("input_audio_buffer.append")) > 8, page)
    page.keyboard.up("Space")
    heard = one.turn("you", page_server.script.heard)
    expect(heard.locator("mark")).to_have_text(" three?")
    expect(heard).to_contain_text("Underlined: not heard clearly.")


def test_a_lost_line_stops_the_meter_and_keeps_what_is_said(visit: Open, page_server: PageServer) -> None:
    one = visit(script=WRITTEN)
    page = one.page
    page.get_by_role("button", name="Talk hands-free").click()
    wait_for(lambda: len(page_server.of("input_audio_buffer.append")) > 5, page)
    page_server.script.denies = 503
    page_server.drop()
    expect(page.get_by_role("button", name="Reconnecting. Stop listening")).to_have_text("Reconnecting")
    expect(page.locator("#status")).to_have_text("Not connected · what you say is kept for a moment")
    expect(page.locator("#meter-you")).to_have_attribute("aria-valuenow", "-60")
    expect(one.turn("you", "The line dropped: not all of this was heard.")).to_have_count(1)
    page.get_by_label("Message").fill("Written meanwhile")
    page.keyboard.press("Enter")
    expect(one.turn("you", "Waits for the connection; not sent yet.")).to_have_class(re.compile("waiting"))
    before = len(page_server.sound)
    page.wait_for_timeout(600)
    page_server.script.denies = 0
    page.evaluate("document.getElementById('notice-action').click()")
    expect(one.turn("you", "Waits for the connection")).to_have_count(0)
    [asked] = wait_for(lambda: page_server.of("conversation.item.create"), page)
    assert asked["item"]["content"][0]["text"] == "Written meanwhile"
    wait_for(lambda: len(page_server.sound) > before + 24_000, page)  # with the half second that was kept


def test_refusals_name_the_way_out(visit: Open, page_server: PageServer) -> None:
    page_server.script.key = "a-key-of-the-page"
    one = visit()
    one.type("Hello?")
    expect(one.page.get_by_role("alert")).to_contain_text("Its keys are those of its option --keys.")
    page_server.script.key = ""
    page_server.script.denies = 403
    sentence = "pages of 'https://talk.example.org' may not use this server, which --origin at its start would admit"
    refused = json.dumps({"error": {"message": sentence}})
    two = visit()
    two.page.route(
        "**/v1/models",
        lambda route: route.fulfill(status=403, body=refused) if route.request.method == "POST" else route.fallback(),
    )
    two.type("Hello?")
    expect(two.page.get_by_role("alert")).to_contain_text("which --origin at its start would admit.")
    expect(two.page.get_by_role("button", name="Try again")).to_be_visible()
    expect(two.turn("you", "Not sent: there is no connection.")).to_have_count(1)
    two.errors.clear()  # the browser writes every 403 to the console


def test_the_page_works_below_a_path_and_in_a_frame(browser: Browser, page_server: PageServer) -> None:
    page_server.script.prefix = "/voice"
    with PageServer().running() as outer:
        outer.framed = page_server.url
        allowed = f"frame-ancestors 'self' {outer.url.rstrip('/')}"
        page_server.policy = POLICY.replace("frame-ancestors 'none'", allowed)
        one = Visit.open(browser, f"{outer.url}frame")
        frame = one.page.frame_locator("iframe")
        expect(frame.locator("#line-words")).to_have_text("mock")
        frame.get_by_role("button", name="Settings").click()
        frame.get_by_label("Answer with").select_option("text")
        frame.get_by_role("button", name="Done").click()
        frame.get_by_label("Message").fill("In a frame?")
        frame.get_by_label("Message").press("Enter")
        expect(frame.locator(".turn.they")).to_contain_text(page_server.script.answer)
        one.context.close()
        page_server.policy = POLICY
        refused = Visit.open(browser, f"{outer.url}frame")
        refused.page.wait_for_timeout(300)
        expect(refused.page.frame_locator("iframe").locator("#line-words")).to_have_count(0)
        refused.context.close()
    assert all(path.startswith("/voice/") for path in page_server.asked)


def test_everything_is_reached_by_the_keyboard_alone(visit: Open, page_server: PageServer) -> None:
    one = visit(script=WRITTEN)
    page = one.page
    expect(page.get_by_role("button", name="Who are you?")).to_be_visible()

    def tab_to(name: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            focused = page.evaluate(
                "(document.activeElement.getAttribute('aria-label') || document.activeElement.labels?.[0]?.innerText"
                " || document.activeElement.innerText || '').trim()"
            )
            if focused == name:
                return
        pytest.fail(f"the tabulator does not reach {name}")

    tab_to("Settings")
    page.keyboard.press("Enter")
    tab_to("Done")
    page.keyboard.press("Enter")
    tab_to("Who are you?")
    page.keyboard.press("Enter")
    expect(one.turn("they", page_server.script.answer)).to_have_count(1)
    tab_to("How it was made")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Inside the answer")).to_be_visible()
    tab_to("Hold to talk")
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Hold to talk")).to_have_attribute("aria-pressed", "false")
    tab_to("Message")
    page.keyboard.type("And in writing")
    page.keyboard.press("Enter")
    expect(one.turn("they", page_server.script.answer)).to_have_count(2)


def violations(page: Page) -> list[str]:
    """What axe-core's rules find, and its best practices."""
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    assert len(found["passes"]) > 15  # the rules were applied
    return [f"{one['id']}: {node['html'][:120]}" for one in found["violations"] for node in one["nodes"]]


@pytest.mark.skipif(
    not AXE.is_file(), reason="axe-core is not there: npm install --no-package-lock --prefix tests/node"
)
@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_no_rule_of_axe_is_broken(visit: Open, page_server: PageServer, scheme: str) -> None:
    page_server.script.about = {**MODEL, "voices": ["anna", "ben"], "follows_instructions": True}
    one = visit(script=WRITTEN, color_scheme=scheme)
    page = one.page
    page.evaluate(AXE.read_text(encoding="utf-8"))
    expect(page.get_by_role("button", name="Who are you?")).to_be_visible()
    found: dict[str, list[str]] = {}

    def check(state: str, widths: tuple[int, ...] = WIDTHS) -> None:
        for width in widths:
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            found[f"{state}, {width}"] = violations(page)

    check("empty")
    one.type("What is two plus three?")
    expect(one.turn("they", page_server.script.answer)).to_have_count(1)
    check("conversation")
    page.get_by_role("button", name="Settings").click()
    check("settings", WIDTHS[::3])
    page.get_by_role("button", name="Done").click()
    page.get_by_role("button", name="Save").click()
    check("save", WIDTHS[:1])
    page.keyboard.press("Escape")
    page.evaluate(
        "import('/parts.js').then(({ view }) => view.notice('A refusal.', { action: { words: 'Try again' } }))"
    )
    page.get_by_role("button", name="Inside", exact=True).click()
    check("inside and a notice", WIDTHS[::2])
    assert {state: faults for state, faults in found.items() if faults} == {}


# Two questions as the events of a server, so that the pictures are the same on every machine.
CONVERSATION = """async (words) => {
  const { conversation } = await import("/parts.js");
  const take = (type, fields) => conversation.take({ type, ...fields });
  const message = (id, role) => ({ id, type: "message", role, status: "in_progress", content: [] });
  const answer = (number, text) => {
    const ids = { response_id: `resp_${number}`, item_id: `reply_${number}` };
    take("response.output_item.added", { ...ids, item: message(ids.item_id, "assistant") });
    take("response.output_audio_transcript.done", { ...ids, transcript: text });
    for (let i = 0; i < 3; i += 1) {
      take("duologue.tokens", { ...ids, kind: "text", count: 13 });
      const codes = Array.from({ length: 26 }, (_, k) => k * 137 + 29);
      take("duologue.tokens", { ...ids, kind: "speech", count: 26, ids: codes });
    }
    const stages = { tokenizer: 41, language: 640, flow: 310, vocoder: 122 };
    const first = { tokenize_ms: 18, prefill_ms: 64, first_text_ms: 91, first_audio_ms: 322 };
    take("duologue.timings", { ...ids, ...first, total_ms: 1150, audio_ms: 2400, stages });
    take("response.done", { response: { id: ids.response_id, status: "completed", output: [] } });
  };
  conversation.typed("typed", "What is two plus three?");
  answer(1, "It is five.");
  take("input_audio_buffer.committed", { item_id: "spoken" });
  const logprobs = words.map((token) => ({ token: ` ${token}`, logprob: token === "puppet" ? -1.7 : -0.01 }));
  const transcript = words.join(" ");
  take("conversation.item.input_audio_transcription.completed", { item_id: "spoken", transcript, logprobs });
  answer(2, "The capital of France is Paris.");
}"""
PICTURES = os.environ.get("DUOLOGUE_SCREENSHOTS")


def test_the_report_of_an_evaluation_is_sorted_and_filtered_without_network(browser: Browser, tmp_path: Path) -> None:
    sound = Waveform(0.1 * np.sin(np.arange(8000) / 5).astype(np.float32), 16_000)
    asked = (
        ("What is one plus two?", "It is three.", "It is three.", True),
        ("What is the capital of France?", "Berlin is the capital.", "Berlin is the capital.", False),
        ("What is two times fifty?", "100", "one hundred", True),
        ("What is six plus three?", "9", "mine", False),
    )
    shown = [
        PageRow("questions", name, name, answer, (), None, heard, answer[0] != "B", right, not right, sound, sound)
        for name, answer, heard, right in asked
    ]
    rows = (Row("questions", "right, text", 0.75, "%", num=4), Row("questions", "right, sound", 0.5, "%", num=4))
    report = Report("spoken-qa", {"name": "pocket"}, {}, rows)
    visit = Visit.open(browser, write_rows(tmp_path, report, shown, 4).as_uri(), microphone=False)
    page = visit.page

    def answers() -> list[str]:
        texts = "rows => rows.filter(row => !row.hidden).map(row => row.cells[3].firstChild.textContent)"
        return list(page.eval_on_selector_all("tbody tr", texts))

    head = page.locator("th").nth(3)
    expect(head).to_have_text("answer")
    head.click()
    assert answers() == ["9", "100", "Berlin is the capital.", "It is three."]  # numbers by their size
    assert head.get_attribute("aria-sort") == "ascending"
    head.click()
    assert answers() == ["It is three.", "Berlin is the capital.", "100", "9"]
    page.locator("th").nth(1).click()
    assert head.get_attribute("aria-sort") is None
    page.get_by_label("only wrong").check()
    assert sorted(answers()) == ["9", "Berlin is the capital."]
    expect(page.locator("#count")).to_have_text("2")
    assert page.locator("audio").count() == 8
    if PICTURES:
        page.get_by_label("only wrong").uncheck()
        page.get_by_text("All measures").click()
        page.set_viewport_size({"width": 1280, "height": 760})
        shot = Image.open(io.BytesIO(page.screenshot()))
        shot.save(Path(PICTURES) / "report.webp", quality=80, method=6)
    visit.close()  # nothing was asked for but the page, the players' sounds included


@pytest.mark.skipif(not PICTURES, reason="pictures are made when DUOLOGUE_SCREENSHOTS names a folder")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures(visit: Open, scheme: str) -> None:
    folder = Path(PICTURES or "")
    page = visit(script=WRITTEN, color_scheme=scheme).page

    def picture(name: str, width: int = 1280) -> None:
        page.set_viewport_size({"width": width, "height": 740 if width < 1000 else 800})
        page.wait_for_timeout(200)
        shot = Image.open(io.BytesIO(page.screenshot()))
        shot.save(folder / f"page-{name}.webp", quality=80, method=6)

    expect(page.get_by_role("button", name="Who are you?")).to_be_visible()
    picture(f"empty-{scheme}")
    page.evaluate(CONVERSATION, ["what", "is", "the", "capital", "of", "puppet"])
    for width in WIDTHS:
        picture(f"{scheme}-{width}", width)
    page.set_viewport_size({"width": 1280, "height": 800})
    page.get_by_role("button", name="How it was made").first.click()
    picture(f"inside-{scheme}")
