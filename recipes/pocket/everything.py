"""The whole curriculum: every intent and kind of dialogue, every fact as text, every text for the text tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from recipes.pocket.curriculum import Conversing, Dialogue, Exchange, Intent, exchange, pick, sentence
from recipes.pocket.facts import ANIMALS, COLOURS, COUNTRIES, DAYS, MONTHS, OPPOSITES, SEASONS
from recipes.pocket.mandarin import MANDARIN
from recipes.pocket.manner_of_speech import STYLE_DIALOGUES
from recipes.pocket.memory import MEMORY_DIALOGUES
from recipes.pocket.numbers import NUMBER_INTENTS, counting, spell
from recipes.pocket.questions import FACT_INTENTS, article
from recipes.pocket.repeating import REPEAT_INTENTS, free_text
from recipes.pocket.small_talk import OUTSIDE_INTENTS, SMALL_TALK_INTENTS, SOUND_REPLIES
from recipes.pocket.sounds import SOUNDS
from recipes.pocket.stories import STORY_INTENTS

INTENTS: tuple[Intent, ...] = (
    FACT_INTENTS + NUMBER_INTENTS + REPEAT_INTENTS + SMALL_TALK_INTENTS + OUTSIDE_INTENTS + STORY_INTENTS
)


def _sound(split: str, rng: Random) -> Dialogue:
    """A dialogue in which the user makes a sound without speech."""
    del split
    reply = rng.choice(SOUND_REPLIES)
    return Dialogue("not_speech", (Exchange("", reply, ("sorry",), sound=rng.choice(SOUNDS)),))


def _several(split: str, rng: Random) -> Dialogue:
    """Two or three unrelated questions in a row."""
    turns = tuple(exchange(pick(INTENTS, rng), split, rng) for _ in range(rng.choice((2, 2, 3))))
    return Dialogue("several", turns)


DIALOGUES: tuple[Conversing, ...] = (
    *MEMORY_DIALOGUES,
    *STYLE_DIALOGUES,
    Conversing("not_speech", 3.0, _sound),
    Conversing("several", 8.0, _several),
)


def dialogue(kind: Intent | Conversing, split: str, rng: Random) -> Dialogue:
    """One dialogue of a kind; an intent makes a dialogue of one exchange."""
    if isinstance(kind, Conversing):
        return kind.make(split, rng)
    return Dialogue(kind.name, (exchange(kind, split, rng),))


KINDS: tuple[Intent | Conversing, ...] = INTENTS + DIALOGUES


def any_dialogue(split: str, rng: Random) -> Dialogue:
    """A dialogue of any kind, drawn by weight. `split` is train, test or text."""
    kind = rng.choices(KINDS, [kind.weight for kind in KINDS])[0]
    return dialogue(kind, split, rng)


def facts() -> list[str]:
    """Every fact of the tables as statements in every direction, for the text of stage 1."""
    said: list[str] = []
    for country, capital, continent in COUNTRIES:
        said += [f"The capital of {country} is {capital}.", f"{capital} is the capital of {country}."]
        said += [
            f"{country} is in {continent}.",
            f"{capital} is in {country}.",
            f"A country in {continent} is {country}.",
        ]
    for name, names in (("day", DAYS), ("month", tuple(m for m, _, _ in MONTHS)), ("season", SEASONS)):
        for this, following in zip(names, names[1:] + names[:1], strict=True):
            said += [f"The {name} after {this} is {following}.", f"The {name} before {following} is {this}."]
    for month, days, season in MONTHS:
        said += [f"{month} has {days} days.", f"{month} is in {season}."]
    for one, other in OPPOSITES:
        said += [f"The opposite of {one} is {other}.", f"The opposite of {other} is {one}."]
    for animal, sound, young in ANIMALS:
        said += [f"The sound of {article(animal)} is {sound}.", f"A baby {animal} is {article(young)}."]
        said += [f"The young of {article(animal)} is {article(young)}.", f"{article(young)} becomes {article(animal)}."]
    for thing, verb, colour in COLOURS:
        said += [f"{thing} {verb} {colour}.", f"The color of {thing} is {colour}."]
    for a in range(21):
        for b in range(21):
            said += [
                f"{spell(a)} plus {spell(b)} is {spell(a + b)}.",
                f"{spell(a)} times {spell(b)} is {spell(a * b)}.",
            ]
            if a >= b:
                said.append(f"{spell(a)} minus {spell(b)} is {spell(a - b)}.")
    for a in range(100):
        said += [f"{spell(a + 1)} comes after {spell(a)}.", f"{spell(a)} comes before {spell(a + 1)}."]
        said.append(f"{spell(a + 1)} is larger than {spell(a)}.")
    said += [counting(0, 20) + ".", counting(20, 0) + "."]
    return [sentence(text) for text in said]


def texts(seed: int = 0, count: int = 60000) -> Iterator[str]:
    """Sentences with everything that the text tokenizer must encode: facts, dialogues, free words, Mandarin."""
    rng = Random(f"texts|{seed}")
    yield from facts()
    for _ in range(20):  # a small file beside a large one would leave the other script in single bytes
        for question, answer in MANDARIN:
            yield question
            yield answer
    made = 0
    while made < count:
        for turn in any_dialogue("text", rng).exchanges:
            if turn.user:
                yield turn.user
            yield turn.reply
            made += 2
        if rng.random() < 0.15:
            yield sentence(free_text(rng)) + "."
            made += 1
