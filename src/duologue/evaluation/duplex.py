"""Full-Duplex-Bench: a server is driven in real time, and its figures are computed offline from what it said when.

Take-over: the reply has more than 3 words or lasts 1 s or more. Latencies are from the end of the turn (v1.0), or from
the beginning and end of the overlap (v1.5), to the first and last sound. Speech is found by its level, where the
benchmark has Silero's detector; the replies of a server are silent between their parts. Behavior classes and relevance
need the benchmark's own judge, and the divergence of backchannels needs its table of people. Neither is computed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray
from tqdm import tqdm

from duologue import machine
from duologue.audio import resample
from duologue.client.connection import WIRE_RATE, open_connection, realtime_url
from duologue.client.conversation import TalkClient, TalkSettings
from duologue.client.playback import CHUNK, Playback, Ticker, in_real_time
from duologue.evaluation.benchmarks.fullduplexbench import (
    BACKCHANNEL,
    INTERRUPTION,
    OVERLAP,
    PAUSE,
    DuplexItem,
    load,
)
from duologue.evaluation.recognition import TimedRecognizer, TimedWord
from duologue.evaluation.report import Report, format_markdown
from duologue.evaluation.runner import open_run
from duologue.evaluation.scores import MissingFigure, Score, Scored, score_rows
from duologue.evaluation.suite import OWN_FOLDER, Listener, SuiteSettings
from duologue.evaluation.testset import spread
from duologue.pcm import to_int16
from duologue.sound_files import load_audio

NAME = "full-duplex-bench"
NO_PROMPT = "needs the benchmark's own judge; its scripts run on the folder `own`"
TAKE_OVER_S, TAKE_OVER_WORDS, BACKCHANNEL_S = 1.0, 3, 3.0
REPLY_GAP_S = 0.5  # shorter silences are within one stretch of the model's speech
_FRAME_S, _LEVEL = 0.01, 0.003


@dataclass(frozen=True)
class SpeechSpan:
    """A stretch of speech, in seconds."""

    start: float
    end: float


def speech_spans(wav: NDArray[np.float32], sample_rate: int, gap_s: float = REPLY_GAP_S) -> list[SpeechSpan]:
    """Stretches of wav (S,) above -50 dB, joined over gaps shorter than `gap_s`."""
    hop = round(_FRAME_S * sample_rate)
    frames = wav[: len(wav) // hop * hop].reshape(-1, hop)
    loud = np.flatnonzero(np.sqrt((frames.astype(np.float64) ** 2).mean(-1)) > _LEVEL)
    spans: list[SpeechSpan] = []
    for frame in loud:
        start, end = float(frame * _FRAME_S), float((frame + 1) * _FRAME_S)
        if spans and start - spans[-1].end < gap_s:
            spans[-1] = SpeechSpan(spans[-1].start, end)
        else:
            spans.append(SpeechSpan(start, end))
    return spans


async def _converse(server: str, model: str, key: str, pcm: NDArray[np.int16]) -> NDArray[np.int16]:
    playback = Playback(WIRE_RATE)
    played: list[NDArray[np.int16]] = []

    async def play(ticker: Ticker) -> None:
        while True:
            await ticker.tick()
            played.append(playback.take(CHUNK))

    async with open_connection(server, model, key) as connection:
        talk = TalkClient(connection, playback, TalkSettings(transcribe=False), lambda event: None)
        playing = asyncio.create_task(play(Ticker()))
        try:
            summary = await talk.run(in_real_time(pcm, Ticker()))
        finally:
            playing.cancel()
            await asyncio.gather(playing, return_exceptions=True)
        if summary.ended_by:
            raise ValueError(summary.ended_by)
    out = np.concatenate([*played, np.zeros(len(pcm), np.int16)])
    return out[: len(pcm)]


def drive(items: Sequence[DuplexItem], server: str, model: str, key: str, own: Path, num_at_once: int = 1) -> None:
    """Plays each sound to the server in real time and writes `TASK/ID/output.wav`; what exists is left.

    Args:
        own: folder of the results.
        num_at_once: conversations at a time; more than one may slow the server down and spoil its latencies.

    Raises:
        ValueError: the server cannot be reached, or ends a conversation.
    """

    async def drive_all() -> None:
        waiting = iter([item for item in items if not (own / item.id / "output.wav").is_file()])
        with tqdm(total=len(items), desc="Full-Duplex-Bench", disable=None) as progress:

            async def work() -> None:
                for item in waiting:
                    wav, rate = load_audio(item.sound)
                    pcm = await _converse(server, model, key, to_int16(resample(wav, rate, WIRE_RATE)))
                    place = own / item.id
                    place.mkdir(parents=True, exist_ok=True)
                    soundfile.write(place / "new.wav", pcm, WIRE_RATE, subtype="PCM_16")
                    (place / "new.wav").rename(place / "output.wav")
                    progress.update()

            async with asyncio.TaskGroup() as group:
                for _ in range(num_at_once):
                    group.create_task(work())

    try:
        asyncio.run(drive_all())
    except* ValueError as errors:
        raise ValueError(str(errors.exceptions[0])) from None


def read_words(items: Sequence[DuplexItem], own: Path, recognizer: TimedRecognizer) -> None:
    """Writes `TASK/ID/output.json` with the words and times that the recognizer finds in `output.wav`."""
    for item in tqdm(items, "recognizer", disable=None, leave=False):
        path = own / item.id / "output.json"
        if not path.is_file():
            words = recognizer.words(*load_audio(path.with_name("output.wav")))
            chunks = [{"text": word.text, "timestamp": [word.start, word.end]} for word in words]
            text = {"text": " ".join(word.text for word in words), "chunks": chunks}
            path.write_text(json.dumps(text, ensure_ascii=False), encoding="utf-8")


def words_of(own: Path, item: DuplexItem) -> list[TimedWord] | None:
    """The words in `output.json`; None where no recognizer listened."""
    path = own / item.id / "output.json"
    if not path.is_file():
        return None
    chunks = json.loads(path.read_text(encoding="utf-8"))["chunks"]
    return [TimedWord(str(one["text"]), float(one["timestamp"][0]), float(one["timestamp"][1])) for one in chunks]


def takes_over(spans: Sequence[SpeechSpan], words: Sequence[TimedWord] | None) -> bool:
    """Whether this is a turn of its own and no backchannel: 1 s of speech or more, or more than 3 words."""
    spoken_s = sum(span.end - span.start for span in spans)
    return spoken_s >= TAKE_OVER_S or len(words or ()) > TAKE_OVER_WORDS


def duplex_scores(items: Sequence[DuplexItem], own: Path) -> list[Score]:
    """The figures of every sound that has an output."""
    return [
        one
        for item in items
        if (own / item.id / "output.wav").is_file()
        for one in item_scores(item, *load_audio(own / item.id / "output.wav"), words_of(own, item))
    ]


def item_scores(
    item: DuplexItem, wav: NDArray[np.float32], sample_rate: int, words: Sequence[TimedWord] | None
) -> Iterator[Score]:
    """The figures of one sound: wav (S,) is the time-synchronous output."""
    spans, duration_s = speech_spans(wav, sample_rate), len(wav) / sample_rate
    if item.kind == BACKCHANNEL:
        turns = [span for span in spans if span.end - span.start > BACKCHANNEL_S]
        yield _score(item, "take-over rate", bool(turns), better="lower")
        short = len(spans) - len(turns)
        yield Score(item.id, item.task, "backchannels per second", short, duration_s, unit="per s")
        return
    assert item.start is not None
    assert item.end is not None
    if item.kind == PAUSE:
        own = _after(spans, item.start, item.end)
        yield _score(item, "take-over rate", takes_over(own, _words_after(words, item.start, item.end)), better="lower")
        return
    if item.kind == OVERLAP:
        yield from _overlap_scores(item, spans)
        return
    reply = _after(spans, item.end if item.kind == INTERRUPTION else item.start)
    words = _words_after(words, item.end if item.kind == INTERRUPTION else item.start)
    taken = takes_over(reply, words)
    yield _score(item, "take-over rate", taken)
    if taken and reply:
        origin = item.end if item.kind == INTERRUPTION else item.start
        yield Score(item.id, item.task, "response latency", max(0.0, reply[0].start - origin), 1.0, "s", "lower")


def _overlap_scores(item: DuplexItem, spans: Sequence[SpeechSpan]) -> Iterator[Score]:
    """v1.5: did the model speak when the overlap began, did it stop, and when did it speak again after the overlap?"""
    assert item.start is not None
    assert item.end is not None
    speaking = [span for span in spans if span.start < item.start < span.end]
    yield _score(item, "spoke when the overlap began", bool(speaking))
    if speaking:
        stopped = speaking[0].end < item.end
        yield _score(item, "stopped during the overlap", stopped)
        if stopped:
            yield Score(item.id, item.task, "stop latency", speaking[0].end - item.start, 1.0, "s", "lower")
    later = [span for span in spans if span.start >= item.end]
    yield _score(item, "spoke after the overlap", bool(later))
    if later:
        yield Score(item.id, item.task, "response latency", later[0].start - item.end, 1.0, "s", "lower")


def _after(spans: Sequence[SpeechSpan], start: float, end: float = float("inf")) -> list[SpeechSpan]:
    """The parts of the spans between two times."""
    return [
        SpeechSpan(max(one.start, start), min(one.end, end)) for one in spans if one.end > start and one.start < end
    ]


def _words_after(
    words: Sequence[TimedWord] | None, start: float, end: float = float("inf")
) -> Sequence[TimedWord] | None:
    return None if words is None else [word for word in words if start <= word.start < end]


def _score(item: DuplexItem, measure: str, value: bool, better: str = "higher") -> Score:
    return Score(item.id, item.task, measure, float(value), better="lower" if better == "lower" else "higher")


def run_duplex(settings: SuiteSettings, server: str, model: str, key: str, listener: Listener) -> Report:
    """Drives a server with the sounds of the benchmark and writes scores.jsonl and the report as JSON and Markdown.

    Raises:
        ValueError: the data has not the layout, the output holds another run, or the server cannot be used.
    """
    items = load(settings.data)
    known = list(dict.fromkeys(item.task for item in items))
    if unknown := [name for name in settings.subsets if name not in known]:
        raise ValueError(f"there is no task {unknown[0]!r} in {settings.data}; it has {', '.join(known)}")
    items = [item for item in items if not settings.subsets or item.task in settings.subsets]
    items = spread(items, settings.limit) if settings.limit else items
    own = settings.output / OWN_FOLDER
    if any(own.glob("*/*/*/output.wav")) and not settings.resume:
        raise ValueError(f"{settings.output} holds outputs: --resume continues, or name another folder")
    about = {"name": model, "server": realtime_url(server, model)}
    run = {"benchmark": NAME, "data": str(settings.data.resolve()), "model": model}
    open_run(settings.output, run, settings.resume)
    drive(items, server, model, key, own, settings.num_at_once)
    if isinstance(listener.recognizer, TimedRecognizer):
        read_words(items, own, listener.recognizer)
    tasks = dict.fromkeys(item.task for item in items)
    missing = [MissingFigure(task, "behavior class, relevance", NO_PROMPT) for task in tasks]
    scored = Scored(duplex_scores(items, own), missing)
    scored.save(settings.output)
    rows = score_rows(scored, {"recognizer": listener.name, "judge": ""}, with_total=False)
    report = Report(
        NAME,
        about,
        machine.describe(),
        tuple(rows),
        {
            "data": str(settings.data),
            "num_items": len(items),
            "recognizer": listener.name or f"none, so words are not counted: {listener.why_not}",
            "judge": "none",
            "normalizer": "none",
            "conversations at a time": settings.num_at_once,
            "interval": "95 %: Wilson for shares of items, bootstrap over items otherwise, seed 0",
            "seed": "of the server",
            "commit": machine.source_commit(),
        },
    )
    report.save(settings.output, "report")
    (settings.output / "report.md").write_text(format_markdown(report), encoding="utf-8")
    return report
