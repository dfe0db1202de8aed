"""The states of the page that people meet: empty, unsure, disconnected, refused, below a path, in a frame; and its
accessibility, by axe-core's rules in four widths and two color schemes.

axe-core comes with `npm install --no-package-lock --prefix tests/node`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from tests.browser import Visit, launch, needs_chromium, wait_for
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


@pytest.fixture
def server() -> Iterator[PageServer]:
    with PageServer().running() as running:
        running.script.about = dict(MODEL)
        yield running


Open = Callable[..., Visit]


@pytest.fixture
def visit(browser: Browser, server: PageServer) -> Iterator[Open]:
    visits: list[Visit] = []

    def open_page(**options: Any) -> Visit:
        visits.append(Visit.open(browser, server.url, **options))
        return visits[-1]

    yield open_page
    for one in visits:
        one.close()


def test_the_empty_page_says_what_it_is_and_asks_its_suggestions(visit: Open, server: PageServer) -> None:
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
    expect(one.turn("they", server.script.answer)).to_have_count(1)
    expect(page.locator("#welcome")).to_be_hidden()
    assert not re.search(r"\d+ ms|\d s\b", page.locator("#turns").inner_text())  # no figures


def test_words_heard_with_low_confidence_are_marked(visit: Open, server: PageServer) -> None:
    server.script.unsure = -1.2
    one = visit(script=WRITTEN)
    page = one.page
    page.keyboard.down("Space")
    wait_for(lambda: len(server.of("input_audio_buffer.append")) > 8, page)
    page.keyboard.up("Space")
    heard = one.turn("you", server.script.heard)
    expect(heard.locator("mark")).to_have_text(" three?")
    expect(heard).to_contain_text("Underlined: not heard clearly.")


def test_a_lost_line_stops_the_meter_and_keeps_what_is_said(visit: Open, server: PageServer) -> None:
    one = visit(script=WRITTEN)
    page = one.page
    page.get_by_role("button", name="Talk hands-free").click()
    wait_for(lambda: len(server.of("input_audio_buffer.append")) > 5, page)
    server.script.denies = 503
    server.drop()
    expect(page.get_by_role("button", name="Reconnecting. Stop listening")).to_have_text("Reconnecting")
    expect(page.locator("#status")).to_have_text("Not connected · what you say is kept for a moment")
    expect(page.locator("#meter-you")).to_have_attribute("aria-valuenow", "-60")
    expect(one.turn("you", "The line dropped: not all of this was heard.")).to_have_count(1)
    page.get_by_label("Message").fill("Written meanwhile")
    page.keyboard.press("Enter")
    expect(one.turn("you", "Waits for the connection; not sent yet.")).to_have_class(re.compile("waiting"))
    before = len(server.sound)
    page.wait_for_timeout(600)
    server.script.denies = 0
    page.evaluate("document.getElementById('notice-action').click()")
    expect(one.turn("you", "Waits for the connection")).to_have_count(0)
    [asked] = wait_for(lambda: server.of("conversation.item.create"), page)
    assert asked["item"]["content"][0]["text"] == "Written meanwhile"
    wait_for(lambda: len(server.sound) > before + 24_000, page)  # with the half second that was kept


def test_refusals_name_the_way_out(visit: Open, server: PageServer) -> None:
    server.script.key = "a-key-of-the-page"
    one = visit()
    one.type("Hello?")
    expect(one.page.get_by_role("alert")).to_contain_text("Its keys are those of its option --keys.")
    server.script.key = ""
    server.script.denies = 403
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


def test_the_page_works_below_a_path_and_in_a_frame(browser: Browser, server: PageServer) -> None:
    server.script.prefix = "/voice"
    with PageServer().running() as outer:
        outer.framed = server.url
        allowed = f"frame-ancestors 'self' {outer.url.rstrip('/')}"
        server.policy = POLICY.replace("frame-ancestors 'none'", allowed)
        one = Visit.open(browser, f"{outer.url}frame")
        frame = one.page.frame_locator("iframe")
        expect(frame.locator("#line-words")).to_have_text("mock")
        frame.get_by_role("button", name="Settings").click()
        frame.get_by_label("Answer with").select_option("text")
        frame.get_by_role("button", name="Done").click()
        frame.get_by_label("Message").fill("In a frame?")
        frame.get_by_label("Message").press("Enter")
        expect(frame.locator(".turn.they")).to_contain_text(server.script.answer)
        one.context.close()
        server.policy = POLICY
        refused = Visit.open(browser, f"{outer.url}frame")
        refused.page.wait_for_timeout(300)
        expect(refused.page.frame_locator("iframe").locator("#line-words")).to_have_count(0)
        refused.context.close()
    assert all(path.startswith("/voice/") for path in server.asked)


def test_everything_is_reached_by_the_keyboard_alone(visit: Open, server: PageServer) -> None:
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
    expect(one.turn("they", server.script.answer)).to_have_count(1)
    tab_to("How it was made")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Inside the answer")).to_be_visible()
    tab_to("Hold to talk")
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Hold to talk")).to_have_attribute("aria-pressed", "false")
    tab_to("Message")
    page.keyboard.type("And in writing")
    page.keyboard.press("Enter")
    expect(one.turn("they", server.script.answer)).to_have_count(2)


def violations(page: Page) -> list[str]:
    """What axe-core's rules find, and its best practices."""
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    assert len(found["passes"]) > 15  # the rules were applied
    return [f"{one['id']}: {node['html'][:120]}" for one in found["violations"] for node in one["nodes"]]


@pytest.mark.skipif(
    not AXE.is_file(), reason="axe-core is not there: npm install --no-package-lock --prefix tests/node"
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_rule_of_axe_is_broken(visit: Open, server: PageServer, scheme: str) -> None:
    server.script.about = {**MODEL, "voices": ["anna", "ben"], "follows_instructions": True}
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
    expect(one.turn("they", server.script.answer)).to_have_count(1)
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
