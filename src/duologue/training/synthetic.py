"""Step `interleave`: synthetic interleaved data, text whose spans are spoken (arXiv:2411.17607, section 3.1).

Span lengths are drawn from a Poisson distribution until they cover a share of the text. A text-to-token model turns
each span into speech tokens, without sound. A document becomes a sample of alternating turns of text and speech.
Documents are read one after another, so the texts may have any size. Existing shards are kept, so a stopped run
resumes. With the folder of a token corpus as `out`, the shards join that corpus.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from duologue.config import read_json_lines, read_lines
from duologue.language.backbone import load_language, load_provenance
from duologue.language.engine import PlainEngine
from duologue.language.sampling import Sampling
from duologue.language.talker import TextToTokenTalker
from duologue.training.cluster import run_jobs, with_absolute_paths
from duologue.training.corpus import (
    CorpusSample,
    LabeledTurn,
    Manifest,
    complete_shard,
    write_manifest,
)
from duologue.turns import Modality, Role, Turn
from duologue.vocabulary import Vocabulary


@dataclass(frozen=True)
class InterleaveRecipe:
    """Recipe of the step `interleave`.

    Attributes:
        texts: files of documents: .txt with one a line, .jsonl and .parquet with one a row under `text_key`.
        text_to_token: folder of the language model of stage `text-to-token`.
        vocabulary: folder of the vocabulary that it was trained with.
        out: folder of the token corpus.
        ratio: share of the text ids that become speech.
        mean_span: mean number of text ids of a span.
        max_ids: text ids of a document; longer texts are cut into several documents.
        min_ids: shorter texts are left out.
        documents_per_shard: documents of one shard of the corpus.
        num_rows: spans that are spoken at once.
        valid_share: share of the documents that are for validation.
        sampling: of the speech; `max_tokens` is set by the length of the span.
    """

    texts: tuple[str, ...]
    text_to_token: str
    vocabulary: str
    out: str
    text_key: str = "text"
    ratio: float = 0.3
    mean_span: float = 10.0
    max_ids: int = 256
    min_ids: int = 16
    documents_per_shard: int = 1000
    num_rows: int = 16
    valid_share: float = 0.01
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.8))
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio must lie between 0 and 1, got {self.ratio}")
        if self.mean_span <= 0 or self.min_ids < 2 or self.max_ids < self.min_ids:
            raise ValueError("mean_span must be above 0, min_ids at least 2, and max_ids not below min_ids")
        stems = [Path(file).stem for file in self.texts]
        if len(set(stems)) < len(stems):
            raise ValueError(f"texts must be files with names of their own, got {', '.join(stems)}")


def run_interleave(recipe: InterleaveRecipe, device: str = "cpu", ray: str = "") -> Manifest:
    """Makes or completes the synthetic corpus of a recipe.

    Args:
        device: of the text-to-token model.
        ray: address of the Ray cluster whose workers take one file of texts each, see `cluster.run_jobs`.

    Raises:
        ValueError: a file is missing or of another kind, or no document is long enough; or the existing corpus was made
            with another tokenizer or vocabulary.
        RuntimeError: as `cluster.run_jobs`.
    """
    if ray:
        recipe = with_absolute_paths(recipe, "texts", "text_to_token", "vocabulary", "out")
    provenance = load_provenance(recipe.text_to_token)
    provenance.check(
        replace(provenance, vocabulary=Vocabulary.load(recipe.vocabulary).hash),
        recipe.text_to_token,
        f"the vocabulary {recipe.vocabulary}",
    )
    job = partial(_write_file, recipe=recipe, device=device)
    run_jobs(job, recipe.texts, ray, device, "texts")
    return write_manifest(recipe.out, provenance)


def draw_spans(num_ids: int, ratio: float, mean_span: float, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Draws the spans of a document of `num_ids` ids that become speech, as (begin, end) in order.

    They cover `ratio` of the ids, up to rounding, and at least one id of text lies between two of them. The last span
    drawn is cut to fit.
    """
    wanted = round(ratio * num_ids)
    lengths: list[int] = []
    while (missing := wanted - sum(lengths)) > 0:
        lengths.append(min(max(int(rng.poisson(mean_span)), 1), missing))
    while len(lengths) - 1 > num_ids - sum(lengths):  # no room for text between them: join two
        lengths.append(lengths.pop() + lengths.pop())
    rng.shuffle(lengths)
    # The ids between the spans: one each, and the others anywhere.
    free = num_ids - sum(lengths) - max(len(lengths) - 1, 0)
    cuts = np.sort(rng.integers(free + 1, size=len(lengths)))
    begins = cuts + np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(int) + np.arange(len(lengths))
    return [(int(begin), int(begin) + length) for begin, length in zip(begins, lengths, strict=True)]


