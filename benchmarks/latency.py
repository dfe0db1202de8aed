"""Benchmark `latency`: what one reply costs, stage by stage, and the time to first audio of a whole conversation.

The stages are measured alone, each with the work that lies between the end of the question and the first sound: the
last block of the tokenizer, prefill, the decode steps of one text run and one block of speech tokens, the first block
of the flow, and its vocoder. Whole replies are measured through a session that hears its question in chunks, as from a
microphone, so what can be computed while the user talks is not counted; the baseline gets its question at once, when it
has been said, as the released code does. Last, the time to the first token by the length of the question and of the
conversation, see `commit.py`.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.commit import NUM_TURNS, SPEECH_S, CommitTimes, measure_commits, say
from benchmarks.harness import Spread, now
from benchmarks.plots import draw_lines, draw_stack
from duologue import progress, rates
from duologue.audio import resample
from duologue.conversation.chatbot import Chatbot
from duologue.conversation.events import AudioDelta, ReplyDone, Timings
from duologue.decoder.flow import state_bytes
from duologue.evaluation.report import Row
from duologue.interleave import INTERLEAVED, SPEECH_ONLY
from duologue.layers import Padded
from duologue.models import Models
from duologue.turns import Conversation, Modality, Role, Turn

CHUNK_S = 0.1  # of the question, as a microphone gives it
PARTS = (
    "part 1 of 6, speech tokenizer",
    "part 2 of 6, language model",
    "part 3 of 6, speech decoder",
    "part 4 of 6, replies",  # the last parts are those of `measure_commits`
)
WHOLE_REPLIES = 3  # that are made to their end; a reply is made as it is played, so that takes its time


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one piece of work, over all repetitions."""

    median_ms: float
    p95_ms: float
    note: str = ""


@dataclass(frozen=True)
class Latency:
    """Attributes:
    stages: by name, in the order in which they run.
    chain_ms: sum of the medians: the least possible time to first audio.
    first_audio_s: of whole replies; None when none had any sound.
    baseline_first_audio_s: the same when nothing was heard ahead.
    real_time_factor: seconds of work by all stages for each second of the reply's sound, of the last replies.
    reply_s: median length of those.
    commit: from the end of speech to the first token.
    state_mb: megabytes of the states of one session.
    """

    question_s: float
    repetitions: int
    stages: dict[str, Timing]
    chain_ms: float
    first_audio_s: Spread | None
    baseline_first_audio_s: Spread | None
    real_time_factor: Spread | None
    reply_s: float
    commit: CommitTimes
    state_mb: dict[str, float] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """The figures for a terminal."""
        silent = "no reply had any sound"
        rows = [
            Row("stage", name, timing.median_ms, "ms", note=", ".join(filter(None, (timing.note, _p95(timing)))))
            for name, timing in self.stages.items()
        ]
        rows.append(Row("stage", "sum", self.chain_ms, "ms"))
        for name, unit, spread, note in (
            ("time to first audio", "s", self.first_audio_s, "after the end of the question"),
            ("time to first audio, nothing heard ahead", "s", self.baseline_first_audio_s, ""),
            ("real-time factor", "", self.real_time_factor, f"replies of {self.reply_s:.1f} s"),
        ):
            empty = Row("reply", name, None, unit, skipped=silent)
            rows.append(empty if spread is None else spread.row("reply", name, unit, note))
        group = "end of speech to first token"
        for (seconds, spread), (_, rest) in zip(self.commit.by_speech, self.commit.open_block_s, strict=True):
            rows.append(spread.row(group, f"after {seconds:g} s of speech", "ms", f"{rest:.1f} s in the open block"))
        rows += [spread.row(group, f"turn {turn}", "ms") for turn, spread in self.commit.by_turn]
        rows += [Row("state of one session", name, size, "MB") for name, size in self.state_mb.items()]
        return rows + self.commit.aims()

    def draw(self, figure: Any) -> None:
        """The stages as one bar, and the time to the first token by the length of the speech."""
        bar, curve = figure.subplots(1, 2, width_ratios=[3, 2])
        parts = {name: timing.median_ms for name, timing in self.stages.items()}
        draw_stack(bar, parts, "what lies between question and first sound", "ms")
        at = [seconds for seconds, _ in self.commit.by_speech]
        waits = {
            "median": (at, [spread.median for _, spread in self.commit.by_speech]),
            "p95": (at, [spread.p95 for _, spread in self.commit.by_speech]),
        }
        draw_lines(curve, waits, "end of speech to first token", "seconds of speech", "ms")


