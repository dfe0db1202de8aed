"""Text stays ahead of speech: the text ids of what pocket says, against how long it takes to say."""

import random
import shutil
from pathlib import Path

import pytest

import duologue
from duologue.interleave import INTERLEAVED
from duologue.rates import LISTEN_SAMPLE_RATE, SAMPLES_PER_TOKEN, tokens_for_samples
from duologue.vocabulary import Vocabulary
from recipes.pocket.everything import any_dialogue
from recipes.pocket.repeating import free_words
from recipes.pocket.synthesis import render, reply_request

VOCABULARY = Path(duologue.__file__).parent / "pocket" / "vocabulary"


@pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")
@pytest.mark.slow
def test_a_run_of_text_takes_longer_to_say_than_a_run_of_speech_lasts() -> None:
    assert SAMPLES_PER_TOKEN * INTERLEAVED.speech_run / LISTEN_SAMPLE_RATE == pytest.approx(2.08)
    vocabulary = Vocabulary.load(VOCABULARY)
    rng = random.Random(7)
    said = {(turn.reply, turn.style) for _ in range(3000) for turn in any_dialogue("train", rng).exchanges}
    said |= {(free_words(rng, 12, 16), style) for style in ("plain", "faster") for _ in range(20)}
    long = sorted(pair for pair in said if len(vocabulary.encode_text(pair[0])) > INTERLEAVED.text_run)
    fast = [pair for pair in long if pair[1].startswith("faster")]
    chosen = rng.sample(long, min(len(long), 40)) + fast
    requests = [reply_request(reply, style) for reply, style in chosen]
    for (reply, style), clip in zip(chosen, render(requests), strict=True):
        num_text, num_speech = len(vocabulary.encode_text(reply)), tokens_for_samples(len(clip))
        assert num_speech >= INTERLEAVED.min_speech(num_text), (
            f"{style}: {reply} ({num_text} text, {num_speech} speech)"
        )
