"""Stage `pretrain`: speech and text become one language (arXiv:2412.02612, stage 1; arXiv:2411.17607).

The training data is a mixture of jobs over the token corpus, packed into rows. Reading aloud (TTS) and interleaving are
learned from the reply voice alone, because the model answers in it. Listening (ASR) is learned from every voice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from duologue.checkpoint import file_hash
from duologue.interleave import TEXT_ONLY, Kind, weave
from duologue.language.backbone import LanguageConfig, Provenance, extend, new_glm
from duologue.language.engine import PlainEngine
from duologue.language.sampling import Sampling
from duologue.training.corpus import CorpusSample, LabeledTurn, TokenCorpus
from duologue.training.language import (
    LanguageOptions,
    LanguageStage,
    LanguageStart,
    evaluated_first,
    open_corpora,
    open_start,
    start_from_codebook,
)
from duologue.training.loop import Batch, LoopConfig
from duologue.training.packing import (
    SPEECH,
    TEXT,
    UNTRAINED,
    Example,
    corrupt_heard_speech,
    fill,
    mean_losses,
    pack,
)
from duologue.turns import Conversation, Modality, Role, Turn
from duologue.vocabulary import Sample, Task, Vocabulary

NUM_SAMPLES = 8
TRIALS = 4
TRIAL_IDS = 200_000  # of a trial, which keep the error of a share under 1 %
MAX_TRIES = 100  # samples of a job that are looked at for one that fits a row
GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Mixture:
    """Shares of the jobs, see `PretrainRecipe.mixture_of`; they need not add up to one.

    Attributes:
        asr: speech of any voice -> its text.
        tts: text -> its speech in the reply voice.
        woven: speech of the reply voice with its text, interleaved in the runs of a reply.
        spans: the turns of a dialogue as one document, each in text or in speech.
        speech: speech of any voice by itself.
        text: writing by itself.
        written: dialogues as text, in the chat template.
        interleaved: text with spoken spans, of the step `interleave`.
    """

    asr: float = 0.40
    tts: float = 0.18
    woven: float = 0.10
    spans: float = 0.07
    speech: float = 0.02
    text: float = 0.08
    written: float = 0.15
    interleaved: float = 0.0


@dataclass(frozen=True)
class PretrainRecipe(LanguageOptions):
    """Recipe of the stage `pretrain`; more keys are in `LanguageOptions`.

    Attributes:
        corpus, vocabulary: folders of the token corpus and of the vocabulary it was made with.
        start_from: folder of a causal LM of any architecture; empty for a new Glm of the sizes in `language`.
        tokenizer: folder of the frozen tokenizer; its codebook initializes the speech embeddings of a new Glm or of a
            backbone. May be empty.
        mixture_of: whether shares of the mixture count examples or ids. The log has the shares of ids as `share_<job>`.
        length, num_rows: ids in a row, rows in a batch; `num_valid_rows` in the one validation batch of each job.
        text_weight, speech_weight: loss weight of every text id and every speech id.
        corrupt_heard_speech: share of the speech ids without a loss that are replaced by random ones.
    """

    corpus: str
    vocabulary: str
    loop: LoopConfig
    start_from: str = ""
    tokenizer: str = ""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    mixture: Mixture = field(default_factory=Mixture)
    mixture_of: Literal["examples", "ids"] = "examples"
    length: int = 512
    num_rows: int = 12
    text_weight: float = 1.0
    speech_weight: float = 1.0
    corrupt_heard_speech: float = 0.0
    num_valid_rows: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "loop", evaluated_first(self, self.loop))


class Jobs:
    """Random examples of the mixture, without samples that do not fit a row of `length` ids.

    Attributes:
        names: the jobs with a share.

    Raises:
        ValueError: the mixture asks for a job that the corpus has no sample for.
    """

    def __init__(self, corpus: TokenCorpus, vocabulary: Vocabulary, mixture: Mixture, length: int) -> None:
        self._corpus, self._vocabulary = corpus, vocabulary
        self._length = length
        clips, chats, texts = (corpus.where("task", task) for task in ("clip", "chat", "text"))
        transcribed = clips[corpus.transcribed(clips)]
        alone = corpus.num_turns(texts) == 1
        own_voice = transcribed[corpus.first_role(transcribed) == str(Role.ASSISTANT)]
        pools = {
            "asr": transcribed,
            "tts": own_voice,
            "woven": own_voice,
            "spans": chats,
            "speech": clips,
            "text": texts[alone],
            "written": np.concatenate([chats, texts[~alone]]),
            "interleaved": corpus.where("task", "document"),
        }
        shares = asdict(mixture)
        self.names = [name for name, share in shares.items() if share > 0]
        if not self.names:
            raise ValueError("the mixture has no job: at least one share must be above 0")
        for name in self.names:
            if not len(pools[name]):
                raise ValueError(f"the mixture asks for {name!r}, but the corpus has no sample for it")
        self._shares = np.array([shares[name] for name in self.names], float)
        self._shares /= self._shares.sum()
        self._chances = self._shares  # of an example to be of each job
        self._pools: dict[str, NDArray[np.int64]] = pools

    def count_ids(self, num_rows: int) -> None:
        """Makes the shares those of ids instead of examples, in batches of `num_rows` rows.

        Jobs differ in the length of their examples, and long examples more often find no room in a row. The chances of
        the jobs are therefore corrected by the shares of trial batches.
        """
        for trial in range(TRIALS):
            rng = np.random.default_rng((trial, len(self.names)))
            found = np.zeros(len(self.names))
            while found.sum() < TRIAL_IDS:
                found += self.num_ids(fill(self.draws(rng).__next__, num_rows, self._length))
            chances = self._chances * self._shares / np.maximum(found / found.sum(), 1e-6)
            self._chances = chances / chances.sum()

    def num_ids(self, rows: Sequence[Sequence[Example]]) -> NDArray[np.int64]:
        """Number of ids of each job of `names` in the rows of a batch."""
        counts = np.zeros(len(self.names), np.int64)
        for example in (example for row in rows for example in row):
            counts[self.names.index(example.job)] += len(example.ids)
        return counts

    def draws(self, rng: np.random.Generator) -> Iterator[Example]:
        """Yields examples of a batch without end.

        The jobs come by their chances, in steps of the golden ratio: every batch has nearly the same share of each.
        """
        edges = np.cumsum(self._chances)
        at = rng.random()
        while True:
            name = self.names[min(int(np.searchsorted(edges, at, side="right")), len(edges) - 1)]
            at = (at + GOLDEN_RATIO) % 1.0
            pool = self._pools[name]
            for _ in range(MAX_TRIES):
                example = self.example(name, self._corpus[int(pool[rng.integers(len(pool))])], rng)
                if example is not None and len(example.ids) <= self._length:
                    yield example
                    break
            else:
                raise ValueError(f"no sample for the job {name!r} fits a row of {self._length} ids; raise `length`")

    def example(self, name: str, sample: CorpusSample, rng: np.random.Generator) -> Example | None:
        """One job on one sample; None for a clip too fast to be woven."""
        vocabulary = self._vocabulary
        parts = [both(labeled, vocabulary) for labeled in sample.turns]
        text, speech = parts[0]
        match name:
            case "asr":
                made = vocabulary.task_sample(Task.TRANSCRIBE, speech, text)
            case "tts":
                made = vocabulary.task_sample(Task.READ, text, speech)
            case "woven":
                try:
                    made = vocabulary.document_sample(weave(text, speech))
                except ValueError:
                    return None
            case "spans":
                made = vocabulary.document_sample(self._spans(parts, rng))
            case "speech":
                made = vocabulary.document_sample(speech)
            case "text":
                made = vocabulary.document_sample(text)
            case "written":
                turns = [
                    Turn(labeled.turn.role, Modality.TEXT, tuple(written))
                    for labeled, (written, _) in zip(sample.turns, parts, strict=True)
                ]
                made = vocabulary.chat_sample(Conversation(tuple(turns)))
            case "interleaved":
                made = vocabulary.document_sample([token for labeled in sample.turns for token in labeled.turn.ids])
            case _:
                raise ValueError(f"unknown job {name!r}; the jobs are {', '.join(self._pools)}")
        return replace(by_kind(made, vocabulary), job=name)

    def _spans(self, parts: list[tuple[Sequence[int], Sequence[int]]], rng: np.random.Generator) -> list[int]:
        """The turns in order, each in one modality; adjacent turns differ in modality where possible."""
        ids: list[int] = []
        spoken = bool(rng.integers(2))
        for text, speech in parts:
            ids += speech if (spoken and speech) or not text else text
            spoken = not spoken if rng.random() < 0.8 else spoken
        return ids


def both(labeled: LabeledTurn, vocabulary: Vocabulary) -> tuple[Sequence[int], Sequence[int]]:
    """Text ids and speech ids of a turn; either may be empty."""
    ids = labeled.turn.ids
    if labeled.turn.modality is Modality.TEXT:
        return ids, ()
    if labeled.turn.modality is Modality.SPEECH:
        return labeled.transcript, ids
    spoken = vocabulary.kinds[list(ids)] == Kind.SPEECH
    return (
        [token for token, speech in zip(ids, spoken, strict=True) if not speech],
        [token for token, speech in zip(ids, spoken, strict=True) if speech],
    )


def by_kind(sample: Sample, vocabulary: Vocabulary) -> Example:
    """A sample whose text ids train text and whose speech ids train speech; the end counts as the kind before it."""
    kinds = vocabulary.kinds[sample.ids]
    trains = np.where(kinds == Kind.SPEECH, SPEECH, TEXT)
    ends = ~np.isin(kinds, (Kind.SPEECH, Kind.TEXT))
    ends[0] = False
    trains[ends] = trains[np.flatnonzero(ends) - 1]
    trains[~np.array(sample.loss)] = UNTRAINED
    return Example(sample.ids, trains.tolist())


class PretrainStage(LanguageStage):
    """Training of a language model on the mixture."""

    def __init__(self, recipe: PretrainRecipe) -> None:
        self.recipe = recipe
        start = open_start(recipe, recipe.tokenizer) or _new_start(recipe)
        extend(start.model, start.vocabulary)
        super().__init__(recipe, start, recipe.text_weight, recipe.speech_weight)
        self._jobs = Jobs(start.train, self.vocabulary, recipe.mixture, recipe.length)
        if recipe.mixture_of == "ids":
            self._jobs.count_ids(recipe.num_rows)
        self.weights = {**self.weights, **{f"share_{name}": 0.0 for name in self._jobs.names}}

    def batch(self, index: int) -> Batch:
        rng = np.random.default_rng((self.recipe.loop.seed, index))
        examples = self._jobs.draws(rng)

        def draw() -> Example:
            return corrupt_heard_speech(next(examples), self.recipe.corrupt_heard_speech, self.vocabulary, rng)

        rows = fill(draw, self.recipe.num_rows, self.recipe.length)
        counts = torch.from_numpy(self._jobs.num_ids(rows))
        return {**pack(rows, self.recipe.length, self._padding_id), "num_ids_of_jobs": counts}

    def losses(self, phase: str, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The losses, and the share of each job in the ids of the batch."""
        counts = batch["num_ids_of_jobs"]
        shares = counts / counts.sum()
        values = super().losses(phase, batch, progress)
        return {**values, **{f"share_{name}": shares[at] for at, name in enumerate(self._jobs.names)}}

    def evaluate(self) -> dict[str, float]:
        """Nats per id on validation samples of each job, by kind of id; perplexity of the text file."""
        metrics = self.perplexity()
        for name in (name for name, share in asdict(self.recipe.mixture).items() if share > 0):
            try:
                jobs = Jobs(self.valid, self.vocabulary, Mixture(**{**_NO_JOB, name: 1.0}), self.recipe.length)
            except ValueError:  # a small validation split may hold no sample of a kind
                continue
            rows = fill(jobs.draws(np.random.default_rng(0)).__next__, self.recipe.num_valid_rows, self.recipe.length)
            values = mean_losses(self.model, [pack(rows, self.recipe.length, self._padding_id)])
            metrics.update({f"{name}/{kind}": value for kind, value in values.items()})
        return metrics

    def sample(self, folder: Path) -> None:
        """Writes the model's transcripts of validation clips with the reference texts, as transcripts.jsonl."""
        engine = PlainEngine(self.model, self.vocabulary)
        lines = []
        clips = self.valid.where("task", "clip")
        for index in clips[self.valid.transcribed(clips)][:NUM_SAMPLES]:
            text, speech = both(self.valid[int(index)].turns[0], self.vocabulary)
            prompt = self.vocabulary.task_prompt(Task.TRANSCRIBE, speech)
            heard = list(engine.stream(prompt, Sampling(temperature=0.0, max_tokens=64), TEXT_ONLY))
            heard = [token for token in heard if self.vocabulary.kind(token) is Kind.TEXT]
            lines.append({"said": self.vocabulary.decode_text(text), "heard": self.vocabulary.decode_text(heard)})
        write_lines(folder / "transcripts.jsonl", lines)


def _new_start(recipe: PretrainRecipe) -> LanguageStart:
    """A new Glm, with speech embeddings from the codebook if the recipe names the tokenizer."""
    vocabulary, provenance, train, valid = open_corpora(recipe.corpus, recipe.vocabulary, "")
    model = new_glm(vocabulary, recipe.language, recipe.loop.seed)
    if recipe.tokenizer:
        provenance.check(
            Provenance(file_hash(recipe.tokenizer), vocabulary.hash),
            f"the corpus {recipe.corpus}",
            f"the tokenizer {recipe.tokenizer}",
        )
        start_from_codebook(model, vocabulary, recipe.tokenizer)
    return LanguageStart(model, vocabulary, provenance, train, valid)


_NO_JOB = dict.fromkeys(asdict(Mixture()), 0.0)


def write_lines(path: Path, lines: Sequence[Mapping[str, object]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
