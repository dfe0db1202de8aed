"""What both stages of the language model share: where it starts, what is trained of it, and what is saved.

The language model of a run is a new Glm, an earlier run, a released folder, or any text model (`backbone`). The corpus
is read in the ids of that model, see `translation.py`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from duologue.checkpoint import Dtype, file_hash, load_component
from duologue.conversation.chatbot import model_folder
from duologue.language.adapters import LoraOptions, add_lora, train_rows
from duologue.language.backbone import (
    PROVENANCE_FILE,
    Provenance,
    load_language,
    load_provenance,
    save_language,
    start_speech_embeddings,
)
from duologue.language.pretrained import load_backbone
from duologue.models import ModelFolder, PocketFolder, open_folder
from duologue.released.language import is_released, load_released_language
from duologue.released.text import load_released_vocabulary, save_for_transformers
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from duologue.training.adapter_folder import save_adapter
from duologue.training.corpus import TokenCorpus
from duologue.training.loop import Batch, LoopConfig
from duologue.training.packing import TEXT, UNTRAINED, Example, LanguageObjective, mean_losses, pack
from duologue.training.throughput import Work, language_work
from duologue.training.translation import TranslatedCorpus
from duologue.vocabulary import END_OF_TEXT, Vocabulary

MAX_TEXT_ROWS = 64  # rows of `text_file` that are measured
# Spread of the speech embeddings in a text model. With 1.0 the perplexity of SmolLM2-135M rose from 9.8 to 16 000.
TRAINED_SPREAD = 0.25


@dataclass(frozen=True, kw_only=True)
class LanguageOptions:
    """Keys that the recipes of both language stages share.

    Attributes:
        backbone: a text model to extend by speech: a folder of transformers, a .gguf file, or a folder with one. The
            text of the corpus is then read in its vocabulary.
        text_file: a text file whose perplexity every evaluation measures. The first evaluation is then before the first
            step, so that lost text ability shows.
        parts_from: a preset or model folder whose tokenizer, recognizer and decoder are saved beside the trained model.
            The result is a complete model folder.
        dtype: of the loaded weights; "bfloat16" halves the memory of frozen ones, beside `lora`.
        logits_chunk: see `packing.losses`.
        lora: trains low-rank adapters instead of all weights.
        freeze_text_rows: trains only the rows of speech and controls of embedding and head; `lora` has its own key.
        activation_checkpointing: computes the activations of each layer again in the backward pass, which saves memory.
    """

    backbone: str = ""
    text_file: str = ""
    parts_from: str = ""
    lora: LoraOptions | None = None
    freeze_text_rows: bool = False
    dtype: Dtype = "float32"
    logits_chunk: int = 0
    activation_checkpointing: bool = False


class LanguageRecipe(Protocol):
    """The recipe of a language stage, as this module sees it."""

    @property
    def corpus(self) -> str: ...
    @property
    def vocabulary(self) -> str: ...
    @property
    def start_from(self) -> str: ...
    @property
    def backbone(self) -> str: ...
    @property
    def text_file(self) -> str: ...
    @property
    def parts_from(self) -> str: ...
    @property
    def lora(self) -> LoraOptions | None: ...
    @property
    def freeze_text_rows(self) -> bool: ...
    @property
    def dtype(self) -> Dtype: ...
    @property
    def logits_chunk(self) -> int: ...
    @property
    def activation_checkpointing(self) -> bool: ...
    @property
    def length(self) -> int: ...
    @property
    def loop(self) -> LoopConfig: ...


@dataclass(frozen=True)
class LanguageStart:
    """A language model at the start of a run, and the corpus in its ids."""

    model: PreTrainedModel
    vocabulary: Vocabulary
    provenance: Provenance
    train: TokenCorpus
    valid: TokenCorpus


def evaluated_first(options: LanguageOptions, loop: LoopConfig) -> LoopConfig:
    """Returns the loop of a recipe, which evaluates before its first step if there is a text file."""
    return replace(loop, evaluate_first=True) if options.text_file else loop


def open_corpora(
    corpus: str, vocabulary: str, model_folder: str
) -> tuple[Vocabulary, Provenance, TokenCorpus, TokenCorpus]:
    """The vocabulary, the provenance of the corpus, and its samples for training and for validation.

    Raises:
        ValueError: corpus, vocabulary and the model in `model_folder` were not made with each other.
    """
    owner = Vocabulary.load(vocabulary)
    train = TokenCorpus(corpus, splits=("train",))
    provenance = train.manifest.siblings
    provenance.check(
        Provenance(provenance.tokenizer, owner.hash), f"the corpus {corpus}", f"the vocabulary {vocabulary}"
    )
    own = _own_vocabulary(model_folder)
    if model_folder and (Path(model_folder) / PROVENANCE_FILE).exists():
        made_with = load_provenance(model_folder)
        if own is not None:  # the text is translated; the speech tokens must be the same
            made_with = Provenance(made_with.tokenizer, provenance.vocabulary)
        provenance.check(made_with, f"the corpus {corpus}", f"the model {model_folder}")
    valid = TokenCorpus(corpus, splits=("valid",))
    if own is None or own.hash == owner.hash:
        return owner, provenance, train, valid
    print(f"{model_folder} has a vocabulary of its own: the text of {corpus} is read in it, without styles it lacks")
    train, valid = _translated(owner, own, train, valid)
    return own, Provenance(provenance.tokenizer, own.hash), train, valid


def open_start(recipe: LanguageRecipe, tokenizer: str = "") -> LanguageStart | None:
    """Opens the model that a recipe names, with the corpus in its ids; None if it names none.

    Args:
        tokenizer: folder of the speech tokenizer, whose codebook initializes the speech embeddings of a backbone.

    Raises:
        ValueError: a folder is missing or damaged, the parts were not made with each other, or both `backbone` and
            `start_from` are given.
    """
    if recipe.backbone and recipe.start_from:
        raise ValueError("a run starts from `backbone` or from `start_from`, not from both")
    owner, provenance, train, valid = open_corpora(recipe.corpus, recipe.vocabulary, recipe.start_from)
    if recipe.backbone:
        model, own = load_backbone(recipe.backbone, owner.codebook_size, recipe.dtype)
        if tokenizer:
            start_from_codebook(model, own, tokenizer, TRAINED_SPREAD)
        provenance = Provenance(provenance.tokenizer, own.hash)
        return LanguageStart(model, own, provenance, *_translated(owner, own, train, valid))
    if not recipe.start_from:
        return None
    if is_released(recipe.start_from):
        model = load_released_language(recipe.start_from, recipe.dtype).requires_grad_(True)
    else:
        model = load_language(recipe.start_from, recipe.dtype)
    return LanguageStart(model, owner, provenance, train, valid)


def start_from_codebook(model: PreTrainedModel, vocabulary: Vocabulary, tokenizer: str, spread: float = 1.0) -> None:
    """Initializes the speech embeddings from the codebook of the tokenizer in a folder (`start_speech_embeddings`)."""
    owner = load_component(tokenizer, SpeechTokenizer, SpeechTokenizerConfig)
    start_speech_embeddings(model, vocabulary, owner.quantizer.codebook.weight, spread)


def _own_vocabulary(folder: str) -> Vocabulary | None:
    """The vocabulary inside a language model's folder; None if it has none."""
    if folder and is_released(folder):
        return load_released_vocabulary(folder)
    return Vocabulary.load(folder) if folder and (Path(folder) / "vocabulary.json").is_file() else None


