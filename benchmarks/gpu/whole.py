"""Section `sessions`: whole conversations at once in one process, in real time."""

from __future__ import annotations

import time

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.decoder import num_steps, published_decoder
from benchmarks.gpu.language import preset_of
from benchmarks.gpu.record import Run
from benchmarks.sessions import Crowd, measure_sessions
from duologue import rates
from duologue.conversation.chatbot import Chatbot
from duologue.language.engine import PlainEngine
from duologue.language.graphs import GraphStepper
from duologue.language.sampling import Sampling
from duologue.models import Card, Models
from duologue.tokenizer.tokenizer import SpeechTokenizer

QUESTION_S = 2.0
MAX_SESSIONS = 64
MAX_TOKENS = 90  # ids of a reply: some 60 of speech, 4.8 s


def sessions(run: Run) -> None:
    """Measures 1 to 64 conversations with the parts of the package as they are."""
    record = run.record
    bot = random_chatbot(run)
    with record.attempt("capture"):
        start = time.perf_counter()
        num_graphs = bot.models.decoder.capture(bot.worker.max_rows)
        run.sync()
        record.add("capture", time.perf_counter() - start, "s", graphs=num_graphs)
    question = (0.1 * np.random.default_rng(0).standard_normal(int(QUESTION_S * rates.LISTEN_SAMPLE_RATE))).astype(
        np.float32
    )
    for count in (2,) if run.tiny else (1, 8, 16, 32, 64):
        if run.left_s < (0 if run.tiny else 12):
            record.add("conversations", None, reason="no time", sessions=count)
            continue
        with record.attempt(f"{count} conversations"):
            _crowd(run, bot, count, question)
    bot.worker.close()


def random_chatbot(run: Run) -> Chatbot:
    """Returns a chatbot of the language model of the run and random other parts."""
    language, vocabulary = run.models["language"], run.models["vocabulary"]
    with run.device:
        tokenizer = SpeechTokenizer(preset_of(run).tokenizer).eval().requires_grad_(False)
    whole = published_decoder(run)
    if run.on_cuda:
        whole.flow.estimate_in(torch.bfloat16)
    engine = PlainEngine(language, vocabulary, max_sessions=MAX_SESSIONS, stepper=_graph_stepper(run))
    sampling = Sampling(temperature=0.8, max_tokens=30 if run.tiny else MAX_TOKENS)
    card = Card("random", False, sampling=sampling, num_steps=num_steps(run))
    return Chatbot(Models(tokenizer, vocabulary, engine, whole, card))


def _graph_stepper(run: Run) -> GraphStepper | None:
    """Returns a stepper with its graphs captured; None off CUDA and after a failure, which the record holds."""
    if not run.on_cuda:
        return None
    with run.record.attempt("graphs of the language model"):
        stepper = GraphStepper(run.models["language"], run.models["vocabulary"], 2 * MAX_SESSIONS, 1024)
        run.record.add("capture of the language model", stepper.warm_up(MAX_SESSIONS), "s", graphs=stepper.num_graphs)
        return stepper
    return None


def _crowd(run: Run, bot: Chatbot, count: int, question: NDArray[np.float32]) -> None:
    seconds = 0.5 if run.tiny else 9.0 if count == 1 else 4.0
    crowd: Crowd = measure_sessions(bot, [count], seconds, 0, [question]).crowds[0]
    first = crowd.first_audio_s
    batches = sum(crowd.batch_sizes.values())
    run.record.add(
        "first sound",
        None if first is None else first.median,
        "s",
        sessions=count,
        p95=None if first is None else round(first.p95, 3),
        replies=len(crowd.exchanges),
        unanswered=crowd.unanswered,
        refused=len(crowd.refused),
    )
    run.record.add("underruns", crowd.num_underruns, "", sessions=count, seconds=round(crowd.underrun_s, 2))
    mean_rows = sum(rows * num for rows, num in crowd.batch_sizes.items()) / max(batches, 1)
    run.record.add("rows of a batch", mean_rows, "", sessions=count, batches=batches)
    run.record.add("sound", crowd.audio_s / crowd.duration_s, "s per s", sessions=count, load=round(crowd.load, 2))
