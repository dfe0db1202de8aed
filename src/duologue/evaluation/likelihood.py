"""Which end of a story the language model finds likelier (table 3 of arXiv 2412.02612), and its speech recognition."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import torch

from duologue.conversation.answer import language_of, tokenize
from duologue.evaluation.benchmarks.speech_sets import StoryPair
from duologue.interleave import TEXT_ONLY, Kind
from duologue.language.sampling import GREEDY
from duologue.models import Models
from duologue.sound_files import load_audio
from duologue.vocabulary import Task

_MAX_TEXT = 256  # ids of a transcript


@torch.inference_mode()
def mean_log_likelihood(models: Models, context: Sequence[int], end: Sequence[int]) -> float:
    """Mean log-likelihood of the ids of `end` after those of `context`, over the whole joint vocabulary.

    Raises:
        ValueError: there is no id, or they do not fit the context of the model.
    """
    ids = models.vocabulary.document_sample([*context, *end]).ids[:-1]
    if not context or not end:
        raise ValueError("a likelihood needs a context and an end")
    if len(ids) > models.engine.max_positions:
        raise ValueError(f"{len(ids)} ids do not fit the {models.engine.max_positions} positions of the model")
    model = language_of(models)
    logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
    scores = logits[-len(end) - 1 : -1].log_softmax(-1)
    wanted = torch.tensor(list(end), device=scores.device)
    return float(scores.gather(-1, wanted[:, None]).mean())


def prefers_right_end(models: Models, pair: StoryPair, spoken: bool) -> float:
    """1 if the right end is likelier after the spoken beginning, 0.5 if both are equally likely, else 0.

    Args:
        spoken: the ends are speech tokens (S->S); otherwise text tokens (S->T).

    Raises:
        ValueError: as `mean_log_likelihood`, or the engine is not the plain one.
    """
    vocabulary = models.vocabulary
    context = vocabulary.speech_ids(tokenize(models, *load_audio(pair.context)))
    if spoken:
        ends = [vocabulary.speech_ids(tokenize(models, *load_audio(sound))) for sound in (pair.right, pair.wrong)]
    else:
        ends = [vocabulary.encode_text(text) for text in (pair.right_text, pair.wrong_text)]
    right, wrong = (mean_log_likelihood(models, context, end) for end in ends)
    return 0.5 if right == wrong else float(right > wrong)


def transcribe_with_language_model(models: Models, codes: Sequence[int]) -> str:
    """What the language model writes for speech tokens in the pre-training task of transcription.

    Raises:
        ValueError: the vocabulary has no such task, or the tokens do not fit.
    """
    vocabulary = models.vocabulary
    prompt = vocabulary.task_prompt(Task.TRANSCRIBE, vocabulary.speech_ids(codes))
    room = min(_MAX_TEXT, models.engine.max_positions - len(prompt))
    if room < 1:
        raise ValueError(f"{len(prompt)} ids do not fit the {models.engine.max_positions} positions of the model")

    async def generate() -> list[int]:
        sampling = dataclasses.replace(GREEDY, max_tokens=room)
        return [token async for token in models.engine.generate(prompt, sampling, TEXT_ONLY)]

    ids = [token for token in asyncio.run(generate()) if vocabulary.kind(token) is Kind.TEXT]
    return vocabulary.decode_text(ids).strip()
