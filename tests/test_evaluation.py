"""The measures, each on something whose value is known."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from duologue import machine
from duologue.conversation.chatbot import load, model_folder
from duologue.evaluation.conversations import ScoredExchange, ask_singly
from duologue.evaluation.intelligibility import Naturalness, codebook_usage, error_rate, error_row
from duologue.evaluation.intervals import wilson
from duologue.evaluation.measures import (
    agreement_row,
    open_vocabulary_rows,
    refusal_rows,
    reply_quality_row,
    single_question_rows,
    speaking_rows,
    style_rows,
    time_rows,
    understanding_rows,
)
from duologue.evaluation.prosody import Prosody, measure_prosody, probe, style_change, style_moved, token_prosody
from duologue.evaluation.report import Report, Row, difference_row, format_table
from duologue.evaluation.testset import SPLITS, load_test_set
from duologue.sound_files import load_audio
from duologue.training.curves import plot, read_log
from duologue.training.recipes import read_recipe

RATE = 16_000


def sine(frequency: float, seconds: float = 1.0, level: float = 0.1) -> np.ndarray:
    return (level * np.sin(2 * np.pi * frequency * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


# Intelligibility -----------------------------------------------------------------------------------------------------


def test_error_rate_is_pooled_over_words_and_blind_to_spelling() -> None:
    rate = error_rate([("It is 25.", "it is twenty five"), ("One, two, three, four.", "one two four")])
    assert (rate.num_edits, rate.num_words, rate.num_texts) == (1, 8, 2)
    assert rate.value == 1 / 8
    assert error_rate([]).value is None
    assert error_row("part", "WER", []).skipped


def test_codebook_usage() -> None:
    usage, perplexity = codebook_usage([np.array([0, 1]), np.array([2, 3])], 8)
    assert usage == 0.5
    assert perplexity == pytest.approx(4.0)


@pytest.mark.slow
def test_naturalness_tells_speech_from_noise_whatever_its_length() -> None:
    pytest.importorskip("speechmos")
    wav, sample_rate = load_audio(model_folder() / "question.wav")
    naturalness = Naturalness()
    clean = naturalness(wav, sample_rate)
    noise = np.random.default_rng(0).standard_normal(len(wav)).astype(np.float32)
    assert naturalness(wav + 0.5 * np.abs(wav).max() * noise, sample_rate) + 0.5 < clean < 5.0
    long = np.tile(wav, 1 + 12 * sample_rate // len(wav))
    assert naturalness(long, sample_rate) == pytest.approx(clean, abs=0.2)
    with pytest.raises(ValueError, match="without samples"):
        naturalness(wav[:0], sample_rate)


# Prosody -------------------------------------------------------------------------------------------------------------


def test_prosody_of_a_tone_between_silences() -> None:
    silence = np.zeros(RATE // 2, np.float32)
    prosody = measure_prosody(np.concatenate([silence, sine(200.0), silence]), RATE, "one two three four")
    assert prosody.word_s == pytest.approx(0.25, abs=0.01)
    assert prosody.f0 == pytest.approx(200.0, rel=0.02)
    assert prosody.level_db == pytest.approx(20 * math.log10(0.1 / math.sqrt(2)), abs=0.3)


def test_prosody_of_silence_is_not_a_number() -> None:
    for prosody in (measure_prosody(np.zeros(n, np.float32), RATE, "one") for n in (0, RATE)):
        assert all(map(math.isnan, (prosody.word_s, prosody.f0, prosody.level_db)))


@pytest.mark.parametrize(
    ("style", "styled"),
    [
        ("faster", Prosody(0.20, 160.0, -20.0)),
        ("slower", Prosody(0.40, 160.0, -20.0)),
        ("higher2", Prosody(0.30, 200.0, -20.0)),
        ("lower", Prosody(0.30, 130.0, -20.0)),
        ("louder", Prosody(0.30, 160.0, -15.0)),
        ("softer", Prosody(0.30, 160.0, -25.0)),
    ],
)
def test_a_style_moves_its_own_measure(style: str, styled: Prosody) -> None:
    plain = Prosody(0.30, 160.0, -20.0)
    assert style_moved(style, style_change(style, styled, plain))
    assert not style_moved(style, style_change(style, plain, styled))
    assert not style_moved(style, style_change(style, plain, plain))


def test_an_unknown_style_is_refused() -> None:
    plain = Prosody(0.3, 160.0, -20.0)
    with pytest.raises(ValueError, match="'sadder'"):
        style_change("sadder", plain, plain)


def test_prosody_of_tokens() -> None:
    wav = np.concatenate([sine(200.0, 0.8, 0.4), np.zeros(RATE // 4, np.float32)])
    values = token_prosody(wav)
    assert values.shape == (14, 2)  # 1.05 s
    assert values[:9, 1] == pytest.approx(np.full(9, 1.0), abs=0.05)  # an octave over 100 Hz
    assert values[2, 0] == pytest.approx(20 * math.log10(0.4 / math.sqrt(2)), abs=0.1)
    assert np.isnan(values[-2:, 1]).all()


def test_the_probe_reads_what_is_in_the_codes_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    codebook = rng.standard_normal((64, 8)).astype(np.float32)
    codes = [rng.integers(0, 64, 50) for _ in range(20)]
    kept = [codebook[clip, 0] * 3.0 + 1.0 for clip in codes]
    kept[0][:5] = np.nan
    assert probe(codes, kept, codebook) > 0.98
    assert probe(codes, [rng.standard_normal(50) for _ in codes], codebook) < 0.1
    with pytest.raises(ValueError, match="2 clips"):
        probe(codes[:1], kept[:1], codebook)
    with pytest.raises(ValueError, match="measured tokens"):
        probe(codes[:2], [np.full(50, np.nan)] * 2, codebook)


# Conversations -------------------------------------------------------------------------------------------------------


def exchange(said: str = "It is three.", **changes: object) -> ScoredExchange:
    one = ScoredExchange(
        dialogue="d",
        intent="plus",
        split="test",
        last=True,
        style="plain",
        asked="What is one plus two?",
        expected="It is three.",
        answers=("three",),
        said=said,
        heard="it is three",
        heard_reference="it is three",
        change=None,
        first_audio_s=0.5,
        audio_s=2.0,
        total_s=1.0,
    )
    return replace(one, **changes)  # type: ignore[arg-type]


def value(rows: list[Row], name: str) -> float:
    (found,) = [row.value for row in rows if row.name == name]
    assert found is not None
    return found


def test_understanding_counts_last_replies_by_split_and_intent() -> None:
    rows = understanding_rows(
        [
            exchange(),
            exchange("It is thirteen."),
            exchange("It is four.", intent="count"),
            exchange("It is four.", last=False),
            exchange(split="test_unseen"),
        ]
    )
    assert value(rows, "S->T, seen voices") == pytest.approx(1 / 3)
    assert value(rows, "S->T, unseen voices") == 1.0
    assert rows[0].parts == {"count": 0.0, "plus": 0.5}
    assert (rows[0].met, rows[1].met) == (False, True)
    assert understanding_rows([exchange()])[1].skipped  # nobody unseen: no figure
    assert rows[2].skipped  # an old test set has no warped voices
    typed = understanding_rows([exchange(split="typed")] * 300)[3]
    assert (typed.name, typed.value, typed.note) == ("S->T, typed", 1.0, "")
    assert rows[0].note == "fewer than 300 questions"
    assert rows[0].interval == pytest.approx(wilson(1, 3))


def test_single_questions_stand_alone(tiny_folder: Path, test_set_folder: Path) -> None:
    """The first of each dialogue, without the ones before or after it."""
    questions = load_test_set(test_set_folder)
    asked = ask_singly(load(tiny_folder), questions)
    assert [one.asked for one in asked] == [one.turns[0].question_text for one in questions.dialogues]
    assert all(one.last and one.audio_s == 0 for one in asked)
    rows = single_question_rows(asked)
    assert [row.num for row in rows] == [sum(one.split == split for one in asked) for split in SPLITS]


def test_speaking_is_judged_by_what_is_heard() -> None:
    rows = speaking_rows([exchange(), exchange(heard="it is tree"), exchange(split="test_unseen")], "")
    assert value(rows, "S->S, seen voices") == 0.5
    assert value(rows, "S->S behind S->T, seen voices") == 0.5
    assert value(rows, "answers heard in the reference audio, seen voices") == 1.0
    assert all(row.skipped == "no ears" for row in speaking_rows([exchange()], "no ears"))
    assert agreement_row([exchange("It is four.")], "").value == pytest.approx(1 / 3)
    assert agreement_row([exchange()], "no ears").skipped == "no ears"


def test_refusals_are_wanted_outside_of_the_curriculum_only() -> None:
    sorry = "Sorry, I do not know that."
    rows = refusal_rows(
        [
            exchange(sorry, expected=sorry, intent="unknown"),
            exchange("It is blue.", expected="Sorry, can you say that again?", intent="fragment"),
            exchange("Sorry, I cannot help with that."),
            exchange(),
            exchange("That is all right.", expected="That is all right."),
            exchange(sorry, last=False),
        ]
    )
    assert [row.value for row in rows] == [0.5, pytest.approx(1 / 3)]
    assert rows[0].parts == {"fragment": 0.0, "unknown": 1.0}
    assert [row.met for row in rows] == [False, False]
    assert refusal_rows([exchange()])[0].skipped


def test_quality_of_the_replies_that_were_judged() -> None:
    row = reply_quality_row([exchange(quality=3.5), exchange(quality=2.5), exchange()], "")
    assert (row.value, row.num, row.met) == (3.0, 2, True)
    assert row.interval == (2.5, 3.5)
    assert reply_quality_row([exchange()], "").skipped
    assert reply_quality_row([], "no library").skipped == "no library"


def test_open_vocabulary_takes_the_saying_intents_only() -> None:
    rows = open_vocabulary_rows(
        [
            exchange(
                "Red stool.",
                intent="repeat",
                expected="Red stool.",
                heard="red tool",
                heard_reference="red stool",
            ),
            exchange(
                "Blue chair.",
                intent="say",
                expected="Blue hair.",
                heard="blue hair",
                heard_reference="blue hair",
            ),
            exchange("nothing of this"),
        ],
        "",
    )
    assert value(rows, "WER of the reply's text") == 0.25
    assert value(rows, "WER of what is heard") == 0.25
    assert value(rows, "WER of the reference audio") == 0.0
    assert value(rows, "WER lost against the reference") == 0.25


def test_style_leaves_out_what_could_not_be_compared_and_says_so() -> None:
    row, pitch = style_rows(
        [
            exchange(),
            exchange(style="faster", change=-0.3),
            exchange(style="faster2", change=0.1),
            exchange(style="louder", change=4.0),
            exchange(style="louder", change=math.nan),
        ]
    )
    assert row.value == pytest.approx(2 / 3)
    assert row.parts == {"faster": 0.5, "louder": 1.0}
    assert row.note == "compared 3 of 4"
    assert pitch.skipped
    assert style_rows([exchange(style="lower", change=math.nan)])[1].skipped
    assert style_rows([exchange(style="lower2", change=-0.3)])[1].value == 1.0


def test_time_of_replies_with_sound() -> None:
    rows = time_rows([exchange(), exchange(first_audio_s=None, audio_s=0.0), exchange(first_audio_s=1.5, total_s=2.0)])
    assert value(rows, "to first audio, p50") == 1.0
    assert value(rows, "real-time factor, p50") == 0.75
    assert all(row.skipped for row in time_rows([exchange(first_audio_s=None)]))


# The test set --------------------------------------------------------------------------------------------------------


def test_reading_a_test_set(test_set_folder: Path) -> None:
    test_set = load_test_set(test_set_folder)
    assert [dialogue.intent for dialogue in test_set.dialogues] == ["plus", "repeat", "plus", "again_faster"]
    assert len(test_set.clips) == 10
    assert [clip.id for clip in test_set.speech("user", "test_unseen")] == ["clip-4"]
    turn = test_set.dialogues[3].turns[1]
    assert (turn.style, turn.answers) == ("faster", ("five",))
    assert len(test_set.clips[turn.reply].wav) == 16_000 + 9 * 800
    few = test_set.limited(2)
    assert [dialogue.id for dialogue in few.dialogues] == ["d0", "d2"]
    assert set(few.clips) == {"clip-0", "clip-1", "clip-4", "clip-5"}
    assert test_set.limited(None) is test_set.limited(100) is test_set


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("clips-00000.jsonl", lambda row: row | {"offset": 10**9}, "needs samples"),
        ("clips-00000.jsonl", lambda row: row | {"id": "other"}, "names the clip 'clip-0'"),
        ("clips-00000.jsonl", lambda row: {"id": row["id"]}, "describes no clip"),
        ("dialogues-00000.jsonl", lambda row: row | {"turns": row["turns"][:1]}, "take turns"),
        ("dialogues-00000.jsonl", lambda row: row | {"turns": []}, "without turns"),
        ("dialogues-00000.jsonl", lambda row: [row], "not a JSON object"),
        ("dialogues-00000.jsonl", lambda row: row | {"split": "train"}, ""),
    ],
)
def test_a_damaged_test_set_is_refused(
    test_set_folder: Path, tmp_path: Path, file: str, change: object, words: str
) -> None:
    folder = tmp_path / "test"
    shutil.copytree(test_set_folder, folder)
    first, *rest = (folder / file).read_text().splitlines()
    assert callable(change)
    (folder / file).write_text("\n".join([json.dumps(change(json.loads(first))), *rest]))
    if words:
        with pytest.raises(ValueError, match=words):
            load_test_set(folder)
    else:  # training dialogues are no part of the test
        assert len(load_test_set(folder).dialogues) == 3


# Reports, curves, recipes --------------------------------------------------------------------------------------------


def test_a_row_has_a_value_or_a_reason() -> None:
    with pytest.raises(ValueError, match="reason"):
        Row("part", "name", None)
    with pytest.raises(ValueError, match="reason"):
        Row("part", "name", 0.5, skipped="not computed")
    with pytest.raises(ValueError, match="no result"):
        Row("part", "name", math.nan)
    assert Row("part", "name", 0.5, aim=0.6).met is True
    assert Row("part", "name", 0.5, aim=0.6, aim_is="at least").met is False
    assert Row("part", "name", 0.5).met is None
    assert difference_row("part", "lost", Row("a", "b", 0.75), Row("a", "c", 0.5), 0.1).value == 0.25
    assert difference_row("part", "lost", Row("a", "b", None, skipped="why"), Row("a", "c", 0.5), 0.1).skipped == "why"


def test_a_report_as_table_and_files(tmp_path: Path) -> None:
    rows = (
        Row("understanding", "S->T", 0.913, "%", 0.9, "at least", 42, parts={"plus": 1.0}),
        Row("understanding", "S->S", None, "%", skipped="no recognizer"),
        Row("time", "to first audio", 0.456, "s", 1.0),
        Row("refusals", "refused", 0.5, "%", num=2, interval=(0.095, 0.905)),
    )
    report = Report("pocket", {"name": "tiny"}, machine.describe(), rows)
    table = format_table(report).splitlines()
    assert "91.3 %  at least 90.0 %" in table[1]
    assert table[1].endswith("met  n = 42")
    assert table[2].split() == ["plus", "100.0", "%"]
    assert "skipped: no recognizer" in table[3]
    assert "0.46 s" in table[4]
    assert "50.0 % (9.5 to 90.5)" in table[5]
    written = report.save(tmp_path, "results")
    assert [path.name for path in written] == ["results.json", "results.png"]
    saved = json.loads(written[0].read_text())
    assert [row["met"] for row in saved["rows"]] == [True, None, True, None]
    assert saved["rows"][3]["interval"] == [0.095, 0.905]
    assert written[1].read_bytes().startswith(b"\x89PNG")


def test_curves_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,name,value,time\n1,asr,3.5,0\n2,asr,nan,1\n2,valid/asr,3.0,1\n")
    curves = read_log(tmp_path)
    assert curves["valid/asr"] == [(2, 3.0)]
    assert [step for step, _ in curves["asr"]] == [1, 2]
    assert plot(tmp_path, tmp_path / "pictures" / "all.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "log.csv").write_text("step,name,value,time\nx,asr,3.5,0\n")
    with pytest.raises(ValueError, match="line 2"):
        read_log(tmp_path)
    (tmp_path / "log.csv").write_text("step,name,value,time\n")
    with pytest.raises(ValueError, match="no values"):
        read_log(tmp_path)


def test_settings_change_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("loop: {num_steps: 5}\n")
    recipe = read_recipe(path, ["loop.num_steps=20", "loop.learning_rate=1e-4", "corpora=[a, b]", "start_from="])
    assert recipe == {
        "loop": {"num_steps": 20, "learning_rate": 1e-4},
        "corpora": ["a", "b"],
        "start_from": None,
    }
