"""seed-tts-eval: texts to be read aloud.

    FOLDER/{en|zh}/meta.lst     utt|prompt_text|prompt_wav|text, or with a fifth field for the recording of the text

The results are `LANGUAGE/UTT.wav`, which its scripts read. The speaker similarity compares a reply with the prompt.
Models of this package have fixed voices and do not copy that of the prompt, so it says nothing about them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from duologue.config import read_lines
from duologue.evaluation.benchmarks.items import (
    Benchmark,
    BenchmarkItem,
    BenchmarkQuestion,
    GivenAnswer,
    Scoring,
    SoundPlace,
)
from duologue.evaluation.benchmarks.urobench import link

LANGUAGES = ("en", "zh")


def load(folder: Path) -> list[BenchmarkItem]:
    lists = [(language, path) for language in LANGUAGES if (path := folder / language / "meta.lst").is_file()]
    if not lists:
        raise ValueError(f"{folder} has no {{en|zh}}/meta.lst of seed-tts-eval")
    return [item for language, path in lists for item in _items(language, path)]


def _items(language: str, path: Path) -> list[BenchmarkItem]:
    items = []
    for where, line in read_lines(path):
        parts = [part.strip() for part in line.split("|")]
        if len(parts) not in (4, 5) or not parts[0] or not parts[3]:
            raise ValueError(f"{where} is not utt|prompt_text|prompt_wav|text")
        question, voice = BenchmarkQuestion(None, parts[3], (parts[3],)), SoundPlace(path.parent / parts[2])
        name, fields = f"{language}/{parts[0]}", {"utt": parts[0]}
        items.append(BenchmarkItem(name, language, (question,), Scoring.READ, language, fields, voice))
    return items


def write(target: Path, results: Path, model: str, answers: Sequence[tuple[BenchmarkItem, GivenAnswer]]) -> None:
    for item, answer in answers:
        if answer.sound:
            (target / item.language).mkdir(exist_ok=True)
            link(results / answer.sound, target / item.language / f"{item.fields['utt']}.wav")


SEED_TTS_EVAL = Benchmark("seed-tts-eval", "seed-tts-eval", load, write)
