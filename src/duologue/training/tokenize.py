"""Step `tokens`: an audio corpus becomes a token corpus, by a frozen speech tokenizer and the vocabulary.

Every shard of clips becomes a shard of samples of one turn. Every table of dialogues becomes a shard of chat samples
made of those clips, or of written ones where nothing is spoken. Text files become a shard of written samples. Existing
shards are kept, so a stopped run resumes. Ids are computed in float32, as in a conversation. The shards of clips may be
spread over a Ray cluster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from duologue.augmentation import AugmentConfig, augment
from duologue.checkpoint import file_hash, load_component
from duologue.config import read_json_lines, read_lines
from duologue.cuda import set_float32_precision
from duologue.interleave import weave
from duologue.language.backbone import Provenance
from duologue.layers import Padded
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from duologue.training.cluster import run_jobs, with_absolute_paths
from duologue.training.corpus import (
    CorpusSample,
    LabeledTurn,
    Manifest,
    Task,
    complete_shard,
    write_manifest,
)
from duologue.training.data import Clip, Clips, Wav
from duologue.turns import Modality, Role, Turn
from duologue.vocabulary import Vocabulary


@dataclass(frozen=True)
class TokensRecipe:
    """Recipe of the step `tokens`.

    Attributes:
        corpora: folders of clips and, where they have them, dialogues; the folder names differ.
        texts: files with one text per line.
        tokenizer, vocabulary: folders of the frozen speech tokenizer and of the vocabulary.
        out: folder of the token corpus.
        splits: clips and dialogues of other splits are left out.
        variants: number of augmented variants of each clip of a user, with another room, noise and level each. Replies
            have one, without augmentation.
        clean_probability: share of the user's clips without augmentation.
        batch_s: seconds of sound in a batch.
    """

    corpora: tuple[str, ...]
    tokenizer: str
    vocabulary: str
    out: str
    texts: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train", "valid")
    variants: int = 1
    clean_probability: float = 0.3
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    batch_s: float = 160.0
    seed: int = 1

    def __post_init__(self) -> None:
        names = [Path(folder).name for folder in self.corpora]
        if len(set(names)) < len(names):
            raise ValueError(f"corpora must be folders with names of their own, got {', '.join(names)}")
        if self.variants < 1:
            raise ValueError(f"variants must be at least 1, got {self.variants}")


def run_tokens(recipe: TokensRecipe, device: str = "cpu", ray: str = "") -> Manifest:
    """Makes or completes the token corpus of a recipe.

    Args:
        device: of the tokenizer. On CUDA its codes are those of the CPU, up to rounding: TF32 is off.
        ray: address of the Ray cluster whose workers tokenize the clips, see `cluster.run_jobs`; empty for none.

    Raises:
        ValueError: a folder is missing or of another kind; the codebook of the vocabulary is not the tokenizer's. Or
            the existing corpus was made with another tokenizer or vocabulary.
        RuntimeError: as `cluster.run_jobs`.
    """
    if ray:
        recipe = with_absolute_paths(recipe, "corpora", "tokenizer", "vocabulary", "out", "texts")
    _open_parts.cache_clear()  # the folders may hold other parts than at the last run
    _, vocabulary, provenance = _open_parts(recipe.tokenizer, recipe.vocabulary, "cpu" if ray else device)
    corpora = [_shards(Path(folder)) for folder in recipe.corpora]
    write = partial(_write_clips, recipe=recipe, device=device)
    clips = [shard for shards, _ in corpora for shard in shards]
    run_jobs(write, clips, ray, device, "tokens")
    for shards, tables in corpora:
        spoken = _Spoken([Path(recipe.out) / f"{_name(shard)}.parquet" for shard in shards])
        for table in tables:
            samples = partial(_dialogues, table, spoken, vocabulary, recipe)
            complete_shard(recipe.out, _name(table), samples, provenance, vocabulary.speech_offset)
    for file in map(Path, recipe.texts):
        texts = partial(_texts, file, vocabulary)
        complete_shard(recipe.out, f"text-{file.stem}", texts, provenance, vocabulary.speech_offset)
    return write_manifest(recipe.out, provenance)


def _shards(folder: Path) -> tuple[list[Path], list[Path]]:
    """The shards of clips and the tables of dialogues in a folder."""
    clips, tables = sorted(folder.glob("clips*.jsonl")), sorted(folder.glob("dialogues*.jsonl"))
    if not clips and not tables:
        raise ValueError(f"{folder} holds no clips*.jsonl and no dialogues*.jsonl, so it is no corpus")
    return clips, tables


@lru_cache(maxsize=1)  # a worker of a cluster opens them once for all its shards
def _open_parts(tokenizer: str, vocabulary: str, device: str) -> tuple[SpeechTokenizer, Vocabulary, Provenance]:
    set_float32_precision(device)
    model = load_component(tokenizer, SpeechTokenizer, SpeechTokenizerConfig).to(device)
    words = Vocabulary.load(vocabulary)
    if (codes := model.config.quantizer.codebook_size) != words.codebook_size:
        raise ValueError(f"{tokenizer} has {codes} speech tokens, {vocabulary} is made for {words.codebook_size}")
    return model, words, Provenance(file_hash(tokenizer), words.hash)


def _name(shard: Path) -> str:
    return f"{shard.parent.name}-{shard.stem}"


def _write_clips(shard: Path, recipe: TokensRecipe, device: str) -> None:
    """Tokenizes one shard of clips unless its result exists."""
    tokenizer, vocabulary, provenance = _open_parts(recipe.tokenizer, recipe.vocabulary, device)
    samples = partial(_clips, shard, tokenizer, vocabulary, recipe)
    complete_shard(recipe.out, _name(shard), samples, provenance, vocabulary.speech_offset)


def _clips(shard: Path, tokenizer: SpeechTokenizer, vocabulary: Vocabulary, recipe: TokensRecipe) -> list[CorpusSample]:
    """The clips of one shard as samples of one turn; ids of variants after the first end in "#1", "#2"."""
    clips = Clips(shard.parent, splits=recipe.splits, shards=shard.stem)
    todo = [
        (index, variant)
        for index, clip in enumerate(clips.records)
        for variant in range(1 if clip.role == "reply" else recipe.variants)
    ]
    todo.sort(key=lambda one: clips.records[one[0]].num_samples)
    found: dict[tuple[int, int], list[int]] = {}
    device = tokenizer.quantizer.codebook.weight.device
    with torch.inference_mode(), tqdm(total=len(todo), desc=shard.stem, unit="clip", mininterval=5.0) as bar:
        for batch, wav in _ahead(todo, clips, recipe):
            rows = tokenizer(Padded(wav.values.to(device), wav.lengths.to(device))).rows()
            found.update({key: row.tolist() for key, row in zip(batch, rows, strict=True)})
            bar.update(len(batch))
    samples = []
    for (index, variant), codes in sorted(found.items()):
        clip = clips.records[index]
        role = Role.ASSISTANT if clip.role == "reply" else Role.USER
        ids = tuple(vocabulary.speech_ids(codes))
        turn = Turn(role, Modality.SPEECH, ids, clip.language, clip.voice, clip.style)
        name = f"{clip.id}#{variant}" if variant else clip.id
        labeled = LabeledTurn(turn, tuple(vocabulary.encode_text(clip.text)))
        samples.append(CorpusSample(name, "clip", clip.split, clip.intent, (labeled,)))
    return samples


def _ahead(
    todo: list[tuple[int, int]], clips: Clips, recipe: TokensRecipe
) -> Iterator[tuple[list[tuple[int, int]], Padded]]:
    """Batches of similar lengths of `batch_s` seconds with padding; the next one is prepared while one is in use."""
    batches: list[list[tuple[int, int]]] = [[]]
    for one in todo:  # sorted by length, so the new one is the longest
        clip = clips.records[one[0]]
        if batches[-1] and (len(batches[-1]) + 1) * clip.num_samples > recipe.batch_s * clip.sample_rate:
            batches.append([])
        batches[-1].append(one)

    def load(batch: list[tuple[int, int]]) -> Padded:
        return Padded.stack([torch.from_numpy(_heard(clips, *one, recipe)) for one in batch])

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(load, batches[0])
        for batch, following in zip(batches, [*batches[1:], []], strict=True):
            wav = coming.result()
            if following:
                coming = pool.submit(load, following)
            yield batch, wav


def _heard(clips: Clips, index: int, variant: int, recipe: TokensRecipe) -> Wav:
    """One augmented clip: a pure function of the clip's id, the variant and the seed."""
    clip: Clip = clips.records[index]
    wav = clips.wav(index)
    if clip.role == "reply":
        return wav
    digest = blake2b(f"{recipe.seed}|{clip.id}|{variant}".encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "big"))
    if rng.random() < recipe.clean_probability:
        return wav
    return augment(wav, clip.sample_rate, recipe.augment, rng, lambda: clips.wav(int(rng.integers(len(clips)))))


