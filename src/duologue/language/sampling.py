"""Sampling parameters of a reply; `drawing.py` draws by them."""

from __future__ import annotations

from dataclasses import dataclass

from duologue.language.scripts import TextLanguage, check_text_language


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a reply; the defaults are those of the released demo (docs/checkpoints.md 2.3).

    Attributes:
        temperature: 0 takes the likeliest kind and its likeliest id.
        speech_temperature: temperature of speech and its end; None for `temperature`.
        top_p: smallest set of likeliest ids with this probability mass.
        top_k: maximum number of candidate ids; None for no limit.
        max_tokens: maximum ids, end id included; the reply then stops where one may end.
        seed: of the reply's random numbers.
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


GREEDY = Sampling(temperature=0.0)
