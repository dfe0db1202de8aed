"""Sampling of the next id from scores (V,): first its kind, then the id.

The kind is drawn by the total probability of its ids. Otherwise a model that is sure of a word, but not which one,
would often emit speech and lose text.

Shapes: V ids of the joint vocabulary, or of the model's output if wider.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from duologue.interleave import Allowed, InterleaveState
from duologue.language.scripts import TextLanguage, check_text_language, language_mask
from duologue.vocabulary import Vocabulary


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a reply; the defaults are those of the released demo (docs/checkpoints.md 2.3).

    Attributes:
        temperature: 0 takes the likeliest kind and its likeliest id.
        speech_temperature: temperature of speech and its end; None for `temperature`.
        top_p: smallest set of likeliest ids with this probability mass.
        top_k: maximum number of candidate ids; None for no limit.
        max_tokens: maximum ids, end id included; the reply then stops where one may end.
        seed: of the request's random generator.
        text_language: "en" or "zh" restricts text to that language, see `scripts.py`.
    """

    temperature: float = 0.2
    speech_temperature: float | None = None
    top_p: float = 0.8
    top_k: int | None = None
    max_tokens: int = 2000
    seed: int = 0
    text_language: TextLanguage | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "speech_temperature"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie above 0 and be at most 1, got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None, got {self.top_k}")
        if self.text_language is not None:
            check_text_language(self.text_language)
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")

    def temperature_for(self, allowed: Allowed) -> float:
        """Returns the temperature of a choice among these kinds; that of text if text is one of them."""
        if self.speech_temperature is None or allowed.text:
            return self.temperature
        return self.speech_temperature


GREEDY = Sampling(temperature=0.0)


def within_budget(state: InterleaveState, remaining: int) -> Allowed:
    """Returns what may come next with `remaining` ids left, this one included.

    The last id must allow the reply to end: no text begins without room for speech.
    """
    allowed = state.allowed
    if remaining == 1 and state.schedule.speech_run > 0:
        return Allowed(text=False, speech=allowed.speech, end=allowed.end)
    return allowed


class KindMasks:
    """Additive score masks for sets of allowed kinds, created on demand.

    Args:
        width: V, number of scores; those beyond the vocabulary are never allowed.
    """

    def __init__(self, vocabulary: Vocabulary, width: int, device: torch.device) -> None:
        if width < vocabulary.size:
            raise ValueError(f"the model gives scores for {width} ids, but the vocabulary has {vocabulary.size}")
        self._vocabulary, self._width, self.device = vocabulary, width, device
        self._masks: dict[tuple[Allowed, str | None], Tensor] = {}
        self._languages: dict[str, npt.NDArray[np.bool_]] = {}

    def __getitem__(self, allowed: Allowed) -> Tensor:
        """Returns (V,) float32: 0 for allowed ids, -inf for all others."""
        return self.get(allowed)

    def get(self, allowed: Allowed, text_language: TextLanguage | None = None) -> Tensor:
        """Returns the mask with text restricted to the given language."""
        key = allowed, text_language if allowed.text else None
        if key not in self._masks:
            is_open = self._vocabulary.allowed_mask(allowed)
            if key[1] is not None:
                if key[1] not in self._languages:
                    self._languages[key[1]] = language_mask(self._vocabulary, key[1])
                is_open = is_open & self._languages[key[1]]
            open_ids = torch.from_numpy(is_open.nonzero()[0])
            if not len(open_ids):
                raise ValueError(f"only {allowed} can come next, and the vocabulary has no such id")
            mask = torch.full((self._width,), float("-inf"))
            mask[open_ids] = 0.0
            self._masks[key] = mask.to(self.device)
        return self._masks[key]


def choose_kind(
    scores: Tensor, masks: KindMasks, allowed: Allowed, sampling: Sampling, generator: torch.Generator | None
) -> tuple[Allowed, Tensor]:
    """Draws one of the allowed kinds from scores (V,) float32.

    Returns:
        the kind, and the scores with all other kinds at -inf.
    """
    kinds = allowed.kinds
    each = [scores + masks.get(kind, sampling.text_language) for kind in kinds]
    drawn = 0
    if len(kinds) > 1:
        together = torch.stack([of_kind.logsumexp(0) for of_kind in each])
        drawn = choose(together, sampling.temperature_for(allowed), sampling.top_p, None, generator)
    return kinds[drawn], each[drawn]


def draw(
    scores: Tensor,
    masks: KindMasks,
    state: InterleaveState,
    remaining: int,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> int:
    """Draws the next id of a reply from scores (V,) float32 without advancing the state."""
    kind, scores = choose_kind(scores, masks, within_budget(state, remaining), sampling, generator)
    return choose(scores, sampling.temperature_for(kind), sampling.top_p, sampling.top_k, generator)


_LIKELY = 256, 2048


def choose(
    scores: Tensor, temperature: float, top_p: float, top_k: int | None, generator: torch.Generator | None
) -> int:
    """Draws one id from scores (V,) float32; ids with score -inf are never drawn."""
    if temperature == 0.0:
        return int(scores.argmax())
    scores = scores / temperature
    ids = None
    if top_k is not None and top_k < scores.numel():
        scores, ids = scores.topk(top_k)
    total = scores.logsumexp(0)
    if top_p < 1.0 and ids is None:
        # A few ids nearly always hold top_p of the probability; sorting all costs ten times more.
        for num_likely in (*_LIKELY, scores.numel()):
            likely, ids = scores.topk(min(num_likely, scores.numel()))
            if float((likely - total).exp().sum()) >= top_p:
                break
        scores = likely
    probabilities = (scores - total).exp()
    if top_p < 1.0:
        before = probabilities.cumsum(0) - probabilities  # the likeliest id always remains
        probabilities = probabilities * (before < top_p)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return int(drawn if ids is None else ids[drawn])
