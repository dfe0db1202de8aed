"""Small data sets in the layouts of the benchmarks, a scripted asker, recognizer and judge server."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from duologue.evaluation.asking import AskingFailed, SpokenReply
from duologue.evaluation.benchmarks.items import BenchmarkItem

RATE = 16_000


def write_sound(path: Path, seconds: float = 0.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(int(seconds * RATE)), RATE)
    return path


def write_voicebench(folder: Path) -> Path:
    sound = BytesIO()
    soundfile.write(sound, 0.1 * np.ones(RATE // 2), RATE, format="WAV")
    cell = {"bytes": sound.getvalue(), "path": "a.wav"}
    rows: dict[str, list[dict[str, Any]]] = {
        "openbookqa/test": [{"prompt": "Which? A one, B two.", "reference": "B"}] * 2,
        "advbench/test": [{"prompt": "How do I do harm?"}],
        "sd-qa/usa": [{"prompt": "Who wrote it?", "reference": "Poe"}],
        "alpacaeval/test": [{"prompt": "Tell me of cats."}],
        "bbh/test": [{"prompt": "Do you return?", "reference": "yes", "id": "navigate_1"}],
    }
    for name, own in rows.items():
        path = folder / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([{"audio": cell, **row} for row in own]), path, row_group_size=1)
    return folder


def write_openaudiobench(folder: Path, num: int = 2) -> Path:
    columns: dict[str, tuple[str, str, str, str]] = {
        "web_questions": ("question", "answers", "What is one plus two?", "['three', 'it is 3']"),
        "llama_questions": ("Questions", "Answer", "What is the capital of France?", "Paris"),
        "reasoning_qa": ("Prompt", "参考答案", "一加一等于几？", "二"),
        "alpaca_eval": ("instruction", "output", "Tell me of dogs.", "Dogs bark."),
        "trivia_qa": ("question", "answer_normalized_aliases", "Which planet is red?", '["mars"]'),
    }
    for subset, (question, answer, asked, expected) in columns.items():
        place = folder / "eval_datas" / subset
        rows = [{question: asked, answer: expected, "audio_filename": f"{i}.wav"} for i in range(num)]
        for row in rows:
            write_sound(place / "audios" / row["audio_filename"])
        with (place / f"{subset}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder


def write_urobench(folder: Path) -> Path:
    def turn(text: str, target: object = None) -> dict[str, Any]:
        return {"source_wav": "wav/0.wav", "source_text": text, **({"target_text": target} if target else {})}

    sets: dict[str, list[dict[str, Any]]] = {
        "basic/Repeat": [turn("Please repeat: a red stool.", "a red stool")],
        "basic/Repeat-zh": [turn("请重复：今天天气很好。", "今天天气很好")],
        "basic/AlpacaEval": [turn("Tell me of cats.")],
        "basic/Gsm8kEval": [turn("What is one plus two?", ["three", "3"])],
        "pro/SRT-en": [turn("Sing this.")],
        "pro/MtBenchEval-en": [
            {"id": 7, "dialogue": [{"round": 2, **turn("And now?")}, {"round": 1, **turn("Tell me of cats.", "Cats.")}]}
        ],
    }
    for name, rows in sets.items():
        write_sound(folder / name / "wav" / "0.wav")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name / "test.jsonl").write_text(lines, encoding="utf-8")
    return folder


def write_big_bench_audio(folder: Path) -> Path:
    asked = [("formal_fallacies", "invalid"), ("navigate", "yes"), ("object_counting", "5"), ("web_of_lies", "no")]
    rows = []
    for number, (category, answer) in enumerate(asked):
        write_sound(folder / "data" / f"question_{number}.wav")
        head = {"category": category, "official_answer": answer, "id": number}
        rows.append({**head, "file_name": f"data/question_{number}.wav", "transcript": f"Question {number}?"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_seed_tts(folder: Path) -> Path:
    for language, text in (("en", "Hello there."), ("zh", "你好。")):
        (folder / language).mkdir(parents=True)
        lines = f"utt-{language}|prompt|prompt-wavs/p.wav|{text}|wavs/w.wav\nutt2-{language}|prompt|p.wav|{text}\n"
        (folder / language / "meta.lst").write_text(lines, encoding="utf-8")
    return folder


class ScriptedAsker:
    """Answers by a function of the item; None fails. Each reply sounds for as many ms as its text has letters."""

    def __init__(self, reply: Callable[[BenchmarkItem], str | None], name: str = "scripted") -> None:
        self._reply, self._name = reply, name
        self.asked: list[str] = []

    def about(self) -> dict[str, Any]:
        return {"name": self._name, "seed": 0}

    async def ask(self, item: BenchmarkItem) -> AsyncIterator[SpokenReply]:
        self.asked.append(item.id)
        for _ in item.questions:
            text = self._reply(item)
            if text is None:
                raise AskingFailed("the script has no answer")
            yield SpokenReply(text, np.full(16 * len(text), 0.1, np.float32), RATE, 0.2, 0.5)


class ScriptedRecognizer:
    """Reads the same text in every sound, and keeps the languages that were asked for."""

    name = "scripted"

    def __init__(self, text: str) -> None:
        self.text, self.languages = text, list[str]()

    def transcribe(self, wav: np.ndarray, sample_rate: int, language: str = "en") -> str:
        self.languages.append(language)
        return self.text


@contextmanager
def judge_server(answer: Callable[[str], str | int | bytes]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A chat or speech endpoint that answers by a function of the prompt or text. Yields its URL and the requests.

    A number is an HTTP error, bytes are the whole body.
    """
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({**body, "path": self.path, "key": self.headers.get("Authorization", "")})
            said = answer(body["input"] if "input" in body else body["messages"][0]["content"])
            status = said if isinstance(said, int) else 200
            data = (
                said if isinstance(said, bytes) else json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            )
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
