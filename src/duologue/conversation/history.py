"""History: what the model is shown of a conversation, and the one rule for a reply that was not heard to its end.

Pure functions over `turns.Conversation`; nothing here computes with a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from duologue import rates
from duologue.interleave import INTERLEAVED, Kind, legal_prefix
from duologue.language.sampling import Sampling
from duologue.models import Models
from duologue.turns import Conversation, Modality, Role, Turn
from duologue.vocabulary import Vocabulary

MIN_REPLY_TOKENS = 64


@dataclass(frozen=True)
class HeardPart:
    """The part of a reply that its listener heard.

    Attributes:
        turn: the reply with the ids up to the last speech token that was heard; its ids are empty where none was.
        num_speech: speech tokens in it.
        share: those over the speech tokens that the whole reply has or needs, in [0, 1].
    """

    turn: Turn
    num_speech: int
    share: float

    def text(self, transcript: str) -> str:
        """The heard beginning of the reply's transcript, an estimate. A written reply counts as read."""
        return transcript if self.turn.modality is Modality.TEXT else heard_text(transcript, self.share)


def heard_part(reply: Turn, num_samples: int, vocabulary: Vocabulary, *, finished: bool) -> HeardPart:
    """Cuts a reply to what was heard.

    A reply that the model did not finish, or that was not heard to its end, is marked as interrupted.

    Args:
        reply: the turn with all ids that the model made.
        num_samples: samples of its sound that were played, at 22.05 kHz.
        finished: the model ended the reply itself. Otherwise the text of the last run was not spoken yet, and the
            share counts the speech that this text still needs.
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


def heard_text(text: str, share: float) -> str:
    """The beginning of a transcript of which this share of the speech was heard, up to a whole word: an estimate.

    The speech tokens do not tell which word they say, so words count as spread evenly over the speech.
    """
    size = min(round(len(text) * share), len(text))
    while 0 < size < len(text) and _in_word(text[size - 1]) and _in_word(text[size]):
        size -= 1
    return text[:size].rstrip()


def turn_of(role: Role, ids: Sequence[int], vocabulary: Vocabulary, language: str = "") -> Turn:
    """A turn of the user, the system or a tool, with the modality that its ids have."""
    kinds = {vocabulary.kind(token) for token in ids}
    modality = Modality.TEXT
    if Kind.SPEECH in kinds:
        modality = Modality.SPEECH if kinds == {Kind.SPEECH} else Modality.INTERLEAVED
    return Turn(role, modality, tuple(ids), language)


def reply_prompt(
    models: Models, conversation: Conversation, reply: Modality, sampling: Sampling
) -> tuple[list[int], Sampling]:
    """The prompt of the next reply, and the sampling bounded by the positions that the prompt leaves.

    The oldest turns are left out where they do not fit.

    Raises:
        ValueError: the last turn alone does not fit, or it is not one that can be answered.
    """
    prompt = _fitting(models, conversation, lambda shown: models.vocabulary.prompt_ids(shown, reply))
    room = min(sampling.max_tokens, models.engine.max_positions - len(prompt))
    return prompt, dataclasses.replace(sampling, max_tokens=room)


def open_prompt(models: Models, conversation: Conversation, codes: Sequence[int]) -> list[int]:
    """The beginning of the next prompt while the user still speaks: `codes` are the final speech tokens so far.

    Raises:
        ValueError: the open turn alone does not fit.
    """
    turn = Turn(Role.USER, Modality.SPEECH, tuple(models.vocabulary.speech_ids(codes)))
    return _fitting(models, conversation.plus(turn), models.vocabulary.open_prompt_ids)


def _fitting(models: Models, whole: Conversation, ids_of: Callable[[Conversation], list[int]]) -> list[int]:
    """The conversation's ids without the oldest turns where they do not fit.

    Turns are dropped in steps of a quarter of the model's positions. So the next prompts begin alike, and the engine
    can use the keys and values it has kept.
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
        if dropped >= to_drop and oldest.role is not Role.ASSISTANT:  # no reply stays without its question
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


def _in_word(character: str) -> bool:
    """Letters of scripts that part words by blanks."""
    return character == "'" or (character.isalnum() and ord(character) < 0x2E80)
