"""Token corpora: speech and text as ids of the joint vocabulary, in parquet shards with a manifest.

    manifest.json            counts, and the hashes of the speech tokenizer and the vocabulary that made the ids
    <name>.parquet           one sample a row: {id, task, split, intent, answers, turns: [{role, modality, ids,
                             transcript, loss, language, voice, style}]}

A sample is a spoken dialogue (`task` "chat"), one clip with its transcript ("clip"), a written text or dialogue
("text"), or a text with spoken spans ("document"). The modality of a turn tells whether its ids are text, speech, or
both in the runs of a reply. `transcript` holds the text ids of a turn of pure speech. The whole corpus is read at once
into flat arrays: an hour of speech is 45000 numbers.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from duologue.config import parse_config, read_json, to_mapping, write_json
from duologue.language.backbone import Provenance
from duologue.turns import Modality, Role, Turn

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
Task = Literal["chat", "clip", "text", "document"]

TURN_TYPE = pa.struct(
    [
        ("role", pa.string()),
        ("modality", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("transcript", pa.list_(pa.int32())),
        ("loss", pa.bool_()),
        ("language", pa.string()),
        ("voice", pa.string()),
        ("style", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("intent", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("turns", pa.list_(TURN_TYPE)),
    ]
)


@dataclass(frozen=True)
class LabeledTurn:
    """One turn of a sample.

    Attributes:
        transcript: text ids of a turn of pure speech; empty where it is unknown or nothing is said.
        loss: whether a model may be trained to say this turn.
    """

    turn: Turn
    transcript: tuple[int, ...] = ()
    loss: bool = True


@dataclass(frozen=True)
class CorpusSample:
    """One row. `answers` are the accepted normalized answers of the last reply."""

    id: str
    task: Task
    split: str
    intent: str
    turns: tuple[LabeledTurn, ...]
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """What a corpus holds: samples by task, by split and by shard, and ids by kind.

    Attributes:
        siblings: the provenance, under the key of the corpus files.
    """

    siblings: Provenance
    num_samples: int
    num_text_tokens: int
    num_speech_tokens: int
    tasks: dict[str, int]
    splits: dict[str, int]
    shards: dict[str, int]
    version: int = FORMAT_VERSION


def write_shard(
    folder: str | Path, name: str, samples: Iterable[CorpusSample], provenance: Provenance, speech_offset: int
) -> None:
    """Writes `<name>.parquet` atomically. For the counts, ids from `speech_offset` on are speech."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(sample) for sample in samples]
    num_ids = num_speech = 0
    for row in rows:
        for turn in row["turns"]:
            num_ids += len(turn["ids"])
            num_speech += sum(token >= speech_offset for token in turn["ids"])
    counts = {
        "num_samples": len(rows),
        "num_text_tokens": num_ids - num_speech,
        "num_speech_tokens": num_speech,
        "tasks": dict(Counter(row["task"] for row in rows)),
        "splits": dict(Counter(row["split"] for row in rows)),
    }
    about = {"siblings": asdict(provenance), "counts": counts}
    table = pa.Table.from_pylist(rows, SCHEMA.with_metadata({"duologue": json.dumps(about)}))
    part = folder / f"{name}.{os.getpid()}.part"  # a worker that is thought dead may still write
    pq.write_table(table, part, compression="zstd")
    part.rename(folder / f"{name}.parquet")


def complete_shard(
    folder: str | Path,
    name: str,
    samples: Callable[[], Iterable[CorpusSample]],
    provenance: Provenance,
    speech_offset: int,
) -> None:
    """Writes a shard as `write_shard` unless it exists.

    Raises:
        ValueError: the existing one was made with another tokenizer or vocabulary.
    """
    path = Path(folder) / f"{name}.parquet"
    if path.exists():
        read_provenance(path).check(provenance, str(path), "this run")
    else:
        write_shard(folder, name, samples(), provenance, speech_offset)


def write_manifest(folder: str | Path, provenance: Provenance) -> Manifest:
    """Counts what the shards of a folder hold and writes the manifest.

    Raises:
        ValueError: there is no shard, or one was made with another tokenizer or vocabulary.
    """
    folder = Path(folder)
    total: Counter[str] = Counter()
    tasks: Counter[str] = Counter()
    splits: Counter[str] = Counter()
    shards: dict[str, int] = {}
    for path in sorted(folder.glob("*.parquet")):
        made_with, counts = _about(path)
        made_with.check(provenance, str(path), "this run")
        total.update({name: counts[name] for name in ("num_samples", "num_text_tokens", "num_speech_tokens")})
        tasks.update(counts["tasks"])
        splits.update(counts["splits"])
        shards[path.stem] = counts["num_samples"]
    if not shards:
        raise ValueError(f"{folder} holds no shards of a token corpus")
    manifest = Manifest(
        provenance,
        total["num_samples"],
        total["num_text_tokens"],
        total["num_speech_tokens"],
        dict(sorted(tasks.items())),
        dict(sorted(splits.items())),
        shards,
    )
    write_json(folder / MANIFEST_FILE, to_mapping(manifest))
    return manifest


def read_provenance(shard: Path) -> Provenance:
    """The tokenizer and vocabulary that made one shard."""
    return _about(shard)[0]