class _Spoken:
    """Clips of a corpus by id, read from its shards on first access."""

    def __init__(self, shards: list[Path]) -> None:
        self._shards = shards
        self._turns: dict[str, dict[str, Any]] = {}

    def __getitem__(self, clip: str) -> dict[str, Any]:
        """The stored turn of a clip. Raises KeyError when no shard has it."""
        if not self._turns:
            for path in self._shards:
                table = pq.read_table(path, columns=["id", "turns"])
                turns = table["turns"].to_pylist()
                self._turns.update({name: row[0] for name, row in zip(table["id"].to_pylist(), turns, strict=True)})
        return self._turns[clip]

    def variants(self, clip: str) -> int:
        """Number of variants of the clip."""
        self[clip]
        count = 1
        while f"{clip}#{count}" in self._turns:
            count += 1
        return count


def _dialogues(table: Path, spoken: _Spoken, vocabulary: Vocabulary, recipe: TokensRecipe) -> list[CorpusSample]:
    """The dialogues of one table, once for each rendition and variant of its clips."""
    samples, too_fast = [], 0
    for where, row in read_json_lines(table):
        if row["split"] not in recipe.splits:
            continue
        try:
            clips = [_renditions(turn, spoken) for turn in row["turns"]]
        except KeyError as error:
            raise ValueError(f"{where} names the clip {error}, which no shard next to it holds") from None
        for rendition in range(max(1, *map(len, clips))):
            try:
                turns = tuple(
                    _labeled(turn, spoken[names[rendition % len(names)]] if names else {}, row["language"], vocabulary)
                    for turn, names in zip(row["turns"], clips, strict=True)
                )
            except _TooFast:
                too_fast += 1
                continue
            name = f"{row['id']}#{rendition}" if rendition else row["id"]
            answers = tuple(row["turns"][-1].get("answers", ()))
            task: Task = "chat" if any(clips) else "text"
            samples.append(CorpusSample(name, task, row["split"], row["intent"], turns, answers))
    if too_fast:
        print(f"{table.name}: left out {too_fast} dialogues whose speech is too fast for the interleave")
    return samples