def _write_file(file: str, recipe: InterleaveRecipe, device: str) -> None:
    """Writes the missing shards of one file of texts."""
    vocabulary, provenance = Vocabulary.load(recipe.vocabulary), load_provenance(recipe.text_to_token)
    documents, stem = _documents(file, recipe, vocabulary), Path(file).stem
    talker = cache(partial(_open_talker, recipe, vocabulary, device))  # only if a shard is missing
    number = 0
    while shard := list(islice(documents, recipe.documents_per_shard)):
        name = f"interleaved-{stem}-{number:05d}"

        def speak(shard: list[list[int]] = shard, name: str = name) -> list[CorpusSample]:
            return asyncio.run(_spoken(shard, name, recipe, talker(), vocabulary))

        complete_shard(recipe.out, name, speak, provenance, vocabulary.speech_offset)
        number += 1
    if not number:
        raise ValueError(f"{file} holds no text of at least {recipe.min_ids} ids")


def _open_talker(recipe: InterleaveRecipe, vocabulary: Vocabulary, device: str) -> TextToTokenTalker:
    model = load_language(recipe.text_to_token).to(device)
    return TextToTokenTalker(PlainEngine(model, vocabulary, recipe.num_rows), vocabulary)


def _documents(file: str, recipe: InterleaveRecipe, vocabulary: Vocabulary) -> Iterator[list[int]]:
    """The text ids of the documents of a file, in order."""
    for text in read_texts(Path(file), recipe.text_key):
        ids = vocabulary.encode_text(text)
        for at in range(0, len(ids), recipe.max_ids):
            piece = ids[at : at + recipe.max_ids]
            if len(piece) >= recipe.min_ids:
                yield piece


def read_texts(file: Path, key: str = "text") -> Iterator[str]:
    """Yields the texts of a .txt, .jsonl or .parquet file without reading it whole.

    Raises:
        ValueError: the file is missing, of another kind or damaged, or a row has no text under `key`.
    """
    try:
        if file.suffix == ".parquet":
            table = pq.ParquetFile(file)
            if key not in table.schema_arrow.names:
                raise ValueError(f"{file} has no column {key!r}; it has {', '.join(table.schema_arrow.names)}")
            for batch in table.iter_batches(columns=[key]):
                yield from (text for text in batch[key].to_pylist() if text)
            return
        if file.suffix not in (".txt", ".jsonl"):
            raise ValueError(f"{file} is no .txt, .jsonl or .parquet file")
        if file.suffix == ".txt":
            yield from (line for _, line in read_lines(file))
            return
        for where, row in read_json_lines(file):
            if not isinstance(row.get(key), str):
                raise ValueError(f"{where} has no text under {key!r}")
            yield row[key]
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{file} cannot be read as text: {error}") from None


async def _spoken(
    documents: Sequence[list[int]],
    name: str,
    recipe: InterleaveRecipe,
    talker: TextToTokenTalker,
    vocabulary: Vocabulary,
) -> list[CorpusSample]:
    """The documents of a shard with their spans in speech."""
    free = asyncio.Semaphore(recipe.num_rows)
    with tqdm(total=len(documents), desc=name, unit="document", mininterval=5.0) as bar:

        async def speak(ids: list[int], key: str, seed: int) -> LabeledTurn:
            sampling = replace(recipe.sampling, seed=seed)
            async with free:
                speech = [token async for token in talker.speak(vocabulary.decode_text(ids), sampling, key)]
            if not speech:  # a span of marks that are not said stays text
                return _text(ids)
            return LabeledTurn(Turn(Role.ASSISTANT, Modality.SPEECH, tuple(speech)), tuple(ids))

        async def make(number: int, ids: list[int]) -> CorpusSample:
            key = f"{name}-{number:06d}"
            rng = np.random.default_rng([recipe.seed, *key.encode()])
            split = "valid" if rng.random() < recipe.valid_share else "train"
            spans = draw_spans(len(ids), recipe.ratio, recipe.mean_span, rng)
            seeds = rng.integers(2**31, size=len(spans)).tolist()
            work = [
                speak(ids[begin:end], f"{key}-{at}", seed)
                for at, ((begin, end), seed) in enumerate(zip(spans, seeds, strict=True))
            ]
            turns: list[LabeledTurn] = []
            at = 0
            for (begin, end), spoken in zip(spans, await asyncio.gather(*work), strict=True):
                if begin > at:
                    turns.append(_text(ids[at:begin]))
                turns.append(spoken)
                at = end
            if at < len(ids):
                turns.append(_text(ids[at:]))
            bar.update()
            return CorpusSample(key, "document", split, "interleaved", tuple(turns))

        return list(await asyncio.gather(*(make(number, ids) for number, ids in enumerate(documents))))


def _text(ids: Sequence[int]) -> LabeledTurn:
    return LabeledTurn(Turn(Role.ASSISTANT, Modality.TEXT, tuple(ids)))