def measure_latency(
    bot: Chatbot,
    question: NDArray[np.float32],
    sample_rate: int,
    repetitions: int = 10,
    warm_up: int = 2,
    speech_s: Sequence[float] = SPEECH_S,
    num_turns: int = NUM_TURNS,
) -> Latency:
    """Runs every stage, then whole replies, `warm_up` times uncounted and `repetitions` times counted.

    Args:
        question: wav (S,) float32.
        speech_s, num_turns: of `measure_commits`, which repeats a third as often.

    Raises:
        ValueError: fewer than one repetition, or a question that the chatbot cannot use.
    """
    if repetitions < 1 or warm_up < 0:
        raise ValueError(f"repetitions must be at least 1 and warm_up not negative, got {repetitions} and {warm_up}")
    wav = resample(question, sample_rate, rates.LISTEN_SAMPLE_RATE)
    models, rounds = bot.models, warm_up + repetitions
    with torch.inference_mode():
        codes, listen_mb = _codes(models, wav)
        listening = _times(rounds, warm_up, lambda _: _time_tokenizer(models, wav), PARTS[0])
        prefill, steps = _time_language(models, codes, rounds, warm_up)
        flow, vocoder, speak_mb = _time_decoder(models, codes, rounds, warm_up)
    num_steps = INTERLEAVED.text_run + rates.BLOCK_TOKENS
    decode = [num_steps * step for step in steps]
    stages = {
        "features and tokenizer, last block": _timing(listening),
        "prefill": _timing(prefill, f"{len(codes)} speech tokens"),
        f"{num_steps} decode steps": _timing(decode, f"{statistics.median(steps) * 1000:.2f} ms each"),
        "flow, first block": _timing(flow, f"{models.card.num_steps or models.decoder.flow.config.num_steps} steps"),
        "vocoder, first block": _timing(vocoder),
    }
    ahead, at_once = [], []
    for index in progress.steps(range(rounds), PARTS[3]):
        whole = index >= rounds - WHOLE_REPLIES
        ahead.append(asyncio.run(_time_reply(bot, wav, 2 * index, True, whole)))
        at_once.append(asyncio.run(_time_reply(bot, wav, 2 * index + 1, False, False)))
    ahead, at_once = ahead[warm_up:], at_once[warm_up:]
    spoken = [timings for timings in ahead[-WHOLE_REPLIES:] if timings.audio_s > 0]
    commit = measure_commits(bot, max(repetitions // 3, 1), min(warm_up, 1), speech_s, num_turns)
    return Latency(
        question_s=len(wav) / rates.LISTEN_SAMPLE_RATE,
        repetitions=repetitions,
        stages=stages,
        chain_ms=sum(timing.median_ms for timing in stages.values()),
        first_audio_s=_first_audio(ahead),
        baseline_first_audio_s=_first_audio(at_once),
        real_time_factor=_spread([sum(timings.stages.values()) / timings.audio_s for timings in spoken]),
        reply_s=statistics.median([timings.audio_s for timings in spoken] or [0.0]),
        commit=commit,
        state_mb={"tokenizer": listen_mb, "decoder": speak_mb},
    )


def _codes(models: Models, wav: NDArray[np.float32]) -> tuple[list[int], float]:
    """The question's codes, and MB of the state that hears it."""
    state = models.tokenizer.init_state(1)
    x = Padded.full(torch.from_numpy(wav)[None].to(_device(models)))
    codes = models.tokenizer.step(x, state).rows()[0].tolist()
    size = state_bytes(state) / 1e6
    return [*codes, *models.tokenizer.flush(state).rows()[0].tolist()], size


def _time_tokenizer(models: Models, wav: NDArray[np.float32]) -> float:
    """Seconds from the last chunk of the question to its last codes; those before are heard while it is said."""
    size = int(CHUNK_S * rates.LISTEN_SAMPLE_RATE)
    state = models.tokenizer.init_state(1)
    chunks = [torch.from_numpy(wav[at : at + size])[None].to(_device(models)) for at in range(0, len(wav), size)]
    for chunk in chunks[:-1]:
        models.tokenizer.step(Padded.full(chunk), state)
    start = _now(models)
    models.tokenizer.step(Padded.full(chunks[-1]), state)
    models.tokenizer.flush(state)
    return _now(models) - start


def _time_language(models: Models, codes: list[int], rounds: int, warm_up: int) -> tuple[list[float], list[float]]:
    """Seconds of each prefill, and of a decode step in each round (its median).

    Every round begins with another code, since the engine keeps the keys and values of prompts that it has seen.
    """
    prefill, steps = [], []
    size = models.vocabulary.codebook_size
    num_steps = INTERLEAVED.text_run + rates.BLOCK_TOKENS
    for index in progress.steps(range(rounds), PARTS[1]):
        changed = [(codes[0] + 1 + index) % size, *codes[1:]]
        turn = Turn(Role.USER, Modality.SPEECH, tuple(models.vocabulary.speech_ids(changed)))
        prompt = models.vocabulary.prompt_ids(Conversation((turn,)))
        times = asyncio.run(_id_times(models, prompt, num_steps + 1, index))
        if len(times) < 3:
            continue
        if index >= warm_up:
            prefill.append(times[1] - times[0])
            steps.append(statistics.median(np.diff(times[1:])))
    if not steps:
        raise ValueError(f"{models.card.name} ended every reply at once, so no decode step could be measured")
    return prefill, steps


async def _id_times(models: Models, prompt: list[int], max_tokens: int, seed: int) -> list[float]:
    """The moment of asking, then that of each id of the reply."""
    sampling = replace(models.card.sampling, max_tokens=max_tokens, seed=seed)
    times = [_now(models)]
    # Speech alone: a reply of any model lasts long enough, and a step costs the same whatever it says.
    async for _ in models.engine.generate(prompt, sampling, SPEECH_ONLY):
        times.append(_now(models))
    return times


def _time_decoder(
    models: Models, codes: list[int], rounds: int, warm_up: int
) -> tuple[list[float], list[float], float]:
    """Seconds of flow and of vocoder for the first block, and MB of the state that speaks after four blocks."""
    block = (codes * rates.BLOCK_TOKENS)[: rates.BLOCK_TOKENS]
    tokens = Padded.full(torch.tensor([block], device=_device(models)))
    flow, vocoder = [], []
    for _ in progress.steps(range(rounds), PARTS[2]):
        state = models.decoder.init_state(1, models.card.num_steps, models.card.guidance_scale)
        start = _now(models)
        mel = models.decoder.flow.step(tokens, state.flow)
        between = _now(models)
        models.decoder.vocoder.step(mel, state.vocoder)
        flow.append(between - start)
        vocoder.append(_now(models) - between)
    for _ in range(3):
        models.decoder.step(tokens, state)
    return flow[warm_up:], vocoder[warm_up:], state_bytes(state) / 1e6


async def _time_reply(bot: Chatbot, wav: NDArray[np.float32], index: int, ahead: bool, whole: bool) -> Timings:
    """One reply, to its end or its first sound.

    The question begins with a moment of faint noise, never the same: see `_time_language`.
    """
    noise = np.random.default_rng(index).standard_normal(rates.SAMPLES_PER_TOKEN).astype(np.float32) * 1e-3
    session = bot.session(sampling=replace(bot.models.card.sampling, seed=index))
    said = np.concatenate([noise, wav])
    if ahead:
        await say(session, said)
    timings = Timings()
    start = time.perf_counter()
    if not ahead:
        session.feed(said)
    first_audio_s: float | None = None
    async for event in session.reply():
        if isinstance(event, AudioDelta) and first_audio_s is None and len(event.wav):
            first_audio_s = time.perf_counter() - start
            if not whole:
                session.interrupt(0)
        if isinstance(event, ReplyDone):
            timings = event.timings
    return replace(timings, first_audio_s=first_audio_s)


def _first_audio(replies: list[Timings]) -> Spread | None:
    return _spread([timings.first_audio_s for timings in replies if timings.first_audio_s is not None])


def _times(rounds: int, warm_up: int, work: Callable[[int], float], name: str) -> list[float]:
    return [work(index) for index in progress.steps(range(rounds), name)][warm_up:]


def _now(models: Models) -> float:
    return now(_device(models))


def _device(models: Models) -> torch.device:
    return models.tokenizer.quantizer.codebook.weight.device


def _timing(seconds: list[float], note: str = "") -> Timing:
    return Timing(1000 * statistics.median(seconds), 1000 * float(np.percentile(seconds, 95)), note)


def _p95(timing: Timing) -> str:
    return f"p95 {timing.p95_ms:.1f} ms"


def _spread(values: list[float]) -> Spread | None:
    return Spread.of(values) if values else None
