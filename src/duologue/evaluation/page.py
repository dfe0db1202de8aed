"""The page of players: what was asked, what was answered, and what was read of both, to be listened to in a browser.

`report.html` needs nothing but the folder `sounds` next to it: no network, no other file. A click on a head sorts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import soundfile

from duologue.evaluation.conversations import ScoredExchange, Waveform
from duologue.evaluation.measures import GROUP_NAMES
from duologue.evaluation.report import Report, format_table

PAGE_FILE, SOUND_FOLDER = "report.html", "sounds"
_HEAD = ("group", "question", "recognition side", "answer", "recognizer read", "in text", "in sound")
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid #8885; padding: .5rem; text-align: left; vertical-align: top; }
th { position: sticky; top: 0; background: Canvas; cursor: pointer; }
th[aria-sort=ascending]::after { content: " \\2191"; } th[aria-sort=descending]::after { content: " \\2193"; }
audio { display: block; width: 15rem; height: 2rem; margin-top: .3rem; }
pre { overflow-x: auto; }
.yes { color: #197b3b; } .no { color: #c62828; font-weight: bold; }
@media (prefers-color-scheme: dark) { .yes { color: #6fcf8f; } .no { color: #ff8a80; } }
"""
_SCRIPT = """
const group = document.getElementById("group"), wrong = document.getElementById("wrong");
function filter() {
  let shown = 0;
  for (const row of document.querySelectorAll("tbody tr")) {
    row.hidden = (group.value && row.dataset.group !== group.value) || (wrong.checked && !("wrong" in row.dataset));
    shown += !row.hidden;
  }
  document.getElementById("count").textContent = shown;
}
group.addEventListener("change", filter); wrong.addEventListener("change", filter); filter();
const body = document.querySelector("tbody"), heads = [...document.querySelectorAll("th")];
heads.forEach((head, column) => head.addEventListener("click", () => {
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of heads) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const text = row => row.cells[column].textContent.trim();
  const order = (a, b) => text(a).localeCompare(text(b), undefined, {numeric: true});
  body.append(...[...body.rows].sort((a, b) => down ? order(b, a) : order(a, b)));
}));
"""


Mark = bool | str | None  # right or wrong, a rating, or nothing
Sound = Waveform | str | None  # a path is relative to the page


@dataclass(frozen=True, eq=False)
class PageRow:
    """One question on the page.

    Attributes:
        group: what the filter selects by.
        detail: after the group, such as an intent.
        note: small text below it.
        transcript: what the model's own recognition head read; None where nothing read the question.
        heard: what the recognizer read in the answer; None where none listened.
        is_wrong: shown by the filter "only wrong".
    """

    group: str
    detail: str
    question: str
    answer: str
    accepted: tuple[str, ...] = ()
    transcript: str | None = None
    heard: str | None = None
    in_text: Mark = None
    in_sound: Mark = None
    is_wrong: bool = False
    question_sound: Sound = None
    answer_sound: Sound = None
    note: str = ""


def write_page(folder: str | Path, report: Report, exchanges: Sequence[ScoredExchange]) -> Path:
    """Writes `report.html` and the sounds that the exchanges kept; returns the page."""
    return write_rows(folder, report, [_of_exchange(one) for one in exchanges], len(report.samples))


def write_rows(folder: str | Path, report: Report, shown: Sequence[PageRow], num_asked: int) -> Path:
    """Writes `report.html` with these rows and their sounds; returns the page."""
    folder = Path(folder)
    sounds = folder / SOUND_FOLDER
    sounds.mkdir(parents=True, exist_ok=True)
    for old in sounds.glob("[0-9][0-9][0-9]-*.flac"):
        old.unlink()
    rows = [_row(folder, number, one) for number, one in enumerate(shown)]
    options = "".join(
        f'<option value="{escape(group)}">{escape(group)}</option>'
        for group in dict.fromkeys(one.group for one in shown)
    )
    title = escape(f"{report.suite}: {report.model.get('name', '')}")
    head = "".join(f"<th>{escape(name)}</th>" for name in _HEAD)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>{_STYLE}</style></head>
<body>
<h1>{title}</h1>
<details><summary>All measures</summary><pre>{escape(format_table(report))}</pre></details>
<p><label>Group <select id="group"><option value="">all</option>{options}</select></label>
<label><input type="checkbox" id="wrong"> only wrong</label>
<span id="count">{len(rows)}</span> of {num_asked} questions; they are evenly spread over the test set.</p>
<table><thead><tr>{head}</tr></thead>
<tbody>
{"".join(rows)}</tbody></table>
<script>{_SCRIPT}</script>
</body></html>
"""
    path = folder / PAGE_FILE
    path.write_text(page, encoding="utf-8")
    return path


def _of_exchange(one: ScoredExchange) -> PageRow:
    in_text, in_sound = one.correct, None if one.heard is None else one.heard_correct
    return PageRow(
        group=GROUP_NAMES.get(one.split, one.split),
        detail=one.intent,
        question=one.asked,
        answer=one.said,
        accepted=one.answers,
        transcript=one.transcript,
        heard=one.heard,
        in_text=in_text,
        in_sound=in_sound,
        is_wrong=not in_text or in_sound is False,
        question_sound=one.question_sound,
        answer_sound=one.reply_sound,
        note="" if one.last else "an earlier turn",
    )


def _row(folder: Path, number: int, one: PageRow) -> str:
    cells = (
        escape(f"{one.group}, {one.detail}") + (f"<br><small>{escape(one.note)}</small>" if one.note else ""),
        escape(one.question or "(a sound without words)")
        + _player(folder, f"{number:03d}-question", one.question_sound),
        _text(one.transcript),
        escape(one.answer)
        + _player(folder, f"{number:03d}-answer", one.answer_sound)
        + f"<small>accepted: {escape(', '.join(one.accepted))}</small>",
        _text(one.heard),
        _mark(one.in_text),
        _mark(one.in_sound),
    )
    wrong = " data-wrong" if one.is_wrong else ""
    return f'<tr data-group="{escape(one.group)}"{wrong}>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"


def _player(folder: Path, name: str, sound: Sound) -> str:
    if isinstance(sound, str):
        return f'<audio controls preload="none" src="{escape(sound)}"></audio>' if sound else ""
    if sound is None or not sound.wav.size:
        return ""
    path = f"{SOUND_FOLDER}/{name}.flac"
    soundfile.write(folder / path, np.clip(sound.wav, -1.0, 1.0), sound.sample_rate)
    return f'<audio controls preload="none" src="{path}"></audio>'


def _text(text: str | None) -> str:
    return "<small>not read</small>" if text is None else escape(text) or "<small>(nothing)</small>"


def _mark(right: Mark) -> str:
    if isinstance(right, str):
        return escape(right)
    return {True: '<span class="yes">right</span>', False: '<span class="no">wrong</span>', None: "-"}[right]
