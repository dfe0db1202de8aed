"""Free speech in many voices: which sentence is said by which voice in which manner, drawn from a seed.

A shard has the same mixture as any other: `SHARES` of the voices, `_draw_text` of the texts.
Held out, never in training: the voices `HELD_OUT_VOICES`, the formant factors `warps.RESERVED_FORMANTS` and 3 of 100
sentences of the fortunes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from math import log2
from pathlib import Path
from random import Random

from recipes.pocket.curriculum import sentence
from recipes.pocket.everything import any_dialogue
from recipes.pocket.natural_text import FORTUNES, ChainedText, fortune_sentences, is_held_out
from recipes.pocket.plans import PlannedClip
from recipes.pocket.repeating import free_text, free_words
from recipes.pocket.synthesis import NATURAL_REPLY_VOICE, TRAINING_VOICES, UNSEEN_VOICES, Request
from recipes.pocket.warps import Warp, draw_warp

SHARD_HOURS = 0.6  # of the clips that `SHARES` counts
HELD_OUT_VOICES = tuple(voice.id for voice in UNSEEN_VOICES)
TEST_SPLITS = ("test", "test_unseen", "test_warped")
CHECKS = ("natural", "warped", "unseen")
NATURAL_MIX = ("joe", "joe", "hibari", "hibari", "hibari")  # of the natural clips that are checked
FORTUNE_SHARE = 0.40
VALID_SHARE = 0.02
ESPEAK_FASTEST = 1.15
UNREADABLE_VOICES = ("espeak-en-gb-x-rp+antonio", "espeak-en-us+paul")  # WER 42 and 32 % as they are
LONGEST_QUESTION = 160  # characters
_ESPEAK = tuple(voice.id for voice in TRAINING_VOICES if voice.engine == "espeak")
# Clips of each voice among the 800 that are drawn for a shard. joe comes first: its clips are rendered in one go.
SHARES: dict[str, int] = {
    "joe": 64,
    "hibari": 384,
    "flite-slt": 40,
    "flite-awb": 40,
    "flite-kal16": 32,
    "flite-kal": 16,
    "festival-slt-hts": 32,
    "festival-kal": 32,
    "espeak": 160,  # all variants
}
# By which factor each program can scale F0 by itself, and the F0 factors that leave it human.
_OWN_F0 = {"hibari": (0.55, 1.7), "joe": (0.7, 1.6)}
_OTHER_OWN_F0 = (0.67, 1.5)


@dataclass(frozen=True)
class Texts:
    """What is said. `train` and `valid` are sentences of the fortunes that no other split has."""

    train: tuple[str, ...]
    valid: tuple[str, ...]
    chained: ChainedText


@lru_cache(maxsize=1)
def natural_texts(folder: Path = FORTUNES) -> Texts:
    """The natural sentences, split into those of training and those held out."""
    sentences = fortune_sentences(folder)
    train = tuple(text for text in sentences if not is_held_out(text))
    return Texts(train, tuple(text for text in sentences if is_held_out(text)), ChainedText(train))


def num_clips(scale: float = 1.0) -> int:
    """Clips that are drawn for one shard; a few of them are not readable and left out."""
    return sum(round(share * scale) for share in SHARES.values())


def plan_natural(seed: int, shard: int, texts: Texts, scale: float = 1.0) -> list[PlannedClip]:
    """All clips of one shard; `scale` makes it smaller.

    A program says a sentence of the fortunes again only after it has said all the others.
    """
    rng = Random(f"natural|{seed}|{shard}")
    planned = []
    for group, share in SHARES.items():
        count = round(share * scale)
        fortunes = round(count * FORTUNE_SHARE)
        order = list(texts.train)
        Random(f"fortunes|{seed}|{group}").shuffle(order)
        drawn = [("fortune", order[(shard * fortunes + index) % len(order)]) for index in range(fortunes)]
        while len(drawn) < count:
            drawn.append(_draw_text(texts, rng))
        for intent, text in drawn:
            split = "train"
            if rng.random() < VALID_SHARE:
                split, intent, text = "valid", "fortune", rng.choice(texts.valid)
            planned.append(_planned(text, intent, split, group, rng))
    return [clip for clip in planned if is_readable(clip.request)]


def num_word_clips(scale: float = 1.0) -> int:
    """Clips that are drawn for one shard of random words, as `num_clips`."""
    return num_clips(scale) * 3 // 2


def plan_words(seed: int, shard: int, scale: float = 1.0) -> list[PlannedClip]:
    """All clips of one shard of words in random order, which only a hearer of each word can write down.

    Half as many clips again are in the voice of the replies as it is: repeating words aloud is learned from them.
    """
    rng = Random(f"words|{seed}|{shard}")
    planned = []
    for group, share in SHARES.items():
        for _ in range(round(share * scale)):
            planned.append(_planned(_words(rng), "words", "train", group, rng))
    for _ in range(num_word_clips(scale) - num_clips(scale)):
        request = Request(_words(rng), NATURAL_REPLY_VOICE.id, seed=rng.randrange(2**31))
        planned.append(PlannedClip(request, "reply", "train", "words"))
    return [clip for clip in planned if is_readable(clip.request)]


def _words(rng: Random) -> str:
    return sentence(free_words(rng, 2, 12)) + "."


def is_readable(request: Request) -> bool:
    """Whether Whisper base reads such a clip.

    It does not read fast espeak-ng (WER 42 %), two of its variants and the 8 kHz voice of flite warped (40 %).
    """
    if request.voice in UNREADABLE_VOICES:
        return False
    if request.voice.startswith("espeak-"):
        return request.rate <= ESPEAK_FASTEST
    return request.voice != "flite-kal" or request.formants == 1.0


def plan_check(
    seed: int, kind: str, texts: Texts | None, count: int = 150, natural: tuple[str, ...] = NATURAL_MIX
) -> list[PlannedClip]:
    """A small set that training never hears: held-out sentences and held-out phrasings of the curriculum.

    `kind`: "unseen" (held-out voices), "warped" (natural voices in reserved warps), "natural" (as they are). Without
    texts all of it is the curriculum's. Raises `ValueError` for another kind.
    """
    if kind not in CHECKS:
        raise ValueError(f"unknown kind {kind!r}; the kinds are {', '.join(CHECKS)}")
    rng = Random(f"check|{seed}|{kind}")
    sentences = rng.sample(texts.valid, count * 2 // 3) if texts is not None else []
    planned = []
    for index in range(count):
        intent, text = ("fortune", sentences[index]) if index < len(sentences) else _question("test", rng)
        voice = natural[index % len(natural)]
        if kind == "unseen":
            request = _unseen(text, HELD_OUT_VOICES[index % len(HELD_OUT_VOICES)], rng)
        elif kind == "warped":
            warp = draw_warp(rng, reserved=True, residual=_OWN_F0.get(voice, _OTHER_OWN_F0))
            request = _warped(text, voice, warp, round(rng.uniform(0.85, 1.2), 3), rng)
        else:
            request = Request(text, voice, seed=rng.randrange(2**31))
        planned.append(PlannedClip(request, "free", "valid", intent))
    return sorted(planned, key=lambda one: one.request.voice != "joe")


def natural_speaker(split: str, rng: Random) -> Request:
    """One speaker of the dialogues: any voice and warp of training, or by the split of the test one of its own.

    "test" has training's voices, "test_unseen" voices and "test_warped" warps that training never hears.
    """
    if split == "test_unseen":
        return _unseen("", rng.choice(HELD_OUT_VOICES), rng)
    if split == "test_warped":
        voice = rng.choice(NATURAL_MIX)
        warp = draw_warp(rng, reserved=True, residual=_OWN_F0[voice])
        return _warped("", voice, warp, round(rng.uniform(0.85, 1.2), 3), rng)
    while True:
        group = rng.choices(list(SHARES), list(SHARES.values()))[0]
        request = _planned("", "", split, group, rng).request
        if is_readable(request):
            return request


def _unseen(text: str, voice: str, rng: Random) -> Request:
    return Request(text, voice, round(rng.uniform(0.85, 1.2), 3), round(rng.gauss(0.0, 1.0), 2))


def _planned(text: str, intent: str, split: str, group: str, rng: Random) -> PlannedClip:
    """One clip by a voice of the group in a random manner."""
    voice = rng.choice(_ESPEAK) if group == "espeak" else group
    rate = round(rng.uniform(0.75, 1.35), 3)
    chance = rng.random()
    seed = rng.randrange(2**31)
    if group == "hibari":
        if chance < 0.15:
            return PlannedClip(Request(text, voice, seed=seed), "reply", split, intent)
        warp = Warp() if chance < 0.30 else draw_warp(rng, residual=_OWN_F0["hibari"])
    elif group == "joe":
        warp = draw_warp(rng, residual=_OWN_F0["joe"])
        if chance < 0.70:  # the rest needs WORLD, which is slow
            warp = Warp() if chance < 0.35 else Warp(warp.formants, warp.formants)
    elif chance < 0.4:
        pitch = round(min(4.0, max(-4.0, rng.gauss(0.0, 1.7))), 2)
        return PlannedClip(Request(text, voice, rate, pitch, seed=seed), "free", split, intent)
    else:
        warp = draw_warp(rng, residual=_OTHER_OWN_F0)
    return PlannedClip(_warped(text, voice, warp, rate, rng), "free", split, intent)


def _warped(text: str, voice: str, warp: Warp, rate: float, rng: Random) -> Request:
    pitch = 12 * log2(warp.f0)
    return Request(text, voice, rate, round(pitch, 3), seed=rng.randrange(2**31), formants=warp.formants)


def _draw_text(texts: Texts, rng: Random) -> tuple[str, str]:
    """(intent, text) of what is no fortune: chained sentences, the curriculum, free words."""
    chance = rng.random()
    if chance < 0.36:
        return "chained", texts.chained.draw(rng)
    if chance < 0.60:
        return _question("train", rng)
    if chance < 0.74:
        drawn = any_dialogue("train", rng)
        sentences = re.findall(r"[^.?!]+[.?!]", rng.choice(drawn.exchanges).reply)
        return drawn.intent, sentence(rng.choice(sentences).strip())
    return "free", sentence(free_text(rng)) + ("?" if rng.random() < 0.1 else ".")


def _question(split: str, rng: Random) -> tuple[str, str]:
    """(intent, text) of a question of the curriculum that is no sound."""
    while True:
        drawn = any_dialogue(split, rng)
        text = rng.choice(drawn.exchanges).user
        if text and len(text) <= LONGEST_QUESTION:
            return drawn.intent, text