def _translated(source: Vocabulary, target: Vocabulary, *corpora: TokenCorpus) -> list[TokenCorpus]:
    return [TranslatedCorpus(corpus, source, target) for corpus in corpora]


class LanguageStage:
    """Base of the stages that train a language model.

    Attributes:
        model: what is evaluated, sampled from and saved.
        objective: what is trained; it holds the same model.
    """

    phases: Mapping[str, nn.Module]
    weights: Mapping[str, float]

    def __init__(self, recipe: LanguageRecipe, start: LanguageStart, text_weight: float, speech_weight: float) -> None:
        self._options = recipe
        self.model, self.vocabulary, self.provenance = start.model, start.vocabulary, start.provenance
        self.valid = start.valid
        if recipe.lora is not None and not recipe.lora.merge:
            if not (recipe.backbone or recipe.start_from):
                raise ValueError("lora.merge is false, but there is no base to keep: give start_from or backbone")
            if recipe.parts_from:
                raise ValueError("lora.merge is false, so the result is no complete model: leave parts_from out")
        self._padding_id = self.vocabulary.control_id(END_OF_TEXT)
        self._parts = _check_parts(recipe.parts_from, self.provenance) if recipe.parts_from else None
        self._text_rows = text_rows(recipe.text_file, self.vocabulary, recipe.length) if recipe.text_file else []
        if recipe.freeze_text_rows and recipe.lora is None:
            train_rows(self.model, self.vocabulary)
        if recipe.activation_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.objective = LanguageObjective(self.model, recipe.logits_chunk)
        self.phases = {"language": self.objective}
        self.weights = {"text": text_weight, "speech": speech_weight, "text_nll": 0.0, "speech_nll": 0.0}

    def prepare(self, device: str) -> None:
        """Adds adapters before the model goes to its device. Raises ValueError as `adapters.add_lora`."""
        if self._options.lora is not None:
            add_lora(self.model, self.vocabulary, self._options.lora, torch.device(device))

    def use_whole(self, phase: str, module: nn.Module) -> None:
        """Evaluates, samples and saves this whole copy of the sharded objective."""
        assert isinstance(module, LanguageObjective)
        self.model = module.model

    def work(self, batch: Batch) -> Work:
        """Ids and FLOPs of a batch."""
        return language_work(self.objective.model, batch)

    def losses(self, phase: str, batch: Batch, progress: float) -> dict[str, Tensor]:
        values: dict[str, Tensor] = self.objective(batch)
        return values

    def perplexity(self) -> dict[str, float]:
        """Perplexity of `text_file` under the model, over the whole vocabulary; nothing without such a file."""
        if not self._text_rows:
            return {}
        batches = [pack([[row]], self._options.length, self._padding_id) for row in self._text_rows]
        return {"perplexity": math.exp(mean_losses(self.model, batches)["text_nll"])}

    def save(self, folder: Path) -> None:
        """Writes `folder/language` with its vocabulary; with `parts_from`, `folder` becomes a complete model.

        With `lora.merge: false` it writes `folder/adapter` instead, see `adapter_folder.py`.
        """
        options = self._options
        if options.lora is not None and not options.lora.merge:
            base = options.backbone or options.start_from
            save_adapter(folder / "adapter", self.model, options.lora, base, self.vocabulary, self.provenance)
            return
        place = folder / "language"
        shard_bytes = self._options.loop.max_shard_bytes
        save_language(place, self.model, self.provenance, self._options.dtype, shard_bytes)
        save_for_transformers(self.vocabulary, place)
        if self._parts is not None:
            _write_parts(self._parts, self.vocabulary, folder)


