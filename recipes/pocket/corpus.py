"""Writes the audio of the pocket recipe: free speech, dialogues and the test set.

Under `--out` there is one folder for each: `free`, `dialogues`, `test`, and three small ones that training never
hears: `valid-natural`, `valid-warped`, `valid-unseen` (`free_speech.plan_check`). `--only words` adds `words`: free
speech of random words, to learn to hear each of them. A folder holds shards, read in the order of their names:

- `clips-00000.jsonl`: one clip a line {id, text, role, voice, language, style, split, intent, sample_rate, offset,
  num_samples, rate, pitch, level, seed, formants}
- `clips-00000.pcm`: flat int16 little endian mono at 16 kHz; `offset` and `num_samples` count samples in it
- `dialogues-00000.jsonl` (not in `free`): one dialogue a line {id, intent, split, language, turns: [{role, text, clip:
  [ids of its renditions], style, sound, answers}]}; user and assistant take turns. A reply text in a style is rendered
  once for the whole folder, so its clip may lie in an earlier shard.

Clips are levelled to -23 dBFS RMS; rooms, noise and most of the variation of level belong to the training.
Every shard is a pure function of the seed, its number and the shards before it, and has its `clips-*.jsonl` only when
it is complete: a stopped run goes on where it was when the same command is given again.

    python -m recipes.pocket.corpus --out FOLDER --hours 100 --turns 72000 --seed 1 --workers 2 [--only free]
    python -m recipes.pocket.corpus --texts FILE
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from duologue.config import read_json_lines
from recipes.pocket import free_speech
from recipes.pocket.everything import texts
from recipes.pocket.free_speech import (
    CHECKS,
    TEST_SPLITS,
    natural_speaker,
    natural_texts,
    num_clips,
    num_word_clips,
    plan_check,
    plan_natural,
    plan_words,
)
from recipes.pocket.plans import (
    DrawSpeaker,
    PlannedClip,
    PlannedDialogue,
    plan_dialogues,
    plan_free,
    plan_test,
    program_speaker,
)
from recipes.pocket.synthesis import (
    NATURAL_REPLY_VOICE,
    NATURAL_VOICES,
    REPLY_VOICE,
    SAMPLE_RATE,
    Request,
    chunked,
    render,
    render_chunks,
)

SHARD_HOURS = 1.0
LENGTH_S = (1.0, 14.0)  # of a clip of natural free speech
SHARD_EXCHANGES = 2000


def write_free(folder: Path, hours: float, seed: int, workers: int) -> None:
    """Render free speech of the programs alone until the folder holds `hours` of it."""
    for shard in range(max(1, round(hours / SHARD_HOURS))):
        if not _complete(folder, shard):
            seconds = min(SHARD_HOURS, hours) * 3600
            ids = (f"{folder.name}-{shard:05d}-{index:06d}" for index in range(10**6))
            write_clips(folder, shard, zip(ids, plan_free(seed, shard), strict=False), workers, seconds)


def write_natural(folder: Path, hours: float, seed: int, workers: int) -> None:
    """Render free speech in natural voices, warps and the programs' voices, about `hours` in all."""
    texts = natural_texts()
    _write_hours(folder, hours, workers, lambda shard, scale: plan_natural(seed, shard, texts, scale), num_clips)


def write_words(folder: Path, hours: float, seed: int, workers: int) -> None:
    """Render words in random order, about `hours` in the voices of `write_natural` and half as many as replies."""
    _write_hours(folder, hours, workers, lambda shard, scale: plan_words(seed, shard, scale), num_word_clips)


def _write_hours(
    folder: Path,
    hours: float,
    workers: int,
    plan: Callable[[int, float], list[PlannedClip]],
    num_planned: Callable[[float], int],
) -> None:
    """Render the missing shards of `plan(shard, scale)`, of which each has at most `num_planned(scale)` clips."""
    scale = min(1.0, hours / free_speech.SHARD_HOURS)
    shards = range(max(1, math.ceil(hours / free_speech.SHARD_HOURS)))
    missing = [shard for shard in shards if not _complete(folder, shard)]
    planned = ((shard, plan(shard, scale)) for shard in missing)
    write_planned(folder, planned, len(missing) * num_planned(scale), workers)


def write_checks(folder: Path, seed: int, workers: int, count: int, programs_only: bool = False) -> None:
    """Render the small sets that training never hears, of `count` clips each, into `folder/valid-KIND`.

    `programs_only`: the reply voice stands in for the natural ones, the curriculum for natural text.
    """
    for kind in CHECKS:
        if not _complete(folder / f"valid-{kind}", 0):
            if programs_only:
                planned = plan_check(seed, kind, None, count, (REPLY_VOICE.id,))
            else:
                planned = plan_check(seed, kind, natural_texts(), count)
            write_planned(folder / f"valid-{kind}", [(0, planned)], count, workers)


