"""Asks the items of a benchmark, several conversations at a time, and keeps each answer on disk as soon as it exists.

    FOLDER/run.json        what is asked: benchmark, data, model, seed
    FOLDER/answers.jsonl   one answer per line; the last line of an item counts
    FOLDER/sounds/         the replies, 16-bit WAV

A stopped run continues where it was. Items that failed are asked again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import soundfile
from tqdm import tqdm

from duologue.config import parse_config, read_json, to_mapping, write_json
from duologue.evaluation.asking import Asker, AskingFailed, SpokenReply
from duologue.evaluation.benchmarks.items import BenchmarkItem, GivenAnswer, GivenTurn
from duologue.pcm import to_int16

RUN_FILE, ANSWERS_FILE, SOUND_FOLDER = "run.json", "answers.jsonl", "sounds"
MAX_FAILURES = 5  # if the first ones all fail, the server is broken and not the question


def open_run(folder: Path, settings: Mapping[str, Any], resume: bool) -> dict[str, GivenAnswer]:
    """Starts or continues a run; returns the answers that exist.

    Raises:
        ValueError: the folder holds answers and `resume` is false, or they are of other settings.
    """
    answers = read_answers(folder / ANSWERS_FILE)
    run = {"kind": "EvaluationRun", "version": 1, **settings}
    if (folder / RUN_FILE).is_file():
        if answers and not resume:
            raise ValueError(f"{folder} holds {len(answers)} answers: --resume continues, or name another folder")
        old = read_json(folder / RUN_FILE)
        different = [key for key in sorted({*old, *run}) if old.get(key) != run.get(key)]
        if answers and different:
            key = different[0]
            raise ValueError(f"{folder} holds a run with {key} {old.get(key)!r}, not {run.get(key)!r}")
    write_json(folder / RUN_FILE, run)
    return answers


def ask_all(
    items: Sequence[BenchmarkItem],
    asker: Asker,
    folder: Path,
    answers: Mapping[str, GivenAnswer],
    num_at_once: int = 4,
    title: str = "questions",
) -> dict[str, GivenAnswer]:
    """Asks what is not answered yet; returns all answers by item id. Ctrl-C loses the running questions only.

    Raises:
        ValueError: the first `MAX_FAILURES` questions failed, with the reason of the last one.
    """
    found = dict(answers)
    waiting = [item for item in items if item.id not in found or found[item.id].error]
    (folder / SOUND_FOLDER).mkdir(parents=True, exist_ok=True)
    with JsonLines(folder / ANSWERS_FILE) as lines, tqdm(total=len(waiting), desc=title, disable=None) as progress:
        outcomes: list[bool] = []

        def keep(answer: GivenAnswer) -> None:
            found[answer.id] = answer
            lines.append(to_mapping(answer))
            progress.update()
            outcomes.append(bool(answer.error))
            if len(outcomes) == min(MAX_FAILURES, len(waiting)) and all(outcomes):
                raise ValueError(f"the first {len(outcomes)} questions failed: {answer.error}")

        asyncio.run(_ask_concurrently((item for item in waiting), asker, folder, keep, num_at_once))
    return found


async def _ask_concurrently(
    waiting: Generator[BenchmarkItem, None, None],
    asker: Asker,
    folder: Path,
    keep: Callable[[GivenAnswer], None],
    num_at_once: int,
) -> None:
    async def work() -> None:
        for item in waiting:  # shared by all workers
            try:
                keep(await _answer(item, asker, folder))
            except ValueError:
                waiting.close()
                raise

    tasks = [asyncio.create_task(work()) for _ in range(num_at_once)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(item: BenchmarkItem, asker: Asker, folder: Path) -> GivenAnswer:
    turns: list[GivenTurn] = []
    name = hashlib.sha256(item.id.encode()).hexdigest()[:16]
    try:
        async with aclosing(asker.ask(item)) as replies:  # type: ignore[type-var]
            async for reply in replies:
                turns.append(await asyncio.to_thread(_keep_sound, reply, folder, f"{name}-{len(turns)}"))
    except AskingFailed as failed:
        return GivenAnswer(item.id, item.subset, tuple(turns), str(failed) or "no reason is known")
    return GivenAnswer(item.id, item.subset, tuple(turns))


def _keep_sound(reply: SpokenReply, folder: Path, name: str) -> GivenTurn:
    sound = ""
    if len(reply.wav):
        sound = f"{SOUND_FOLDER}/{name}.wav"
        soundfile.write(folder / sound, to_int16(reply.wav), reply.sample_rate, subtype="PCM_16")
    audio_s = len(reply.wav) / reply.sample_rate if len(reply.wav) else 0.0
    return GivenTurn(reply.text, sound, reply.first_audio_s, audio_s, reply.total_s)


def read_answers(path: Path) -> dict[str, GivenAnswer]:
    """The answers by item id; the last line of an item counts."""
    rows = (parse_config(GivenAnswer, row, str(path)) for row in read_rows(path))
    return {answer.id: answer for answer in rows}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file that may end in the middle of a line; that rest is cut off the file."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


class JsonLines:
    """A JSON Lines file that grows: each row is on disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        read_rows(path)  # cuts off half a line
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
