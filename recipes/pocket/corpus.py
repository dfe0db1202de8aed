"""Writes the audio of the pocket recipe: free speech, dialogues and the test set.

Under `--out` there is one folder for each: `free`, `dialogues`, `test`. A folder holds shards, read in the order of
their names:

- `clips-00000.jsonl`: one clip a line {id, text, role, voice, language, style, split, intent, sample_rate, offset,
  num_samples, rate, pitch, level, seed}
- `clips-00000.pcm`: flat int16 little endian mono at 16 kHz; `offset` and `num_samples` count samples in it
- `dialogues-00000.jsonl` (not in `free`): one dialogue a line {id, intent, split, language, turns: [{role, text, clip:
  [ids of its renditions], style, sound, answers}]}; user and assistant take turns. A reply text in a style is rendered
  once for the whole folder, so its clip may lie in an earlier shard.

Clips are levelled to -23 dBFS RMS; rooms, noise and most of the variation of level belong to the training.
Every shard is a pure function of the seed, its number and the shards before it, and has its `clips-*.jsonl` only when
it is complete: a stopped run goes on where it was when the same command is given again.

    python -m recipes.pocket.corpus --out FOLDER --hours 26 --turns 72000 --seed 1 --workers 2 [--only free]
    python -m recipes.pocket.corpus --texts FILE
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from recipes.pocket.everything import texts
from recipes.pocket.plans import PlannedClip, PlannedDialogue, plan_dialogues, plan_free, plan_test
from recipes.pocket.synthesis import SAMPLE_RATE, Request, render

SHARD_HOURS = 1.0
SHARD_EXCHANGES = 2000


def write_free(folder: Path, hours: float, seed: int, workers: int) -> None:
    """Render free speech until the folder holds `hours` of it."""
    for shard in range(max(1, round(hours / SHARD_HOURS))):
        if not _complete(folder, shard):
            seconds = min(SHARD_HOURS, hours) * 3600
            ids = (f"free-{shard:05d}-{index:06d}" for index in range(10**6))
            write_clips(folder, shard, zip(ids, plan_free(seed, shard), strict=False), workers, seconds)


def write_dialogues(folder: Path, num_exchanges: int, seed: int, workers: int) -> None:
    """Render the training dialogues, shard by shard."""
    size = min(SHARD_EXCHANGES, num_exchanges)
    for shard in range(-(-num_exchanges // size)):
        if not _complete(folder, shard):
            write_dialogue_shard(folder, shard, plan_dialogues(seed, shard, size), workers, "dialogue")


def write_test(folder: Path, num_exchanges: int, seed: int, workers: int) -> None:
    """Render the test set, once, from its own seed, as one shard."""
    if not _complete(folder, 0):
        write_dialogue_shard(folder, 0, plan_test(seed, num_exchanges), workers, "test")


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
    write_clips(folder, shard, clips, workers)


def write_clips(
    folder: Path, shard: int, planned: Iterable[tuple[str, PlannedClip]], workers: int, seconds: float | None = None
) -> None:
    """Render the clips of one shard, until it holds `seconds` of audio when that is given."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"clips-{shard:05d}"
    part = folder / f"{name}.jsonl.part"
    waiting: list[tuple[str, PlannedClip]] = []

    def requests() -> Iterator[Request]:
        for clip_id, clip in planned:
            waiting.append((clip_id, clip))
            yield clip.request

    total = len(planned) if isinstance(planned, list) else round(seconds or 0)
    offset = 0
    with (
        part.open("w", encoding="utf-8") as table,
        (folder / f"{name}.pcm").open("wb") as audio,
        tqdm(total=total, desc=name, unit="clip" if seconds is None else "s", mininterval=1.0) as bar,
    ):
        for samples in render(requests(), workers):
            clip_id, clip = waiting.pop(0)
            table.write(json.dumps(clip_record(clip_id, clip, offset, samples.size)) + "\n")
            audio.write(samples.astype("<i2").tobytes())
            offset += samples.size
            bar.update(1 if seconds is None else samples.size / SAMPLE_RATE)
            if seconds is not None and offset / SAMPLE_RATE >= seconds:
                break
    part.rename(folder / f"{name}.jsonl")


def clip_record(clip_id: str, planned: PlannedClip, offset: int, num_samples: int) -> dict[str, object]:
    """The line of one clip."""
    request = asdict(planned.request)
    return {
        "id": clip_id,
        "text": request.pop("text"),
        "role": planned.role,
        "voice": request.pop("voice"),
        "language": "en",
        "style": planned.style,
        "split": planned.split,
        "intent": planned.intent,
        "sample_rate": SAMPLE_RATE,
        "offset": offset,
        "num_samples": num_samples,
        **request,
    }


def _complete(folder: Path, shard: int) -> bool:
    return (folder / f"clips-{shard:05d}.jsonl").exists()


def _rendered_replies(folder: Path, shard: int) -> dict[tuple[str, str], str]:
    """(text, style) -> clip id of the replies that the shards before this one hold."""
    known: dict[tuple[str, str], str] = {}
    for before in range(shard):
        for line in (folder / f"clips-{before:05d}.jsonl").read_text(encoding="utf-8").splitlines():
            clip = json.loads(line)
            if clip["role"] == "reply":
                known[clip["text"], clip["style"]] = clip["id"]
    return known


def main(argv: list[str] | None = None) -> None:
    """Command line of the corpus."""
    parser = argparse.ArgumentParser(prog="python -m recipes.pocket.corpus", description="Write the audio of pocket.")
    parser.add_argument("--out", type=Path, help="folder of the corpus")
    parser.add_argument("--texts", type=Path, help="write all kinds of texts of the curriculum into this file")
    parser.add_argument("--hours", type=float, default=26.0, help="of free speech")
    parser.add_argument("--turns", type=int, default=72000, help="questions in the dialogues")
    parser.add_argument("--test-turns", type=int, default=600, help="questions in the test set")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="processes that render")
    parser.add_argument("--only", choices=("free", "dialogues", "test"))
    args = parser.parse_args(argv)
    if args.out is None and args.texts is None:
        parser.error("say where to write: --out FOLDER for audio, --texts FILE for texts")
    if args.texts is not None:
        args.texts.parent.mkdir(parents=True, exist_ok=True)
        args.texts.write_text("".join(f"{line}\n" for line in texts(args.seed)), encoding="utf-8")
    if args.out is not None:
        if args.only in (None, "test"):
            write_test(args.out / "test", args.test_turns, args.seed, args.workers)
        if args.only in (None, "dialogues"):
            write_dialogues(args.out / "dialogues", args.turns, args.seed, args.workers)
        if args.only in (None, "free"):
            write_free(args.out / "free", args.hours, args.seed, args.workers)


if __name__ == "__main__":
    main()
