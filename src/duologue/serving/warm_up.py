"""Work before the first client: threads are started and buffers are there, so that nobody waits for them."""

from __future__ import annotations

import dataclasses
import gc

import numpy as np

from duologue import rates
from duologue.conversation.chatbot import Chatbot
from duologue.interleave import INTERLEAVED
from duologue.serving.turn_detection import SileroStream

SECONDS = 2.0


def warm_up(bot: Chatbot) -> None:
    """Hears two seconds of faint noise and answers shortly, for nobody. What is not installed shows here.

    What is loaded by then is taken out of the garbage collection: looking through the 400 000 objects of the libraries
    would stop every conversation for about half a second.
    """
    card = bot.models.card
    enough = INTERLEAVED.text_run + 2 * rates.BLOCK_TOKENS
    sampling = dataclasses.replace(card.sampling, max_tokens=min(card.sampling.max_tokens, enough))
    session = bot.session(sampling=sampling)
    noise = np.random.default_rng(0).normal(scale=1e-3, size=int(SECONDS * rates.LISTEN_SAMPLE_RATE))
    wav = noise.astype(np.float32)
    SileroStream().step(wav)
    session.feed(wav, rates.LISTEN_SAMPLE_RATE)
    session.reply_now()
    gc.collect()
    gc.freeze()
