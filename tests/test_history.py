"""The one cut of a reply that was not heard to its end, against the two formulas that it replaces."""

import dataclasses
import random
from collections.abc import Sequence

import pytest

from duologue import rates
from duologue.conversation.history import HeardPart, heard_part, turn_of
from duologue.interleave import INTERLEAVED, Kind, legal_prefix, weave
from duologue.text import heard_text
from duologue.turns import Modality, Role, Turn
from duologue.vocabulary import Vocabulary
from recipes.pocket.text import train_text_tokenizer
from tests.tiny import TEXTS

WORDS = "seven plus five is twelve and the capital of France is Paris hello how are you"


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.extend(train_text_tokenizer(TEXTS, 300), 32)


def old_session(reply: Turn, num_samples: int, vocabulary: Vocabulary, finished: bool) -> tuple[Turn, float]:
    """`Session.cut_last_reply` and `Speaker.num_speech_estimated` as they were."""
    kinds = [vocabulary.kind(token) for token in reply.ids]
    kept = reply.ids
    if reply.modality is not Modality.TEXT:
        heard = rates.tokens_heard(num_samples, rates.SPEAK_SAMPLE_RATE)
        kept = reply.ids[: legal_prefix(kinds, heard)]
    turn = reply
    if not finished or len(kept) < len(reply.ids):
        turn = dataclasses.replace(reply, ids=kept, interrupted=True)
    num_codes = sum(vocabulary.kind(token) is Kind.SPEECH for token in kept)
    estimated = float(kinds.count(Kind.SPEECH))
    if not finished:
        estimated = max(estimated, kinds.count(Kind.TEXT) * INTERLEAVED.speech_run / INTERLEAVED.text_run)
    return turn, num_codes / max(estimated, 1)


def old_items(
    reply: Turn, heard_ms: float, spoken_ms: float, speed: float, vocabulary: Vocabulary, finished: bool
) -> tuple[Turn | None, str]:
    """`Item.cut` as it was."""
    heard_ms = min(heard_ms, spoken_ms)
    kinds = [vocabulary.kind(token) for token in reply.ids]
    kept = reply.ids
    if heard_ms < spoken_ms or not finished:
        num_samples = int(heard_ms * speed * rates.SPEAK_SAMPLE_RATE / 1000)
        kept = kept[: legal_prefix(kinds, rates.tokens_heard(num_samples))]
    short = len(kept) < len(reply.ids)
    turn = dataclasses.replace(reply, ids=kept, interrupted=short) if kept else None
    num_text, num_speech = kinds.count(Kind.TEXT), kinds.count(Kind.SPEECH)
    if not finished:
        num_speech = max(num_speech, num_text * INTERLEAVED.speech_run // INTERLEAVED.text_run)
    num_heard = sum(vocabulary.kind(token) is Kind.SPEECH for token in kept)
    text = vocabulary.decode_text(t for t, kind in zip(reply.ids, kinds, strict=True) if kind is Kind.TEXT).lstrip()
    return turn, heard_text(text, num_heard / num_speech) if num_speech else ""


def replies(vocabulary: Vocabulary, finished: bool) -> list[Turn]:
    """Replies of many lengths; the model's end can only stand behind speech, so an unfinished one is cut anywhere."""
    rng, found = random.Random(0), []
    for _ in range(100):
        text = vocabulary.encode_text(" ".join(rng.choices(WORDS.split(), k=rng.randint(1, 14))))
        num_speech = INTERLEAVED.min_speech(len(text)) + rng.randint(0, 60)
        ids = weave(text, vocabulary.speech_ids(rng.randrange(32) for _ in range(num_speech)))
        stop = len(ids) if finished else rng.randint(0, len(ids))
        found.append(Turn(Role.ASSISTANT, Modality.INTERLEAVED, tuple(ids[:stop])))
    return found


def transcript(ids: Sequence[int], vocabulary: Vocabulary) -> str:
    return vocabulary.decode_text(token for token in ids if vocabulary.kind(token) is Kind.TEXT).lstrip()


def num_samples_of(reply: Turn, vocabulary: Vocabulary) -> int:
    num_speech = sum(vocabulary.kind(token) is Kind.SPEECH for token in reply.ids)
    return rates.speak_samples_for_tokens(num_speech)


@pytest.mark.parametrize("finished", [True, False])
def test_the_cut_of_a_session_is_as_it_was(vocabulary: Vocabulary, finished: bool) -> None:
    for reply in replies(vocabulary, finished):
        total = num_samples_of(reply, vocabulary)
        for played in (0, 1, 881, 882, 883, total // 3, total - 1, total, total + 5000):
            played = max(played, 0)
            turn, share = old_session(reply, played, vocabulary, finished)
            heard = heard_part(reply, played, vocabulary, finished=finished)
            assert (heard.turn, heard.share) == (turn, share)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("speed", [1.0, 0.7, 1.5])
def test_the_cut_of_an_item_is_as_it_was(vocabulary: Vocabulary, finished: bool, speed: float) -> None:
    """The ids and the text are; an unfinished reply counts as interrupted now even when all of it was heard."""
    for reply in replies(vocabulary, finished):
        spoken_ms = 1000 * num_samples_of(reply, vocabulary) / rates.SPEAK_SAMPLE_RATE / speed
        for heard_ms in (0.0, 39.9, 40.1, spoken_ms / 3, spoken_ms - 1, spoken_ms, spoken_ms + 100):
            heard_ms = min(max(heard_ms, 0.0), spoken_ms)
            turn, text = old_items(reply, heard_ms, spoken_ms, speed, vocabulary, finished)
            num_samples = int(heard_ms * speed * rates.SPEAK_SAMPLE_RATE / 1000)
            heard = heard_part(reply, num_samples, vocabulary, finished=finished)
            assert heard.turn.ids == (turn.ids if turn is not None else ())
            assert heard.text(transcript(reply.ids, vocabulary)) == text
            if turn is not None and finished:
                assert heard.turn == turn


def test_a_written_reply_counts_as_read(vocabulary: Vocabulary) -> None:
    reply = Turn(Role.ASSISTANT, Modality.TEXT, tuple(vocabulary.encode_text("Seven plus five is twelve.")))
    assert heard_part(reply, 0, vocabulary, finished=True) == HeardPart(reply, 0, 0.0)
    cut = heard_part(reply, 0, vocabulary, finished=False)
    assert cut.turn == dataclasses.replace(reply, interrupted=True)
    assert cut.text("Seven") == "Seven"


def test_an_unfinished_reply_is_interrupted_even_when_all_of_it_was_heard(vocabulary: Vocabulary) -> None:
    ids = weave(vocabulary.encode_text("hello"), vocabulary.speech_ids([1, 2, 3] * 10))
    reply = Turn(Role.ASSISTANT, Modality.INTERLEAVED, tuple(ids))
    total = num_samples_of(reply, vocabulary)
    assert heard_part(reply, total, vocabulary, finished=True).turn == reply
    assert heard_part(reply, total, vocabulary, finished=False).turn == dataclasses.replace(reply, interrupted=True)


def test_a_turn_has_the_modality_of_its_ids(vocabulary: Vocabulary) -> None:
    text, speech = vocabulary.encode_text("hello"), vocabulary.speech_ids([1, 2])
    assert turn_of(Role.USER, text, vocabulary).modality is Modality.TEXT
    assert turn_of(Role.USER, speech, vocabulary, "en") == Turn(Role.USER, Modality.SPEECH, tuple(speech), "en")
    assert turn_of(Role.USER, [*speech, *text], vocabulary).modality is Modality.INTERLEAVED
