"""Confidence intervals against known values, the page of players as a browser reads it, and the recognizer's folder."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile

from duologue import machine
from duologue.evaluation.conversations import ScoredExchange, Waveform
from duologue.evaluation.intelligibility import error_row
from duologue.evaluation.intervals import bootstrap, wilson
from duologue.evaluation.page import write_page
from duologue.evaluation.recognition import WhisperRecognizer, open_recognizer
from duologue.evaluation.report import Report, Row

# Intervals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_right", "num", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 20, 0.0, 0.1611),
        (20, 20, 0.8389, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_wilson(num_right: int, num: int, low: float, high: float) -> None:
    assert wilson(num_right, num) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("num_right", "num"), [(0, 0), (3, 2), (-1, 4)])
def test_what_is_no_share_has_no_interval(num_right: int, num: int) -> None:
    with pytest.raises(ValueError, match="is no share"):
        wilson(num_right, num)


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(10.0, 2.0, 400).tolist()
    low, high = bootstrap(values, [1.0] * 400, [str(index) for index in range(400)])
    half = 1.96 * float(np.std(values)) / 20
    assert low == pytest.approx(np.mean(values) - half, abs=0.04)
    assert high == pytest.approx(np.mean(values) + half, abs=0.04)


def test_bootstrap_draws_whole_dialogues_and_repeats() -> None:
    edits, words = [1.0, 1.0, 0.0, 0.0] * 50, [4.0] * 200
    alone = bootstrap(edits, words, [str(index) for index in range(200)])
    together = bootstrap(edits, words, [str(index // 2) for index in range(200)])
    assert together[1] - together[0] > 1.3 * (alone[1] - alone[0])  # sqrt(2) for pairs that err together
    assert bootstrap(edits, words, ["one"] * 200) == (0.125, 0.125)
    assert bootstrap(edits, words, [str(index) for index in range(200)]) == alone
    with pytest.raises(ValueError, match="give no rate"):
        bootstrap([], [], [])


def test_the_interval_of_an_error_rate_holds_it() -> None:
    row = error_row("part", "WER", [("one two", "one"), ("three four", "three four"), ("five", "6")] * 20)
    assert row.value == pytest.approx(0.4)
    assert row.interval is not None
    low, high = row.interval
    assert 0.2 < low < 0.4 < high < 0.6


# The page ------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser finds: rows with their cells, players, and every address."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.rows: list[dict[str, str | None]] = []
        self.cells: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.options: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append(tag)
        self.addresses += [found[name] or "" for name in ("src", "href") if name in found]
        if tag == "tr" and "data-group" in found:
            self.rows.append(found)
        if tag == "td":
            self.cells.append("")
        if tag == "option":
            self.options.append(found["value"] or "")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


NASTY = "<script>alert(\"x\")</script> & 'more'"
SOUND = Waveform(np.linspace(-2, 2, 1600, dtype=np.float32), 16_000)
RIGHT = ScoredExchange(
    dialogue="d",
    intent="plus",
    split="test",
    last=True,
    style="plain",
    asked="What is one plus two?",
    expected="It is three.",
    answers=("three",),
    said="It is three.",
    heard="It is 3.",
    heard_reference=None,
    change=None,
    first_audio_s=0.1,
    audio_s=0.1,
    total_s=0.1,
    transcript="what is one plus two",
    question_sound=SOUND,
    reply_sound=SOUND,
)


def test_the_page_shows_marks_escapes_and_needs_no_network(tmp_path: Path) -> None:
    shown = [
        RIGHT,
        replace(RIGHT, heard="it is tree", split="bundled"),
        replace(RIGHT, asked=NASTY, said=NASTY, heard=NASTY, transcript=NASTY, intent=NASTY, answers=(NASTY,)),
        replace(RIGHT, said="four", heard=None, transcript=None, split="test_warped", question_sound=None),
        replace(RIGHT, asked="", reply_sound=Waveform(np.zeros(0, np.float32), 22_050)),
    ]
    report = Report("pocket", {"name": NASTY}, machine.describe(), (Row("a", NASTY, 0.5),), samples=({},) * 9)
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "077-answer.flac").touch()  # of an earlier run
    path = write_page(tmp_path, report, shown)
    page = Page(path.read_text(encoding="utf-8"))
    assert path == tmp_path / "report.html"
    assert [row["data-group"] for row in page.rows] == [
        *("seen voices", "bundled", "seen voices", "warped voices", "seen voices"),
    ]
    assert ["data-wrong" in row for row in page.rows] == [False, True, False, True, False]
    assert page.options == ["", "seen voices", "bundled", "warped voices"]
    assert page.tags.count("script") == 1
    cells = [[cell.strip() for cell in page.cells[at : at + 7]] for at in range(0, len(page.cells), 7)]
    assert cells[0][5:7] == ["right", "right"]
    assert cells[1][4:7] == ["it is tree", "right", "wrong"]
    assert cells[2][1] == cells[2][2] == cells[2][4] == NASTY
    assert cells[3][4] == "not read"
    assert cells[3][5] == "wrong"
    assert cells[4][1] == "(a sound without words)"
    assert sorted(page.addresses) == sorted(str(file.relative_to(tmp_path)) for file in tmp_path.glob("sounds/*"))
    assert len(page.addresses) == 8
    wav, sample_rate = soundfile.read(tmp_path / "sounds" / "000-question.flac")
    assert (len(wav), sample_rate) == (1600, 16_000)


# The recognizer ------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_whisper_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no CTranslate2 folder with a Whisper: model.bin is missing"):
        WhisperRecognizer(tmp_path)
    pytest.importorskip("faster_whisper")
    (tmp_path / "model.bin").write_bytes(b"nothing")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="cannot be read as a CTranslate2 Whisper"):
        WhisperRecognizer(tmp_path)


def test_a_missing_recognizer_says_what_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recognizer, why_not = open_recognizer(None)
    assert recognizer is None
    assert "--recognizer FOLDER" in why_not
    folder = tmp_path / "runs" / "pocket" / "parts" / "whisper-base-ct2"
    folder.mkdir(parents=True)
    for name in ("model.bin", "config.json", "tokenizer.json"):
        (folder / name).touch()
    monkeypatch.setitem(__import__("sys").modules, "faster_whisper", None)
    recognizer, why_not = open_recognizer(None)
    assert recognizer is None
    assert "pip install" in why_not
    with pytest.raises(ValueError, match="pip install"):
        open_recognizer(folder)
