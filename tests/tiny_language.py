"""A language model with random weights, made in a moment, for tests of what runs it."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from duologue.interleave import Allowed, InterleaveState
from duologue.language.backbone import LanguageConfig, Provenance, new_glm
from duologue.training.corpus import CorpusSample, LabeledTurn, write_manifest, write_shard
from duologue.training.pretrain import Mixture
from duologue.turns import Modality, Role, Turn
from duologue.vocabulary import Vocabulary
from recipes.pocket.text import train_text_tokenizer

Recipe = TypeVar("Recipe")

TINY = LanguageConfig(width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=48, max_positions=512)


def tiny_vocabulary() -> Vocabulary:
    tokenizer = train_text_tokenizer(["one and two is three", "what is the capital of France?"], 320)
    return Vocabulary.extend(tokenizer, codebook_size=64, multiple_of=16)


def tiny_model(vocabulary: Vocabulary) -> PreTrainedModel:
    """Sharper than a fresh model, so that replies differ with their prompts."""
    model = new_glm(vocabulary, TINY).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20.0)
    return model


def within_budget(state: InterleaveState, remaining: int) -> Allowed:
    """The kinds that may come next with `remaining` ids left, this one included: the last one is never text."""
    allowed = state.allowed
    if remaining == 1 and state.schedule.speech_run > 0:
        return Allowed(text=False, speech=allowed.speech, end=allowed.end)
    return allowed


def small_corpus(folder: Path, recipe: Callable[..., Recipe], **changes: object) -> Recipe:
    """A recipe of a tiny Glm on a token corpus of a few clips, which is written into the folder unless it is there."""
    if not (folder / "tokens").exists():
        vocabulary = tiny_vocabulary()
        vocabulary.save(folder / "vocabulary")
        provenance = Provenance("f" * 64, vocabulary.hash)
        rows = []
        for part in ("train", "valid"):
            for number, word in enumerate(("one", "two", "three", "France")):
                codes = vocabulary.speech_ids([(7 * number + k) % 60 for k in range(30)])
                turn = Turn(Role.ASSISTANT, Modality.SPEECH, tuple(codes), "en", "reply")
                labeled = LabeledTurn(turn, tuple(vocabulary.encode_text(word)))
                rows.append(CorpusSample(f"{part}-{word}", "clip", part, "", (labeled,)))
        write_shard(folder / "tokens", "all", rows, provenance, vocabulary.speech_offset)
        write_manifest(folder / "tokens", provenance)
    fields = {"corpus": str(folder / "tokens"), "vocabulary": str(folder / "vocabulary"), "language": TINY}
    fields |= {"mixture": Mixture(spans=0, text=0, written=0), "length": 96, "num_rows": 2, "num_valid_rows": 1}
    return recipe(**{**fields, **changes})
