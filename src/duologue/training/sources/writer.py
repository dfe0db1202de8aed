"""Writes an audio corpus from a source, shard by shard.

    import.json            kind, options, number of items done and counts; replaced when a shard is complete
    clips-00000.jsonl      one clip a line, see `training/data.py`
    clips-00000.pcm        int16, little endian, mono, at `SAMPLE_RATE`
    dialogues-00000.jsonl  one dialogue a line {id, intent, split, language, turns: [{role, text, clip}]}
    skipped-00000.jsonl    one item a line {id, reason}

A stopped import goes on behind its last complete shard: items come in the same order, and a digest of their ids shows
whether the source is still the same. New items at the end of a source are imported by the same command.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from duologue.config import load_config, to_mapping, write_json
from duologue.pcm import to_int16
from duologue.training.data import Clip
from duologue.training.sources import KINDS
from duologue.training.sources.items import SAMPLE_RATE, Dialogue, ImportOptions, Source, SourceItem, Utterance, Wav

STATE = "import.json"
_SPLITS = {"validation": "valid", "valid": "valid", "val": "valid", "dev": "valid", "test": "test"}
_FILES = ("clips-*.jsonl", "clips-*.pcm", "dialogues-*.jsonl", "skipped-*.jsonl")


@dataclass
class Imported:
    """What an import did so far; the content of import.json.

    Attributes:
        options: those that change what is written.
        digest: of the ids of the items done.
        skipped: reason -> number of items.
        left_out: column or file that is not used -> the reason.
    """

    kind: str
    options: dict[str, Any]
    digest: str = ""
    num_items: int = 0
    num_shards: int = 0
    num_clips: int = 0
    num_dialogues: int = 0
    num_samples: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def hours(self) -> float:
        return self.num_samples / SAMPLE_RATE / 3600


def open_source(kind: str, path: Path, options: ImportOptions) -> Source:
    """Opens a source of a kind in `KINDS`.

    Raises:
        ValueError: unknown kind, or the source is missing or of another layout.
        ImportError: the library of that kind is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r}; the kinds are {', '.join(KINDS)}")
    module, name = KINDS[kind][0].split(".")
    source: Source = getattr(importlib.import_module(f"duologue.training.sources.{module}"), name)(path, options)
    return source


def import_source(
    kind: str,
    path: str | Path,
    folder: str | Path,
    options: ImportOptions | None = None,
    valid_share: float = 0.02,
    shard_s: float = 3600.0,
    shard_items: int = 5000,
    workers: int = 2,
) -> Imported:
    """Makes or completes the audio corpus of a source.

    Args:
        valid_share: share of the items that become the split "valid", by a hash of their ids. Splits of the source that
            are for validation or test stay.
        shard_s, shard_items: a shard is complete with this much sound or this number of items.
        workers: threads that decode.

    Raises:
        ValueError: as `open_source`. Or the folder holds another corpus, or the source has changed.
        ImportError: the library of that kind is not installed.
    """
    options = options or ImportOptions()
    folder = Path(folder)
    kept = {**to_mapping(options), "valid_share": valid_share}
    del kept["audio_root"]
    done = _begin(folder, Imported(kind, kept))
    source = open_source(kind, Path(path), options)
    ids: set[str] = set()
    order = blake2b(digest_size=16)
    items = iter(source)
    for item in islice(items, done.num_items):
        order.update(item.id.encode() + b"\0")
        ids.add(_plain(item.id))
    if done.num_items and order.hexdigest() != done.digest:
        raise ValueError(f"{path} has changed since {folder} was begun; import it into a new folder")
    with tqdm(total=source.total, initial=done.num_items, desc=kind, unit="item", mininterval=1.0) as bar:
        shard = _Shard(folder, done, options, valid_share)
        for item, future in _read_ahead(items, workers):
            order.update(item.id.encode() + b"\0")
            name = _plain(item.id)
            try:
                if name in ids:
                    raise ValueError("the id came before")
                shard.add(name, item.split, future.result())
            except ValueError as error:
                shard.skip(item.id, str(error))
            ids.add(name)
            bar.update()
            if shard.num_samples >= shard_s * SAMPLE_RATE or shard.num_items >= shard_items:
                done = shard.close(order.hexdigest(), source.left_out)
                bar.set_postfix(hours=f"{done.hours:.1f}", skipped=sum(done.skipped.values()))
                shard = _Shard(folder, done, options, valid_share)
        return shard.close(order.hexdigest(), source.left_out)