def read_manifest(folder: str | Path) -> Manifest:
    """Raises ValueError when the folder is no token corpus or of another version."""
    path = Path(folder) / MANIFEST_FILE
    manifest = parse_config(Manifest, read_json(path), str(path))
    if manifest.version != FORMAT_VERSION:
        raise ValueError(f"{path} is of version {manifest.version}; this program reads version {FORMAT_VERSION}")
    return manifest


class TokenCorpus:
    """The samples of a corpus folder that belong to the given splits and tasks.

    Args:
        provenance: of the model to train, where one exists.

    Raises:
        ValueError: the folder is no token corpus, was made with another tokenizer or vocabulary, lacks a shard that its
            manifest names, or holds nothing of these splits and tasks.
    """

    def __init__(
        self,
        folder: str | Path,
        provenance: Provenance | None = None,
        splits: Collection[str] | None = None,
        tasks: Collection[Task] | None = None,
    ) -> None:
        folder = Path(folder)
        self.manifest = read_manifest(folder)
        if provenance is not None:
            self.manifest.siblings.check(provenance, f"the corpus {folder}", "the model")
        tables = []
        for name, num_samples in self.manifest.shards.items():
            path = folder / f"{name}.parquet"
            if not path.exists():
                raise ValueError(f"{path} is missing, which {MANIFEST_FILE} names")
            table = pq.read_table(path, schema=SCHEMA)
            if len(table) != num_samples:
                raise ValueError(f"{path} holds {len(table)} samples where {MANIFEST_FILE} names {num_samples}")
            tables.append(table)
        table = pa.concat_tables(tables)
        for column, wanted in (("split", splits), ("task", tasks)):
            if wanted is not None:
                table = table.filter(pc.is_in(table[column], pa.array(sorted(wanted))))
        if not len(table):
            raise ValueError(f"{folder} holds no samples of splits {splits} and tasks {tasks}")
        self._head = {name: table[name].to_pylist() for name in ("id", "task", "split", "intent", "answers")}
        # One flat array per kind, with the offset of each sample and turn.
        turns = pa.concat_arrays(table["turns"].chunks)
        self._turn_at = turns.offsets.to_numpy()
        fields = turns.values
        self._words = {
            name: fields.field(name).to_pylist() for name in ("role", "modality", "loss", "language", "voice", "style")
        }
        self._ids = _flat(fields.field("ids"))
        self._transcripts = _flat(fields.field("transcript"))

    def __len__(self) -> int:
        return len(self._head["id"])

    def __getitem__(self, index: int) -> CorpusSample:
        turns = tuple(self._labeled(turn) for turn in range(self._turn_at[index], self._turn_at[index + 1]))
        head = {name: column[index] for name, column in self._head.items()}
        return CorpusSample(**{**head, "turns": turns, "answers": tuple(head["answers"])})

    def __iter__(self) -> Iterator[CorpusSample]:
        return (self[index] for index in range(len(self)))

    def where(self, column: Literal["id", "task", "split", "intent"], value: str) -> NDArray[np.int64]:
        """Indices of the samples with this value."""
        return np.flatnonzero(np.array(self._head[column]) == value)

    def transcribed(self, indices: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the first turn of each of these samples has a transcript."""
        offsets, _ = self._transcripts
        first = self._turn_at[indices]
        return np.asarray(offsets[first + 1] > offsets[first])

    def num_turns(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Turns of each of these samples."""
        return np.asarray(self._turn_at[indices + 1] - self._turn_at[indices], np.int64)

    def first_role(self, indices: NDArray[np.int64]) -> NDArray[np.str_]:
        """Role of the first turn of each of these samples."""
        return np.array([self._words["role"][turn] for turn in self._turn_at[indices]], dtype=np.str_)

    def _labeled(self, turn: int) -> LabeledTurn:
        words = {name: column[turn] for name, column in self._words.items()}
        made = Turn(
            Role(words["role"]),
            Modality(words["modality"]),
            _slice(self._ids, turn),
            words["language"],
            words["voice"],
            words["style"],
        )
        return LabeledTurn(made, _slice(self._transcripts, turn), words["loss"])


def _row(sample: CorpusSample) -> dict[str, Any]:
    turns = [
        {
            "role": str(labeled.turn.role),
            "modality": str(labeled.turn.modality),
            "ids": labeled.turn.ids,
            "transcript": labeled.transcript,
            "loss": labeled.loss,
            "language": labeled.turn.language,
            "voice": labeled.turn.voice,
            "style": labeled.turn.style,
        }
        for labeled in sample.turns
    ]
    head = {name: getattr(sample, name) for name in ("id", "task", "split", "intent", "answers")}
    return {**head, "turns": turns}


def _about(path: Path) -> tuple[Provenance, dict[str, Any]]:
    """Hashes and counts in the metadata of a shard."""
    data = json.loads((pq.read_schema(path).metadata or {}).get(b"duologue", b"{}"))
    if "siblings" not in data or "counts" not in data:
        raise ValueError(f"{path} is no shard of a token corpus")
    return parse_config(Provenance, data["siblings"], str(path)), data["counts"]


def _flat(lists: pa.ListArray) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    return lists.offsets.to_numpy(), lists.values.to_numpy()


def _slice(flat: tuple[NDArray[np.int32], NDArray[np.int32]], index: int) -> tuple[int, ...]:
    offsets, values = flat
    return tuple(values[offsets[index] : offsets[index + 1]].tolist())