def text_rows(path: str, vocabulary: Vocabulary, length: int) -> list[Example]:
    """Cuts the ids of a text file into rows of `length` ids, at most `MAX_TEXT_ROWS`, each with a loss on its text.

    Raises:
        ValueError: the file is missing, no text, or too short to measure.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text_file {path} cannot be read as text ({error})") from None
    ids = vocabulary.encode_text(text[: 16 * length * MAX_TEXT_ROWS])
    starts = range(0, len(ids), length)[:MAX_TEXT_ROWS]
    rows: list[Sequence[int]] = [ids[at : at + length] for at in starts]
    if not rows or len(rows[0]) < 2:
        raise ValueError(f"text_file {path} holds {len(ids)} ids of text; its perplexity needs at least 2")
    return [Example(row, [UNTRAINED, *[TEXT] * (len(row) - 1)]) for row in rows]


def _check_parts(name: str, provenance: Provenance) -> ModelFolder:
    """Opens the model folder of `parts_from` before any training. Raises ValueError if its tokenizer is another one."""
    folder = open_folder(model_folder(name))
    own = Provenance(file_hash(folder.tokenizer_path), provenance.vocabulary)
    provenance.check(own, "the corpus", f"the tokenizer of {name}")
    return folder


def _write_parts(parts: ModelFolder, vocabulary: Vocabulary, folder: Path) -> None:
    """Copies all parts but the language model, and writes vocabulary and card."""
    if not isinstance(parts, PocketFolder):  # a released set is known by its parts alone
        for place in (parts.tokenizer_path, parts.decoder_path):  # type: ignore[attr-defined]
            shutil.copytree(place, folder / place.name, dirs_exist_ok=True)
        return
    for part in ("tokenizer", "recognizer", "decoder"):
        if (parts.path / part).is_dir():
            shutil.copytree(parts.path / part, folder / part, dirs_exist_ok=True)
    vocabulary.save(folder / "vocabulary")
    replace(parts.card, name=folder.parent.name, trained=True).save(folder)
