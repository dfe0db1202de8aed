"""A language model with random weights, made in a moment, for tests of what runs it."""

import torch
from transformers import PreTrainedModel

from duologue.interleave import Allowed, InterleaveState
from duologue.language.backbone import LanguageConfig, new_glm
from duologue.vocabulary import Vocabulary
from recipes.pocket.text import train_text_tokenizer

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
