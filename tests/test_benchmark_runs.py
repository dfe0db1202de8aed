"""Runs of benchmarks: answers on disk at once, resuming, judging at no repeated cost, and comparing two runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from duologue.cli import main
from duologue.evaluation.benchmarks.items import (
    BenchmarkItem,
    BenchmarkQuestion,
    GivenAnswer,
    GivenTurn,
    Scoring,
    SoundPlace,
)
from duologue.evaluation.benchmarks.table import BENCHMARKS
from duologue.evaluation.compare import BETTER, UNDECIDED, WORSE, compare, format_comparison
from duologue.evaluation.judge import ChatJudge, JudgeSettings, judge_prompt, read_verdict
from duologue.evaluation.report import Report, Row
from duologue.evaluation.runner import JsonLines, ask_all, open_run, read_answers
from duologue.evaluation.scores import Score, Scored, score, score_rows
from duologue.evaluation.suite import Listener, SuiteSettings, run_benchmark
from tests.benchmark_data import (
    ScriptedAsker,
    ScriptedRecognizer,
    judge_server,
    write_big_bench_audio,
    write_openaudiobench,
    write_seed_tts,
    write_urobench,
    write_voicebench,
)

NO_LISTENER = Listener(None, "", "no recognizer in this test")


def item(key: str, scoring: Scoring = Scoring.CONTAINS, subset: str = "set", language: str = "en") -> BenchmarkItem:
    return BenchmarkItem(key, subset, (BenchmarkQuestion(None, "What is it?", ("three",)),), scoring, language)


def run(
    name: str,
    folder: Path,
    reply: Callable[[BenchmarkItem], str | None],
    listener: Listener = NO_LISTENER,
    judge: ChatJudge | None = None,
    **settings: Any,
) -> tuple[dict[tuple[str, str], Row], Report]:
    asker = ScriptedAsker(reply)
    suite = SuiteSettings(folder / "data", folder / "out", **settings)
    report = run_benchmark(BENCHMARKS[name], suite, asker, listener, judge)
    return {(row.group, row.name): row for row in report.rows}, report


# The runner ----------------------------------------------------------------------------------------------------------


def test_answers_are_on_disk_and_a_stopped_run_continues(tmp_path: Path) -> None:
    items = [item(f"i{number}") for number in range(12)]

    def stop_at_six(one: BenchmarkItem) -> str:
        if one.id == "i6":
            raise KeyboardInterrupt
        return "It is three."

    with pytest.raises(KeyboardInterrupt):
        ask_all(items, ScriptedAsker(stop_at_six), tmp_path, open_run(tmp_path, {"a": 1}, False), num_at_once=1)
    kept = read_answers(tmp_path / "answers.jsonl")
    assert list(kept) == [f"i{number}" for number in range(6)]
    assert (tmp_path / kept["i0"].sound).is_file()
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"id": "i6", "half')  # the power failed
    with pytest.raises(ValueError, match="holds 6 answers: --resume continues"):
        open_run(tmp_path, {"a": 1}, False)
    with pytest.raises(ValueError, match="a 1, not 2"):
        open_run(tmp_path, {"a": 2}, True)
    asker = ScriptedAsker(lambda one: "It is three.")
    answers = ask_all(items, asker, tmp_path, open_run(tmp_path, {"a": 1}, True))
    assert sorted(asker.asked) == ["i10", "i11", "i6", "i7", "i8", "i9"]
    assert answers == read_answers(tmp_path / "answers.jsonl")
    assert len(answers) == 12


def test_failed_questions_are_kept_and_asked_again(tmp_path: Path) -> None:
    items = [item(f"i{number}") for number in range(8)]
    answers = ask_all(items, ScriptedAsker(lambda one: None if one.id == "i3" else "x"), tmp_path, {})
    assert answers["i3"].error == "the script has no answer"
    asker = ScriptedAsker(lambda one: "y")
    answers = ask_all(items, asker, tmp_path, read_answers(tmp_path / "answers.jsonl"))
    assert asker.asked == ["i3"]
    assert answers["i3"].text == "y"


def test_a_server_that_answers_nothing_ends_the_run(tmp_path: Path) -> None:
    asker = ScriptedAsker(lambda one: None)
    with pytest.raises(ValueError, match="the first 5 questions failed: the script has no answer"):
        ask_all([item(f"i{number}") for number in range(50)], asker, tmp_path, {}, num_at_once=2)
    assert len(asker.asked) < 10


# The judge -----------------------------------------------------------------------------------------------------------


def test_verdicts_are_cached_and_errors_are_retried(tmp_path: Path) -> None:
    failures = iter([503, 429])
    waits: list[float] = []

    def answer(prompt: str) -> str | int:
        return next(failures, "yes" if "three" in prompt else "no")

    with judge_server(answer) as (url, requests):
        settings = JudgeSettings(url, "judge")
        judge = ChatJudge(settings, tmp_path / "judge.jsonl", "secret", waits.append)
        assert judge.judge(["is it three?", "is it four?", "is it three?"], num_at_once=1) == ["yes", "no", "yes"]
        assert waits == [2.0, 4.0]
        assert len(requests) == 4
        assert requests[0]["path"] == "/v1/chat/completions"
        assert requests[0]["key"] == "Bearer secret"
        assert (requests[0]["temperature"], requests[0]["model"]) == (0.0, "judge")
        again = ChatJudge(settings, tmp_path / "judge.jsonl")
        assert again.judge(["is it four?", "is it three?"]) == ["no", "yes"]
        assert again.num_requests == 0
        assert ChatJudge(JudgeSettings(url, "other"), tmp_path / "judge.jsonl").judge(["is it four?"]) == ["no"]
        assert len(requests) == 5  # another model judges for itself
    assert "secret" not in (tmp_path / "judge.jsonl").read_text()


def test_a_judge_that_refuses_is_an_error(tmp_path: Path) -> None:
    with judge_server(lambda prompt: 401) as (url, requests):
        with pytest.raises(ValueError, match=r"the judge http.* did not answer: 401"):
            ChatJudge(JudgeSettings(url, "judge"), tmp_path / "judge.jsonl").judge(["x"])
        assert len(requests) == 1


@pytest.mark.parametrize(
    ("text", "scoring", "value"),
    [
        ("Yes.", Scoring.CORRECT, 1.0),
        ("no", Scoring.CORRECT, 0.0),
        ("yes or no", Scoring.CORRECT, None),
        ("perhaps", Scoring.CORRECT, None),
        ("4", Scoring.OPEN, 4.0),
        ("Score: 4.5", Scoring.OPEN, 4.5),
        ("7", Scoring.OPEN, None),
        ("7", Scoring.CHAT, 7.0),
        ("10", Scoring.CHAT, 10.0),
        ("3 of 5", Scoring.OPEN, None),
    ],
)
def test_verdicts(text: str, scoring: Scoring, value: float | None) -> None:
    assert read_verdict(text, scoring) == value


def test_a_prompt_has_every_turn() -> None:
    questions = (BenchmarkQuestion(None, "First?"), BenchmarkQuestion(None, "Second?", ("a", "b")))
    prompt = judge_prompt(BenchmarkItem("x", "s", questions, Scoring.DIALOGUE), ["one", "two"])
    for part in ("<question 1>\nFirst?", "<reply 2>\ntwo", "<reference 2>\na | b", "from 1 to 5"):
        assert part in prompt
    assert "<reference 1>" not in prompt


# Scores --------------------------------------------------------------------------------------------------------------


def test_scores_and_rows() -> None:
    items = [item(f"i{number}", subset="a" if number < 6 else "b") for number in range(10)]
    turns = {
        one.id: GivenTurn("It is three." if number < 4 else "No.", f"{one.id}.wav", 0.1, 1.0)
        for number, one in enumerate(items)
    }
    answers = {key: GivenAnswer(key, "", (turn,)) for key, turn in turns.items()}
    answers["i9"] = GivenAnswer("i9", "b", (), "broken")
    heard = {f"i{number}.wav": "it is three" for number in range(2)}
    scored = score(items, answers, heard, "", None)
    rows = {(row.group, row.name): row for row in score_rows(scored, {"recognizer": "R"})}
    assert rows["a", "right, text"].value == pytest.approx(4 / 6)
    assert rows["a", "right, text"].num == 6
    assert rows["all", "right, text"].value == pytest.approx(0.4)
    assert rows["all", "right, text"].interval == pytest.approx((0.1682, 0.6873), abs=1e-3)
    assert rows["all", "right, sound"].value == pytest.approx(0.2)
    assert "recognizer: R" in rows["all", "right, sound"].note
    assert rows["b", "questions that failed"].value == pytest.approx(0.25)
    # Two of four replies of three words are read; five replies of one word are not.
    assert rows["all", "ASR-WER: text against sound"].value == pytest.approx((6 + 5) / (12 + 5))
    assert rows["all", "to first audio"].parts == {"p50": 0.1, "p95": 0.1}


def test_chinese_is_read_and_counted_by_characters(tmp_path: Path) -> None:
    write_seed_tts(tmp_path / "data")
    recognizer = ScriptedRecognizer("你好")
    rows, _ = run("seed-tts-eval", tmp_path, lambda one: one.questions[0].text, Listener(recognizer, "R"))
    assert recognizer.languages == ["en", "en", "zh", "zh"]
    assert rows["zh", "CER, sound"].value == 0.0
    assert rows["en", "WER, sound"].value == 1.0
    again = ScriptedRecognizer("never asked")
    run("seed-tts-eval", tmp_path, lambda one: None, Listener(again, "R"), resume=True)
    assert again.languages == []


def test_without_judge_and_recognizer_the_rows_say_so(tmp_path: Path) -> None:
    write_voicebench(tmp_path / "data")
    replies = {"openbookqa": "The answer is B.", "advbench": "I can't help with that.", "bbh": "No."}
    rows, report = run("voicebench", tmp_path, lambda one: replies.get(one.subset, "Cats purr."))
    assert rows["openbookqa", "right, text"].value == 1.0
    assert rows["advbench", "refused, text"].value == 1.0
    assert rows["bbh", "right, text"].value == 0.0
    assert rows["alpacaeval", "judged, text"].skipped == "needs a judge: --judge URL"
    assert rows["sd-qa", "ASR-WER: text against sound"].skipped == "no recognizer in this test"
    assert {"data", "recognizer", "judge", "normalizer", "interval", "commit"} <= set(report.settings)
    out = tmp_path / "out"
    assert (out / "own" / "scripted-bbh-test-audio.jsonl").is_file()
    assert "needs a judge" in (out / "report.md").read_text()
    assert json.loads((out / "report.json").read_text())["model"]["seed"] == 0
    page = (out / "report.html").read_text()
    assert page.count("<tr data-group") == 6
    assert page.count("<audio") == 12


def test_judged_benchmarks(tmp_path: Path) -> None:
    write_urobench(tmp_path / "data")

    def answer(prompt: str) -> str:
        return "4" if "from 1 to 5" in prompt else "maybe" if "five" in prompt else "yes"

    with judge_server(answer) as (url, requests):
        judge = ChatJudge(JudgeSettings(url, "J"), tmp_path / "judge.jsonl")
        rows, _ = run("urobench", tmp_path, lambda one: "A red stool.", judge=judge)
        assert len(requests) == 3  # one question, one open request, one dialogue
    assert (rows["AlpacaEval", "judged, text"].value, rows["AlpacaEval", "judged, text"].unit) == (4.0, "of 5")
    assert rows["MtBenchEval-en", "judged, text"].value == 4.0
    assert rows["Gsm8kEval", "judged, text"].value == 1.0
    assert "judge: J" in rows["Gsm8kEval", "judged, text"].note
    assert rows["Repeat", "WER, text"].value == 0.0
    assert rows["Repeat-zh", "CER, text"].value is not None
    assert rows["Repeat-zh", "CER, text"].value > 1.0
    assert "own script" in rows["SRT-en", "score"].skipped


def test_unreadable_verdicts_are_counted_and_left_out(tmp_path: Path) -> None:
    write_big_bench_audio(tmp_path / "data")
    with judge_server(lambda prompt: "hm" if "Question 0" in prompt else "yes") as (url, _):
        judge = ChatJudge(JudgeSettings(url, "J"), tmp_path / "judge.jsonl")
        rows, _ = run("big-bench-audio", tmp_path, lambda one: "It is invalid.", judge=judge)
    assert rows["judge", "unreadable verdicts, left out"].value == 1
    assert rows["all", "right by the judge, text"].num == 3
    assert rows["all", "right, text"].value == 0.25


def test_limit_and_subsets(tmp_path: Path) -> None:
    write_openaudiobench(tmp_path / "data")
    rows, report = run("openaudiobench", tmp_path, lambda one: "x", limit=5)
    assert report.settings["num_items"] == 5
    assert len({group for group, _ in rows} - {"all"}) == 5  # spread over the subsets
    rows, _ = run("openaudiobench", tmp_path, lambda one: "x", subsets=("trivia_qa",), resume=True)
    assert {group for group, _ in rows} == {"trivia_qa"}
    with pytest.raises(ValueError, match="has no subset 'nothing'"):
        run("openaudiobench", tmp_path, lambda one: "x", subsets=("nothing",), resume=True)


# Comparison ----------------------------------------------------------------------------------------------------------


def save_run(folder: Path, right: Callable[[int], bool], num: int = 200) -> Path:
    scores = [Score(f"i{number}", "set", "right, text", float(right(number))) for number in range(num)]
    errors = [Score(f"i{number}", "set", "WER", float(not right(number)), 4.0, "%", "lower") for number in range(num)]
    folder.mkdir()
    Scored([*scores, *errors]).save(folder)
    return folder


def test_better_worse_or_not_to_be_told_apart(tmp_path: Path) -> None:
    base = save_run(tmp_path / "a", lambda number: number % 2 == 0)
    good = save_run(tmp_path / "b", lambda number: number % 2 == 0 or number % 10 == 1)
    same = save_run(tmp_path / "c", lambda number: (number % 2 == 0) != (number in (3, 4)))
    verdicts = {one.measure: one.verdict for one in compare(base, good)}
    assert verdicts == {"right, text": BETTER, "WER": BETTER}
    assert {one.verdict for one in compare(good, base)} == {WORSE}
    assert {one.verdict for one in compare(base, same)} == {UNDECIDED}
    (first, _) = compare(base, good)
    assert [first.first, first.second, first.difference] == pytest.approx([0.5, 0.6, 0.1])
    assert first.interval[0] < 0.1 < first.interval[1]
    assert first.num == 200


def test_only_shared_items_are_compared(tmp_path: Path) -> None:
    base = save_run(tmp_path / "a", lambda number: True, num=10)
    more = save_run(tmp_path / "b", lambda number: number < 10, num=100)
    assert {(one.num, one.verdict) for one in compare(base, more)} == {(10, UNDECIDED)}
    (tmp_path / "c").mkdir()
    with JsonLines(tmp_path / "c" / "scores.jsonl"):
        pass
    with pytest.raises(ValueError, match="share no item"):
        compare(base, tmp_path / "c")


def test_the_command_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_run(tmp_path / "a", lambda number: number % 2 == 0)
    good = save_run(tmp_path / "b", lambda number: True)
    assert main(["evaluate", "--compare", str(base), str(good)]) == 0
    assert capsys.readouterr().out.strip() == format_comparison(compare(base, good))
    assert main(["evaluate", "--json", "--compare", str(base), str(good)]) == 0
    assert json.loads(capsys.readouterr().out)[0]["verdict"] == BETTER
    assert main(["evaluate", "--compare", str(base), str(tmp_path)]) == 2
    assert "has no scores.jsonl" in capsys.readouterr().err
    assert main(["evaluate"]) == 0
    assert "--compare A B" in capsys.readouterr().out


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_asks_a_chatbot(tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_openaudiobench(tmp_path / "data", num=1)
    command = ["evaluate", "spoken-qa", "--data", str(tmp_path / "data"), "--model", str(tiny_folder), "--json"]
    assert main([*command, "-o", str(tmp_path / "out")]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {(row["group"], row["name"]): row for row in report["rows"]}
    assert rows["all", "right, text"]["num"] == 3
    assert rows["all", "questions that failed"]["value"] == 0.0
    assert rows["all", "to first audio"]["value"] > 0
    assert set(report["model"]["hashes"]) == {"tokenizer", "vocabulary", "language", "decoder"}
    assert len(list((tmp_path / "out" / "sounds").glob("*.wav"))) == 3
    assert main([*command, "-o", str(tmp_path / "out")]) == 2
    assert "--resume continues" in capsys.readouterr().err
    assert main([*command, "-o", str(tmp_path / "out"), "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == report["rows"]


def test_the_command_reads_texts_aloud(tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_seed_tts(tmp_path / "data")
    command = ["evaluate", "seed-tts-eval", "--data", str(tmp_path / "data"), "--model", str(tiny_folder), "--json"]
    assert main([*command, "-o", str(tmp_path / "out"), "--limit", "1"]) == 0
    answers = read_answers(tmp_path / "out" / "answers.jsonl")
    (answer,) = answers.values()
    assert answer.error == ""
    assert (tmp_path / "out" / "own" / "en" / "utt-en.wav").is_file()


def test_bad_data_is_refused_before_a_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "urobench", "--model", "no-such-model", "--data"]
    assert main([*command, str(tmp_path)]) == 2
    assert "has no {basic|pro}/DATASET/test.jsonl of URO-Bench" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "nothing")]) == 2
    assert "is no folder with the data of URO-Bench" in capsys.readouterr().err


def test_a_missing_cell_is_named(tmp_path: Path) -> None:
    path = next(write_voicebench(tmp_path).glob("sd-qa/*.parquet"))
    with pytest.raises(ValueError, match="has no row 9"):
        SoundPlace(path, 9).read()
