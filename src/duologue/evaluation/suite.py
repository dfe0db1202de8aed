"""One benchmark from its data to the report: ask, read the sounds, judge, score, write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from duologue import machine
from duologue.evaluation.asking import Asker
from duologue.evaluation.benchmarks.items import Benchmark, BenchmarkItem, GivenAnswer
from duologue.evaluation.conversations import Waveform
from duologue.evaluation.judge import ChatJudge
from duologue.evaluation.page import PageRow, write_rows
from duologue.evaluation.recognition import SoundRecognizer
from duologue.evaluation.report import Report, Row, format_markdown
from duologue.evaluation.runner import ask_all, open_run
from duologue.evaluation.scores import MissingFigure, Score, Scored, read_sounds, score, score_rows
from duologue.evaluation.sound_quality import SpeakerEmbedder, UtmosPredictor
from duologue.evaluation.testset import spread
from duologue.sound_files import load_audio

OWN_FOLDER = "own"  # the benchmark's own result layout
NAME = "report"


@dataclass(frozen=True)
class Listener:
    """What listens to the replies.

    Attributes:
        recognizer, name: the recognizer and its name; None for the reason `why_not`.
        utmos: predicts how good a reply sounds; None leaves that out.
        speakers: compares a reply with the voice that it should have; None leaves that out.
    """

    recognizer: SoundRecognizer | None
    name: str = ""
    why_not: str = ""
    utmos: UtmosPredictor | None = None
    speakers: SpeakerEmbedder | None = None


@dataclass(frozen=True)
class SuiteSettings:
    """What is asked, and where the results go.

    Attributes:
        data: folder of the benchmark.
        output: folder of the results.
        limit: items at most, spread over all subsets; None asks all.
        subsets: names; empty takes all.
        num_at_once: conversations at a time.
        num_players: questions at most on the page.
    """

    data: Path
    output: Path
    limit: int | None = None
    subsets: tuple[str, ...] = ()
    resume: bool = False
    num_at_once: int = 4
    num_players: int = 60


def choose(benchmark: Benchmark, settings: SuiteSettings) -> list[BenchmarkItem]:
    """The items that are asked. Raises ValueError for an unknown subset, and as the loader."""
    if not settings.data.is_dir():
        raise ValueError(f"{settings.data} is no folder with the data of {benchmark.title}")
    items = benchmark.load(settings.data)
    known = list(dict.fromkeys(item.subset for item in items))
    if unknown := [name for name in settings.subsets if name not in known]:
        raise ValueError(
            f"{benchmark.title} has no subset {unknown[0]!r} in {settings.data}; it has {', '.join(known)}"
        )
    chosen = [item for item in items if not settings.subsets or item.subset in settings.subsets]
    if not chosen:
        raise ValueError(f"{settings.data} holds no question of {benchmark.title}")
    return spread(chosen, settings.limit) if settings.limit else chosen


def run_benchmark(
    benchmark: Benchmark, settings: SuiteSettings, asker: Asker, listener: Listener, judge: ChatJudge | None
) -> Report:
    """Runs a benchmark and writes all results; what exists already is not computed again.

    Raises:
        ValueError: the data has not the layout, the output holds another run, or nothing answers.
    """
    items = choose(benchmark, settings)
    about = asker.about()
    run = {"benchmark": benchmark.name, "data": str(settings.data.resolve()), "model": about}
    answers = open_run(settings.output, run, settings.resume)
    answers = ask_all(items, asker, settings.output, answers, settings.num_at_once, benchmark.title)
    own = settings.output / OWN_FOLDER
    own.mkdir(exist_ok=True)
    if benchmark.write is not None:
        name = "".join(char if char.isalnum() or char in "-._" else "-" for char in str(about["name"]))
        benchmark.write(own, settings.output, name, [(item, answers[item.id]) for item in items])
    return finish(benchmark, settings, items, answers, about, listener, judge)


def finish(
    benchmark: Benchmark,
    settings: SuiteSettings,
    items: Sequence[BenchmarkItem],
    answers: Mapping[str, GivenAnswer],
    about: Mapping[str, Any],
    listener: Listener,
    judge: ChatJudge | None,
    more: Sequence[Score] = (),
    missing: Sequence[MissingFigure] = (),
) -> Report:
    """Scores the answers and writes scores.jsonl and the report: JSON, Markdown, picture and page.

    Args:
        more, missing: scores that come from elsewhere, and figures that cannot be computed.
    """
    heard = None
    if listener.recognizer is not None:
        heard = read_sounds(settings.output, items, answers, listener.recognizer, listener.name)
    scored = score(items, answers, heard, listener.why_not, judge)
    scored.scores += [*_sound_scores(settings.output, items, answers, listener), *more]
    scored.missing += missing
    scored.save(settings.output)
    used = {"recognizer": listener.name, "judge": judge.settings.model if judge else ""}
    rows = score_rows(scored, used, with_total=not more)
    if scored.num_unreadable:
        rows.append(Row("judge", "unreadable verdicts, left out", scored.num_unreadable, num=scored.num_unreadable))
    report = Report(
        benchmark.name,
        dict(about),
        machine.describe(),
        tuple(rows),
        {
            "data": str(settings.data),
            "num_items": len(items),
            "recognizer": listener.name or f"none: {listener.why_not}",
            "judge": vars(judge.settings) if judge else "none",
            "utmos": listener.utmos.name if listener.utmos else "none",
            "speaker model": listener.speakers.name if listener.speakers else "none",
            "normalizer": "Whisper's English one with numbers in words; its basic one by characters for Chinese",
            "interval": "95 %: Wilson for shares of items, bootstrap over items otherwise, seed 0",
            "commit": machine.source_commit(),
        },
    )
    report.save(settings.output, NAME)
    (settings.output / f"{NAME}.md").write_text(format_markdown(report), encoding="utf-8")
    shown = spread(items, settings.num_players)
    write_rows(settings.output, report, list(_page_rows(shown, answers, heard, scored)), len(items))
    return report


def _sound_scores(
    folder: Path, items: Sequence[BenchmarkItem], answers: Mapping[str, GivenAnswer], listener: Listener
) -> Iterator[Score]:
    """The measures of the sound of each last reply whose weights are given."""
    if listener.utmos is None and listener.speakers is None:
        return
    asked = [(item, answers[item.id]) for item in items if item.id in answers and answers[item.id].sound]
    for item, answer in tqdm(asked, "sound quality", disable=None, leave=False):
        wav, rate = load_audio(folder / answer.sound)
        if listener.utmos is not None:
            yield Score(item.id, item.subset, "UTMOS", listener.utmos(wav, rate), unit="MOS")
        if listener.speakers is not None and item.voice is not None and item.voice.path.is_file():
            wanted = listener.speakers.embed(*load_audio(item.voice.read()))
            likeness = listener.speakers.likeness(listener.speakers.embed(wav, rate), wanted)
            yield Score(item.id, item.subset, "speaker similarity", likeness, unit="cosine")


def _page_rows(
    shown: Sequence[BenchmarkItem], answers: Mapping[str, GivenAnswer], heard: Mapping[str, str] | None, scored: Scored
) -> Sequence[PageRow]:
    verdicts: dict[tuple[str, str], Score] = {}
    for one in scored.scores:
        measure, _, side = one.measure.rpartition(", ")
        if measure in ("right", "refused", "judged", "WER", "CER"):
            verdicts[one.item, side] = one
    rows = []
    for item in shown:
        answer, question = answers[item.id], item.questions[-1]
        text, sound = verdicts.get((item.id, "text")), verdicts.get((item.id, "sound"))
        rows.append(
            PageRow(
                group=item.subset,
                detail=item.id,
                question=question.text,
                answer=answer.text,
                accepted=question.references,
                heard=None if heard is None else heard.get(answer.sound, ""),
                in_text=_mark_of(text),
                in_sound=_mark_of(sound),
                is_wrong=any(_mark_of(one) is False for one in (text, sound)) or bool(answer.error),
                question_sound=None if question.sound is None else Waveform(*load_audio(question.sound.read())),
                answer_sound=answer.sound or None,
                note=answer.error,
            )
        )
    return rows


def _mark_of(one: Score | None) -> bool | str | None:
    if one is None:
        return None
    if one.unit != "%":
        return f"{one.value:g} {one.unit}"
    if one.better == "lower":
        return f"{one.value:g} of {one.weight:g} wrong"
    return one.value == 1.0
