"""The synthesizers as voices, and the corpus on disk. Skipped where the programs are not installed."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray

from recipes.pocket import corpus
from recipes.pocket.curriculum import Dialogue, Exchange
from recipes.pocket.plans import PlannedClip, PlannedDialogue
from recipes.pocket.sounds import SOUNDS, sound
from recipes.pocket.stories import LONG_ANSWERS
from recipes.pocket.synthesis import (
    LEVEL_DBFS,
    MORE_VOICES,
    SAMPLE_RATE,
    STYLES,
    TRAINING_VOICES,
    UNSEEN_VOICES,
    USER_VOICES,
    VOICES,
    Request,
    finish,
    render,
    render_chunk,
    render_one,
    reply_request,
    trim,
)

needs_programs = pytest.mark.skipif(
    not all(shutil.which(program) for program in ("flite", "festival", "espeak-ng")),
    reason="flite, festival and espeak-ng are not all installed",
)


def level(samples: NDArray[np.int16]) -> float:
    """RMS in dB of full scale."""
    return float(20 * np.log10(np.sqrt(np.mean(np.square(samples / 32767)))))


def f0(samples: NDArray[np.int16]) -> float:
    """Median pitch in Hz by autocorrelation of frames of 50 ms."""
    found = []
    for start in range(0, samples.size - 800, 400):
        frame = samples[start : start + 800] - samples[start : start + 800].mean()
        likeness = np.correlate(frame, frame, "full")[799:]
        lag = int(np.argmax(likeness[40:230])) + 40
        if likeness[0] > 1e8 and likeness[lag] > 0.5 * likeness[0]:
            found.append(SAMPLE_RATE / lag)
    return float(np.median(found))


def test_user_voices_are_many_and_mostly_natural() -> None:
    assert len(USER_VOICES) >= 12
    assert [voice.id for voice in UNSEEN_VOICES] == ["flite-rms", "espeak-en-us+f4", "festival-ked"]
    assert sum(voice.weight for voice in VOICES) == pytest.approx(1.0)
    assert sum(voice.weight for voice in VOICES if voice.engine != "espeak") == pytest.approx(0.6)
    assert len(TRAINING_VOICES) == len({voice.id for voice in TRAINING_VOICES}) >= 40
    assert not {voice.name for voice in TRAINING_VOICES} & {voice.name for voice in UNSEEN_VOICES}
    assert not any(voice.name.endswith("+f4") for voice in TRAINING_VOICES)


def test_silence_at_both_ends_is_cut_to_a_margin() -> None:
    tone = np.sin(np.arange(8000) * 0.3).astype(np.float32)
    silence = np.zeros(SAMPLE_RATE, np.float32)
    cut = trim(np.concatenate([silence, tone, silence]))
    assert 8000 + 2 * 0.07 * SAMPLE_RATE <= cut.size <= 8000 + 2 * 0.1 * SAMPLE_RATE
    short = np.concatenate([silence[:400], tone])
    assert trim(short).size == short.size
    assert trim(silence).size == silence.size


def test_finish_resamples_and_levels() -> None:
    tone = (0.01 * np.sin(np.arange(32000) * 0.1)).astype(np.float32)
    clip = finish(tone, 32000)
    assert clip.dtype == np.int16
    assert abs(clip.size - SAMPLE_RATE) < 200
    assert level(clip) == pytest.approx(LEVEL_DBFS, abs=0.1)
    assert level(finish(tone, 32000, 5.0)) == pytest.approx(LEVEL_DBFS + 5, abs=0.1)
    spike = np.zeros(SAMPLE_RATE, np.float32)
    spike[::4000] = 0.5
    assert np.abs(finish(spike, SAMPLE_RATE)).max() <= 32767 * 0.981  # never clipped


@pytest.mark.parametrize("kind", [kind for kind in SOUNDS if kind != "babble"])
def test_sounds_are_functions_of_their_seed(kind: str) -> None:
    one = sound(kind, 3, SAMPLE_RATE)
    np.testing.assert_array_equal(one, sound(kind, 3, SAMPLE_RATE))
    assert one.size != sound(kind, 4, SAMPLE_RATE).size
    assert 0.6 <= one.size / SAMPLE_RATE <= 3.0
    assert np.abs(one).max() <= 0.98


def test_an_unknown_sound_voice_or_style_is_named() -> None:
    with pytest.raises(ValueError, match="unknown sound 'rain'"):
        sound("rain", 0, SAMPLE_RATE)
    with pytest.raises(ValueError, match="unknown voice 'flite-xyz'; the voices are flite-slt"):
        render_one(Request("Hello.", "flite-xyz"))
    with pytest.raises(ValueError, match="unknown style 'shouting'"):
        reply_request("Hello.", "shouting")


@needs_programs
@pytest.mark.parametrize("voice", [*VOICES, *MORE_VOICES], ids=lambda voice: voice.id)
def test_every_voice_speaks_level_and_repeatable(voice: object) -> None:
    request = Request("Seven plus five is twelve.", voice.id)  # type: ignore[attr-defined]
    plain, again, slow = render_chunk([request, request, replace(request, rate=0.8)])
    np.testing.assert_array_equal(plain, again)
    assert level(plain) == pytest.approx(LEVEL_DBFS, abs=0.3)
    assert 1.0 < plain.size / SAMPLE_RATE < 4.0
    assert 1.1 < slow.size / plain.size < 1.4


@needs_programs
def test_reply_styles_move_the_asked_way() -> None:
    text = "The capital of France is Paris, and the capital of Spain is Madrid."
    clips = dict(zip(STYLES, render_chunk([reply_request(text, style) for style in STYLES]), strict=True))
    plain = clips["plain"]
    assert clips["faster2"].size < clips["faster"].size < 0.85 * plain.size
    assert clips["slower2"].size > clips["slower"].size > 1.2 * plain.size
    assert f0(clips["higher2"]) > f0(clips["higher"]) > 1.1 * f0(plain)
    assert f0(clips["lower2"]) < f0(clips["lower"]) < 0.93 * f0(plain)
    assert level(clips["louder"]) > level(plain) + 3
    assert level(clips["softer"]) < level(plain) - 6


@needs_programs
def test_long_answers_last_ten_to_thirty_seconds() -> None:
    for clip in render_chunk([reply_request(text) for _, _, text, _ in LONG_ANSWERS]):
        assert 10 <= clip.size / SAMPLE_RATE <= 30


@needs_programs
def test_parallel_rendering_keeps_the_order() -> None:
    rng = Random(1)
    voices = [voice.id for voice in VOICES]
    requests = [Request(f"Number {['one', 'two', 'three', 'four'][n % 4]}.", rng.choice(voices)) for n in range(8)]
    requests.append(Request("", "sound-babble", seed=3))
    alone = render_chunk(requests)
    for one, other in zip(alone, render(iter(requests), workers=2), strict=True):
        np.testing.assert_array_equal(one, other)


@needs_programs
def test_a_corpus_on_disk_reads_back_and_is_resumed(tmp_path: Path) -> None:
    corpus.main(["--out", str(tmp_path), "--only", "free", "--programs-only", "--hours", "0.002", "--workers", "1"])
    free = tmp_path / "free"
    table = (free / "clips-00000.jsonl").read_text()
    clips = [json.loads(line) for line in table.splitlines()]
    audio = np.memmap(free / "clips-00000.pcm", dtype="<i2", mode="r")
    assert clips[-1]["offset"] + clips[-1]["num_samples"] == audio.size
    assert audio.size / SAMPLE_RATE >= 0.002 * 3600
    assert all(clip["offset"] == before["offset"] + before["num_samples"] for before, clip in pairwise(clips))
    assert not list(free.glob("*.part"))
    (free / "clips-00000.pcm").write_bytes(b"kept")  # a complete shard is not rendered again
    corpus.main(["--out", str(tmp_path), "--only", "free", "--programs-only", "--hours", "0.002", "--workers", "1"])
    assert (free / "clips-00000.pcm").read_bytes() == b"kept"


@needs_programs
def test_dialogue_shards_share_replies(tmp_path: Path) -> None:
    turn = Exchange("What is the capital of France?", "It is Paris.", ("paris",))
    noise = Exchange("", "Sorry, I did not hear you.", ("sorry",), sound="noise")
    reply = PlannedClip(reply_request(turn.reply), "reply", "train", "capital")
    user = PlannedClip(Request(turn.user, "espeak-en-us"), "user", "train", "capital")
    sounded = PlannedClip(Request("", "sound-noise", seed=1), "user", "train", "not_speech")
    sorry = PlannedClip(reply_request(noise.reply), "reply", "train", "not_speech")
    two = PlannedDialogue(Dialogue("several", (turn, noise)), "train", (user, sounded), (reply, sorry))
    one = PlannedDialogue(Dialogue("capital", (turn,)), "train", (user,), (reply,))
    corpus.write_dialogue_shard(tmp_path, 0, [one, two], 1, "dialogue")
    corpus.write_dialogue_shard(tmp_path, 1, [one], 1, "dialogue")
    read = [json.loads(line) for line in (tmp_path / "dialogues-00000.jsonl").read_text().splitlines()]
    later = json.loads((tmp_path / "dialogues-00001.jsonl").read_text())
    assert [turn["role"] for turn in read[1]["turns"]] == ["user", "assistant", "user", "assistant"]
    assert read[0]["turns"][1]["clip"] == read[1]["turns"][1]["clip"] == later["turns"][1]["clip"]
    assert read[0]["turns"][1]["answers"] == ["paris"]
    assert read[1]["turns"][2]["sound"] == "noise"
    clips = [json.loads(line) for line in (tmp_path / "clips-00000.jsonl").read_text().splitlines()]
    assert [clip["role"] for clip in clips] == ["user", "reply", "user", "user", "reply"]
    assert len((tmp_path / "clips-00001.jsonl").read_text().splitlines()) == 1