def write_planned(folder: Path, planned: Iterable[tuple[int, list[PlannedClip]]], total: int, workers: int) -> None:
    """Render whole shards, `total` clips, one after another by the same processes.

    Clips shorter or longer than `LENGTH_S` are left out. Chunks end with their shard, so that a shard does not depend
    on the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting: list[tuple[int, list[PlannedClip]]] = []

    def chunks() -> Iterator[list[Request]]:
        for shard, clips in planned:
            waiting.append((shard, clips))
            yield from chunked(clip.request for clip in clips)

    rendered = render_chunks(chunks(), workers)
    with tqdm(total=total, desc=folder.name, unit="clip", mininterval=1.0) as bar:
        for first in rendered:
            shard, clips = waiting.pop(0)
            samples = chain([first], islice(rendered, len(clips) - 1))
            ids = (f"{folder.name}-{shard:05d}-{index:06d}" for index in range(len(clips)))
            with _Shard(folder, shard) as files:
                for clip_id, clip, wave in zip(ids, clips, samples, strict=True):
                    if LENGTH_S[0] <= wave.size / SAMPLE_RATE <= LENGTH_S[1]:
                        files.add(clip_id, clip, wave)
                    bar.update()


def write_dialogues(folder: Path, num_exchanges: int, seed: int, workers: int, programs_only: bool = False) -> None:
    """Render the training dialogues, shard by shard."""
    size = min(SHARD_EXCHANGES, num_exchanges)
    speaker, reply_voice = _speaking(programs_only)
    for shard in range(-(-num_exchanges // size)):
        if not _complete(folder, shard):
            planned = plan_dialogues(seed, shard, size, speaker, reply_voice)
            write_dialogue_shard(folder, shard, planned, workers, "dialogue")


def write_test(folder: Path, num_exchanges: int, seed: int, workers: int, programs_only: bool = False) -> None:
    """Render the test set, once, from its own seed, as one shard."""
    if not _complete(folder, 0):
        splits = TEST_SPLITS[:2] if programs_only else TEST_SPLITS
        planned = plan_test(seed, num_exchanges, *_speaking(programs_only), splits)
        write_dialogue_shard(folder, 0, planned, workers, "test")


def _speaking(programs_only: bool) -> tuple[DrawSpeaker, str]:
    """Who asks, and the voice of the replies."""
    if programs_only:
        return program_speaker, REPLY_VOICE.id
    return natural_speaker, NATURAL_REPLY_VOICE.id


def write_dialogue_shard(folder: Path, shard: int, planned: list[PlannedDialogue], workers: int, prefix: str) -> None:
    """Render the clips of the dialogues and write both tables of the shard."""
    folder.mkdir(parents=True, exist_ok=True)
    known = _rendered_replies(folder, shard)
    clips: list[tuple[str, PlannedClip]] = []
    lines = []
    for index, one in enumerate(planned):
        turns: list[dict[str, object]] = []
        for turn, user, reply in zip(one.dialogue.exchanges, one.users, one.replies, strict=True):
            user_id = f"{prefix}-{shard:05d}-{len(clips):06d}"
            clips.append((user_id, user))
            reply_id = known.get((turn.reply, turn.style))
            if reply_id is None:
                reply_id = known[turn.reply, turn.style] = f"{prefix}-{shard:05d}-{len(clips):06d}"
                clips.append((reply_id, reply))
            turns.append({"role": "user", "text": turn.user, "clip": [user_id], "sound": turn.sound})
            answers = list(turn.answers)
            said = {"role": "assistant", "text": turn.reply, "clip": [reply_id], "style": turn.style}
            turns.append({**said, "answers": answers})
        record = {"id": f"{prefix}-{shard:05d}-{index:05d}", "intent": one.dialogue.intent, "split": one.split}
        lines.append(json.dumps({**record, "language": "en", "turns": turns}))
    (folder / f"dialogues-{shard:05d}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    clips.sort(key=lambda one: one[1].request.voice != "joe")  # a chunk of requests without joe does not load it
    write_clips(folder, shard, clips, workers)


def write_clips(
    folder: Path, shard: int, planned: Iterable[tuple[str, PlannedClip]], workers: int, seconds: float | None = None
) -> None:
    """Render the clips of one shard, until it holds `seconds` of audio when that is given."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting: list[tuple[str, PlannedClip]] = []

    def requests() -> Iterator[Request]:
        for clip_id, clip in planned:
            waiting.append((clip_id, clip))
            yield clip.request

    total = len(planned) if isinstance(planned, list) else round(seconds or 0)
    with (
        _Shard(folder, shard) as files,
        tqdm(total=total, desc=f"clips-{shard:05d}", unit="clip" if seconds is None else "s", mininterval=1.0) as bar,
    ):
        for samples in render(requests(), workers):
            files.add(*waiting.pop(0), samples)
            bar.update(1 if seconds is None else samples.size / SAMPLE_RATE)
            if seconds is not None and files.num_samples / SAMPLE_RATE >= seconds:
                break