def _begin(folder: Path, new: Imported) -> Imported:
    """The state of the corpus in a folder; files behind its last complete shard are removed."""
    if not (folder / STATE).is_file():
        if any(folder.glob("clips*.jsonl")) or any(folder.glob("dialogues*.jsonl")):
            raise ValueError(f"{folder} holds a corpus that was not imported; name a new folder")
        write_json(folder / STATE, asdict(new))
        return new
    done = load_config(folder / STATE, Imported)
    if (done.kind, done.options) != (new.kind, json.loads(json.dumps(new.options))):
        raise ValueError(f"{folder} was imported as {done.kind} with {done.options}; name a new folder")
    for pattern in _FILES:
        for file in folder.glob(pattern):
            if int(file.stem.rpartition("-")[2]) >= done.num_shards:
                file.unlink()
    return done


class _Shard:
    """The files of one shard, in memory but for the samples."""

    def __init__(self, folder: Path, done: Imported, options: ImportOptions, valid_share: float) -> None:
        self._folder, self._done, self._options, self._valid_share = folder, done, options, valid_share
        self._clips: list[dict[str, Any]] = []
        self._dialogues: list[dict[str, Any]] = []
        self._skipped: list[dict[str, str]] = []
        self.num_samples = self.num_items = 0

    def add(self, name: str, split: str, read: Utterance | Dialogue) -> None:
        """Adds one item; its samples are written at once."""
        split = _SPLITS.get(split) or ("valid" if _share(name) < self._valid_share else "train")
        language = read.language or self._options.language
        if isinstance(read, Utterance):
            self._add_clip(name, read.text, read.wav, self._options.role, read.voice, language, split)
        else:
            turns: list[dict[str, Any]] = []
            for number, turn in enumerate(read.turns):
                clip = f"{name}.{number:02d}"
                turns.append({"role": turn.role, "text": turn.text})
                if turn.wav is not None:
                    role = "reply" if turn.role == "assistant" else "user"
                    self._add_clip(clip, turn.text, turn.wav, role, turn.voice, language, split)
                    turns[-1]["clip"] = [clip]
            row = {"id": name, "intent": self._done.kind, "split": split, "language": language, "turns": turns}
            self._dialogues.append(row)
        self.num_items += 1

    def skip(self, name: str, reason: str) -> None:
        """Notes that an item is not imported."""
        self._skipped.append({"id": name, "reason": " ".join(reason.split())})
        self.num_items += 1

    def close(self, digest: str, left_out: dict[str, str]) -> Imported:
        """Writes the tables, and the state last: what it does not name is written again."""
        if not self.num_items:
            return self._done
        for name, rows in (("dialogues", self._dialogues), ("skipped", self._skipped), ("clips", self._clips)):
            if rows:
                path = self._path(name, "jsonl")
                part = path.with_suffix(".part")
                part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
                part.replace(path)
        done = self._done
        reasons = Counter(done.skipped) + Counter(_kind_of(row["reason"]) for row in self._skipped)
        state = Imported(
            done.kind,
            done.options,
            digest,
            done.num_items + self.num_items,
            done.num_shards + 1,
            done.num_clips + len(self._clips),
            done.num_dialogues + len(self._dialogues),
            done.num_samples + self.num_samples,
            dict(reasons.most_common()),
            {**done.left_out, **left_out},
        )
        write_json(self._folder / STATE, asdict(state))
        return state

    def _add_clip(self, name: str, text: str, wav: Wav, role: str, voice: str, language: str, split: str) -> None:
        clip = Clip(
            id=name,
            text=text,
            role=role,
            voice=voice or self._options.voice,
            language=language,
            style="",
            split=split,
            intent=self._done.kind,
            sample_rate=SAMPLE_RATE,
            offset=self.num_samples,
            num_samples=len(wav),
        )
        with self._path("clips", "pcm").open("ab") as file:
            file.write(to_int16(wav).tobytes())
        self._clips.append(asdict(clip))
        self.num_samples += len(wav)

    def _path(self, name: str, suffix: str) -> Path:
        return self._folder / f"{name}-{self._done.num_shards:05d}.{suffix}"


def _read_ahead(items: Iterable[SourceItem], workers: int) -> Iterator[tuple[SourceItem, Future[Utterance | Dialogue]]]:
    """The items in order, each with its content, which threads decode ahead."""
    waiting: deque[tuple[SourceItem, Future[Utterance | Dialogue]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            waiting.append((item, pool.submit(item.read)))
            if len(waiting) > 4 * workers:
                yield waiting.popleft()
        yield from waiting


def _plain(name: str) -> str:
    """The id without the mark of variants and renditions in a token corpus."""
    return name.replace("#", "_")


def _share(name: str) -> float:
    """A number in [0, 1) that depends on the id alone."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


def _kind_of(reason: str) -> str:
    """The reason without what belongs to one file."""
    return reason.partition(":")[0].partition(" (")[0]