def _renditions(turn: Mapping[str, Any], spoken: _Spoken) -> list[str]:
    """Ids of all renditions of a turn; empty for a turn that was only written."""
    return [
        f"{clip}#{variant}" if variant else clip
        for clip in turn.get("clip", ())
        for variant in range(spoken.variants(clip))
    ]


class _TooFast(ValueError):
    """A reply whose text would not stay ahead of its speech."""


def _labeled(turn: Mapping[str, Any], clip: Mapping[str, Any], language: str, vocabulary: Vocabulary) -> LabeledTurn:
    """One turn of a dialogue: a user's as speech with its transcript, a reply interleaved; text without a clip.

    A reply in a style of the vocabulary begins with the style's id.
    """
    role, text = Role(turn["role"]), vocabulary.encode_text(turn["text"])
    style = turn.get("style") or clip.get("style", "")
    if role is Role.ASSISTANT:
        text = [*vocabulary.style_ids(style), *text]
    if not clip:
        return LabeledTurn(Turn(role, Modality.TEXT, tuple(text), language, style=style))
    if role is not Role.ASSISTANT:
        return LabeledTurn(Turn(role, Modality.SPEECH, tuple(clip["ids"]), language, clip["voice"], style), tuple(text))
    try:
        woven = weave(text, clip["ids"])
    except ValueError as error:
        raise _TooFast(str(error)) from None
    return LabeledTurn(Turn(role, Modality.INTERLEAVED, tuple(woven), language, clip["voice"], style))


def _texts(file: Path, vocabulary: Vocabulary) -> list[CorpusSample]:
    """The lines of a text file as written samples."""
    turns = [Turn(Role.ASSISTANT, Modality.TEXT, tuple(vocabulary.encode_text(line))) for _, line in read_lines(file)]
    return [
        CorpusSample(f"text-{file.stem}-{number:06d}", "text", "train", "text", (LabeledTurn(turn),))
        for number, turn in enumerate(turns)
    ]