class _Shard:
    """The two files of a shard being written; the table gets its name when the shard is complete."""

    def __init__(self, folder: Path, shard: int) -> None:
        self._table = folder / f"clips-{shard:05d}.jsonl"
        self._lines: list[str] = []
        self.num_samples = 0

    def __enter__(self) -> _Shard:
        self._audio = self._table.with_suffix(".pcm").open("wb")
        return self

    def add(self, clip_id: str, clip: PlannedClip, samples: NDArray[np.int16]) -> None:
        """Write the samples (S,) of one clip."""
        self._lines.append(json.dumps(clip_record(clip_id, clip, self.num_samples, samples.size)) + "\n")
        self._audio.write(samples.astype("<i2").tobytes())
        self.num_samples += samples.size

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self._audio.close()
        if failure is None:
            part = self._table.with_suffix(".jsonl.part")
            part.write_text("".join(self._lines), encoding="utf-8")
            part.rename(self._table)


def clip_record(clip_id: str, planned: PlannedClip, offset: int, num_samples: int) -> dict[str, object]:
    """The line of one clip."""
    request = asdict(planned.request)
    del request["voice"]
    return {
        "id": clip_id,
        "text": request.pop("text"),
        "role": planned.role,
        "voice": planned.request.voice if planned.role == "reply" else heard_voice(planned.request),
        "language": "en",
        "style": planned.style,
        "split": planned.split,
        "intent": planned.intent,
        "sample_rate": SAMPLE_RATE,
        "offset": offset,
        "num_samples": num_samples,
        **request,
    }


def heard_voice(request: Request) -> str:
    """The voice's id, with "-warped" behind it where a natural voice is warped: it is another voice then."""
    natural = request.voice in {voice.id for voice in NATURAL_VOICES}
    return f"{request.voice}-warped" if natural and (request.pitch or request.formants != 1.0) else request.voice


def _complete(folder: Path, shard: int) -> bool:
    return (folder / f"clips-{shard:05d}.jsonl").exists()


def _rendered_replies(folder: Path, shard: int) -> dict[tuple[str, str], str]:
    """(text, style) -> clip id of the replies that the shards before this one hold."""
    known: dict[tuple[str, str], str] = {}
    for before in range(shard):
        for _, clip in read_json_lines(folder / f"clips-{before:05d}.jsonl"):
            if clip["role"] == "reply":
                known[clip["text"], clip["style"]] = clip["id"]
    return known


def main(argv: list[str] | None = None) -> None:
    """Command line of the corpus."""
    parser = argparse.ArgumentParser(prog="python -m recipes.pocket.corpus", description="Write the audio of pocket.")
    parser.add_argument("--out", type=Path, help="folder of the corpus")
    parser.add_argument("--texts", type=Path, help="write all kinds of texts of the curriculum into this file")
    parser.add_argument("--hours", type=float, default=100.0, help="of free speech, or of words with `--only words`")
    parser.add_argument(
        "--programs-only",
        action="store_true",
        help="the voices of flite, festival and espeak-ng alone; without the packages of the extra `voices`",
    )
    parser.add_argument("--turns", type=int, default=72000, help="questions in the dialogues")
    parser.add_argument("--valid-clips", type=int, default=150, help="clips of each small validation set")
    parser.add_argument("--test-turns", type=int, default=600, help="questions in the test set")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="processes that render")
    parser.add_argument("--only", choices=("free", "words", "valid", "dialogues", "test"))
    args = parser.parse_args(argv)
    if args.out is None and args.texts is None:
        parser.error("say where to write: --out FOLDER for audio, --texts FILE for texts")
    if args.texts is not None:
        args.texts.parent.mkdir(parents=True, exist_ok=True)
        args.texts.write_text("".join(f"{line}\n" for line in texts(args.seed)), encoding="utf-8")
    if args.out is not None:
        try:
            write_audio(args)
        except RuntimeError as error:  # a program or a package is missing
            parser.exit(1, f"{error}\n")


def write_audio(args: argparse.Namespace) -> None:
    """The audio that the command line asks for."""
    if args.only in (None, "test"):
        write_test(args.out / "test", args.test_turns, args.seed, args.workers, args.programs_only)
    if args.only in (None, "dialogues"):
        write_dialogues(args.out / "dialogues", args.turns, args.seed, args.workers, args.programs_only)
    if args.only in (None, "valid"):
        write_checks(args.out, args.seed, args.workers, args.valid_clips, args.programs_only)
    if args.only in (None, "free"):
        write = write_free if args.programs_only else write_natural
        write(args.out / "free", args.hours, args.seed, args.workers)
    if args.only == "words":
        write = write_free if args.programs_only else write_words
        write(args.out / "words", args.hours, args.seed, args.workers)


if __name__ == "__main__":
    main()
