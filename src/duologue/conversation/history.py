"""The history that a model is shown, and the truncation of interrupted replies.

Pure functions over `turns.Conversation`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from duologue import rates
from duologue.interleave import INTERLEAVED, Kind, legal_prefix
from duologue.language.sampling import Sampling
from duologue.models import Models
from duologue.text import heard_text
from duologue.turns import Conversation, Modality, Role, Turn
from duologue.vocabulary import Vocabulary

MIN_REPLY_TOKENS = 64


@dataclass(frozen=True)
class HeardPart:
    """The heard part of a reply.

    Attributes:
        turn: the reply up to the last speech token heard; without ids if none was.
        num_speech: number of speech tokens heard.
        share: num_speech over the speech tokens of the whole reply, in [0, 1].
    """

    turn: Turn
    num_speech: int
    share: float

    def text(self, transcript: str) -> str:
        """Returns the heard part of the transcript, an estimate. A written reply counts as read."""
        return transcript if self.turn.modality is Modality.TEXT else heard_text(transcript, self.share)


def heard_part(reply: Turn, num_samples: int, vocabulary: Vocabulary, *, finished: bool) -> HeardPart:
    """Truncates a reply to its heard part and marks an incomplete one as interrupted.

    Args:
        reply: the turn with all generated ids.
        num_samples: samples of its audio that were played, at 22.05 kHz.
        finished: the model ended the reply. Otherwise the share includes the speech that the last text run still needs.
    """
    kinds = [vocabulary.kind(token) for token in reply.ids]
    num_text, num_speech = kinds.count(Kind.TEXT), kinds.count(Kind.SPEECH)
    kept = reply.ids
    if reply.modality is not Modality.TEXT:
        kept = reply.ids[: legal_prefix(kinds, rates.tokens_heard(num_samples))]
    num_heard = kinds[: len(kept)].count(Kind.SPEECH)
    if not finished:
        num_speech = max(num_speech, num_text * INTERLEAVED.speech_run // INTERLEAVED.text_run)
    is_whole = finished and len(kept) == len(reply.ids)
    turn = reply if is_whole else dataclasses.replace(reply, ids=kept, interrupted=True)
    return HeardPart(turn, num_heard, num_heard / max(num_speech, 1))


def turn_of(role: Role, ids: Sequence[int], vocabulary: Vocabulary, language: str = "") -> Turn:
    """Returns a turn of user, system or tool with the modality of its ids."""
    kinds = {vocabulary.kind(token) for token in ids}
    modality = Modality.TEXT
    if Kind.SPEECH in kinds:
        modality = Modality.SPEECH if kinds == {Kind.SPEECH} else Modality.INTERLEAVED
    return Turn(role, modality, tuple(ids), language)


def reply_prompt(
    models: Models, conversation: Conversation, reply: Modality, sampling: Sampling
) -> tuple[list[int], Sampling]:
    """Returns the prompt of the next reply, and the sampling limited to the remaining positions.

    The oldest turns are dropped if the prompt is too long.

    Raises:
        ValueError: the last turn does not fit alone, or cannot be answered.
    """
    prompt = _fitting(models, conversation, lambda shown: models.vocabulary.prompt_ids(shown, reply))
    room = min(sampling.max_tokens, models.engine.max_positions - len(prompt))
    return prompt, dataclasses.replace(sampling, max_tokens=room)


def open_prompt(models: Models, conversation: Conversation, codes: Sequence[int]) -> list[int]:
    """Returns the prefix of the next prompt while the user speaks; `codes` are the final speech tokens.

    Raises:
        ValueError: the open turn does not fit alone.
    """
    turn = Turn(Role.USER, Modality.SPEECH, tuple(models.vocabulary.speech_ids(codes)))
    return _fitting(models, conversation.plus(turn), models.vocabulary.open_prompt_ids)


def _fitting(models: Models, whole: Conversation, ids_of: Callable[[Conversation], list[int]]) -> list[int]:
    """Returns the conversation's ids without the oldest turns that do not fit.

    Turns are dropped in steps of a quarter of the model's positions, so that subsequent prompts share a prefix in the
    KV cache.
    """
    size = models.engine.max_positions - MIN_REPLY_TOKENS
    prompt = ids_of(whole)
    if len(prompt) <= size:
        return prompt
    quarter = max(size // 4, 1)
    to_drop = -(-(len(prompt) - size) // quarter) * quarter
    *past, last = whole.turns
    dropped = 0
    while (oldest := next((turn for turn in past if turn.role is not Role.SYSTEM), None)) is not None:
        if dropped >= to_drop and oldest.role is not Role.ASSISTANT:  # keeps each reply with its question
            break
        past.remove(oldest)
        dropped += len(oldest.ids)
    prompt = ids_of(dataclasses.replace(whole, turns=(*past, last)))
    if len(prompt) <= size:
        return prompt
    raise ValueError(
        f"the question is too long: its {len(prompt)} tokens do not fit the {models.engine.max_positions} positions of "
        f"{models.card.name} (at most about {size / rates.TOKEN_RATE:.0f} seconds of speech)"
    )
