"""The tables 1, 3, 4, 5 and 6 of arXiv 2412.02612, as far as their data lies in the data folder.

A missing data set gives a row that names its folder. Everything that was computed is kept on disk, so a stopped run
continues. docs/evaluation.md has the published figures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from duologue.config import parse_config, to_mapping
from duologue.conversation.answer import decode, tokenize
from duologue.evaluation.asking import Asker
from duologue.evaluation.benchmarks.items import Benchmark, BenchmarkItem, BenchmarkQuestion, Scoring
from duologue.evaluation.benchmarks.openaudiobench import load_spoken_qa
from duologue.evaluation.benchmarks.seedtts import SEED_TTS_EVAL
from duologue.evaluation.benchmarks.speech_sets import (
    ASR_SETS,
    CHAT,
    STORIES,
    TTS_SET,
    SpeechSet,
    StoryPair,
    TranscribedSound,
    read_chat,
    read_stories,
)
from duologue.evaluation.intelligibility import Naturalness, if_available
from duologue.evaluation.judge import ChatJudge
from duologue.evaluation.likelihood import prefers_right_end, transcribe_with_language_model
from duologue.evaluation.report import Report
from duologue.evaluation.runner import JsonLines, ask_all, open_run, read_rows
from duologue.evaluation.scores import MissingFigure, Score
from duologue.evaluation.suite import Listener, SuiteSettings, finish
from duologue.evaluation.testset import spread
from duologue.models import Models
from duologue.rates import SPEAK_SAMPLE_RATE
from duologue.scoring import word_errors
from duologue.sound_files import load_audio

PAPER = Benchmark("paper", "tables of arXiv 2412.02612", lambda folder: [])
PARTS_FILE = "parts.jsonl"
OPENAUDIOBENCH, SEED_TTS = "OpenAudioBench", "seedtts_testset"
TABLE_1, TABLE_3, TABLE_4, TABLE_5, TABLE_6 = (
    *("table 1, tokenizer", "table 3, speech language model", "table 4, spoken questions"),
    *("table 5, ASR and TTS", "table 6, chat"),
)
Compute = Callable[[Models, Any], Score]


def run_paper(
    settings: SuiteSettings,
    asker: Asker,
    models: Models | None,
    listener: Listener,
    judge: ChatJudge | None,
) -> Report:
    """Computes what the data allows and writes the report.

    Args:
        models: of the asked chatbot; None for a server, whose tokenizer and likelihoods are out of reach.

    Raises:
        ValueError: a data set has not its layout, the output holds another run, or nothing answers.
    """
    if not settings.data.is_dir():
        raise ValueError(f"{settings.data} is no folder with data sets")
    about = asker.about()
    run = {"benchmark": PAPER.name, "data": str(settings.data.resolve()), "model": about}
    answers = open_run(settings.output, run, settings.resume)
    missing: list[MissingFigure] = []
    scores = list(_parts(settings, models, listener, missing))
    items = _items(settings, missing)
    if items:
        answers = ask_all(items, asker, settings.output, answers, settings.num_at_once, PAPER.title)
    if models is not None:
        missing.append(MissingFigure(TABLE_1, "VisQOL, MOSNet", "neither is part of this package; DNSMOS is"))
    if listener.utmos is None:
        missing.append(MissingFigure(TABLE_6, "UTMOS", "its weights are not part of this package: --utmos FILE"))
    return finish(PAPER, settings, items, answers, about, listener, judge, scores, missing)


def _items(settings: SuiteSettings, missing: list[MissingFigure]) -> list[BenchmarkItem]:
    """The questions of tables 4 and 6, and the texts of table 5."""
    items: list[BenchmarkItem] = []

    def add(table: str, name: str, folder: Path, load: Callable[[Path], Sequence[BenchmarkItem]]) -> None:
        if not folder.exists():
            missing.append(MissingFigure(f"{table}: {name}", "all", f"there is no {folder}"))
            return
        by_subset: dict[str, list[BenchmarkItem]] = {}
        for one in load(folder):
            by_subset.setdefault(one.subset, []).append(one)
        for subset, own in by_subset.items():
            for one in spread(own, settings.limit or len(own)):
                items.append(dataclasses.replace(one, id=f"{name}/{one.id}", subset=f"{table}: {name} {subset}"))

    add(TABLE_4, OPENAUDIOBENCH, settings.data / OPENAUDIOBENCH, load_spoken_qa)
    add(TABLE_5, TTS_SET.name, settings.data / TTS_SET.folder, _texts_to_read)
    add(TABLE_5, "Seed-TTS", settings.data / SEED_TTS, SEED_TTS_EVAL.load)
    for name in ("general", "knowledge"):
        add(TABLE_6, CHAT, settings.data / CHAT / f"{name}.jsonl", read_chat)
    return items


def _texts_to_read(folder: Path) -> list[BenchmarkItem]:
    read = TTS_SET.read(folder)
    return [
        BenchmarkItem(one.id, "read", (BenchmarkQuestion(None, one.text, (one.text,)),), Scoring.READ, one.language)
        for one in read
    ]


def _parts(
    settings: SuiteSettings, models: Models | None, listener: Listener, missing: list[MissingFigure]
) -> Iterator[Score]:
    """The scores of tables 1 and 3, and the recognition of table 5; each is on disk as soon as it exists."""
    if models is None:
        why = "a server gives neither tokens nor likelihoods: give --model"
        for table, measure in ((TABLE_1, "all"), (TABLE_3, "all"), (TABLE_5, "ASR")):
            missing.append(MissingFigure(table, measure, why))
        return
    path = settings.output / PARTS_FILE
    known = {(one.subset, one.measure, one.item): one for one in (parse_config(Score, row) for row in read_rows(path))}
    with JsonLines(path) as lines:
        for subset, measure, values, compute in _wanted(settings, models, listener, missing):
            for value in tqdm(values, f"{subset}, {measure}", disable=None, leave=False):
                key = (subset, measure, value.id)
                if key not in known:
                    with torch.inference_mode():
                        computed = compute(models, value)
                    known[key] = dataclasses.replace(computed, subset=subset, measure=measure)
                    lines.append(to_mapping(known[key]))
                yield known[key]


def _wanted(
    settings: SuiteSettings, models: Models, listener: Listener, missing: list[MissingFigure]
) -> Iterator[tuple[str, str, Sequence[Any], Compute]]:
    """(subset, measure, what it is computed from, the computation) for each figure that can be computed."""
    naturalness, why_no_mos = if_available(Naturalness)
    for one in ASR_SETS:
        utterances = _read(one, settings, missing)
        if not utterances:
            continue
        rate = "CER" if utterances[0].language == "zh" else "WER"
        subset = f"{TABLE_1}: {one.name}"
        if models.recognizer is None:
            missing.append(MissingFigure(subset, rate, "the model has no recognition head"))
        else:
            yield subset, f"{rate} of the recognition head", utterances, _by_head
        if one is ASR_SETS[0]:
            if listener.recognizer is None:
                missing.append(MissingFigure(subset, f"{rate} after reconstruction", listener.why_not))
            else:
                yield subset, f"{rate} after reconstruction", utterances, _reconstruction(listener)
            if naturalness is None:
                missing.append(MissingFigure(subset, "DNSMOS after reconstruction", why_no_mos, "MOS"))
            else:
                yield subset, "DNSMOS after reconstruction", utterances, _quality(naturalness)
        try:
            transcribe_with_language_model(models, [0])
        except ValueError as error:
            missing.append(MissingFigure(f"{TABLE_5}: {one.name}", rate, str(error)))
        else:
            yield f"{TABLE_5}: {one.name}", f"{rate} of the language model", utterances, _by_language_model
    for name in STORIES:
        folder = settings.data / name
        if not folder.is_dir():
            missing.append(MissingFigure(f"{TABLE_3}: {name}", "accuracy", f"there is no {folder}"))
            continue
        pairs = read_stories(folder)
        chosen = spread(pairs, settings.limit or len(pairs))
        yield f"{TABLE_3}: {name}", "accuracy S->T", chosen, lambda models, pair: _story(models, pair, False)
        yield f"{TABLE_3}: {name}", "accuracy S->S", chosen, lambda models, pair: _story(models, pair, True)


def _read(one: SpeechSet, settings: SuiteSettings, missing: list[MissingFigure]) -> list[TranscribedSound]:
    folder = settings.data / one.folder
    if not folder.is_dir():
        missing.append(MissingFigure(f"{TABLE_1}: {one.name}", "all", f"there is no {folder}"))
        missing.append(MissingFigure(f"{TABLE_5}: {one.name}", "ASR", f"there is no {folder}"))
        return []
    utterances = one.read(folder)
    if not utterances:
        raise ValueError(f"{folder} holds no recordings of {one.name}")
    return spread(utterances, settings.limit or len(utterances))


def _codes(models: Models, one: TranscribedSound) -> list[int]:
    return tokenize(models, *load_audio(one.sound))


def _errors(one: TranscribedSound, heard: str) -> Score:
    edits, words = word_errors(one.text, heard, one.language)
    return Score(one.id, "", "", float(edits), float(words), better="lower")


def _by_head(models: Models, one: TranscribedSound) -> Score:
    return _errors(one, models.transcribe(_codes(models, one)))


def _by_language_model(models: Models, one: TranscribedSound) -> Score:
    return _errors(one, transcribe_with_language_model(models, _codes(models, one)))


def _reconstruction(listener: Listener) -> Compute:
    def compute(models: Models, one: TranscribedSound) -> Score:
        assert listener.recognizer is not None
        wav = decode(models, _codes(models, one))
        return _errors(one, listener.recognizer.transcribe(wav, SPEAK_SAMPLE_RATE, one.language))

    return compute


def _quality(naturalness: Naturalness) -> Compute:
    def compute(models: Models, one: TranscribedSound) -> Score:
        value = naturalness(decode(models, _codes(models, one)), SPEAK_SAMPLE_RATE)
        return Score(one.id, "", "", value, unit="MOS")

    return compute


def _story(models: Models, pair: StoryPair, spoken: bool) -> Score:
    return Score(pair.id, "", "", prefers_right_end(models, pair, spoken))
