"""Settings that every test shares.

The fixtures import torch themselves: the process that hands out tests to others does without it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from duologue.client.process import ServerProcess
    from tests.browser import Open
    from tests.live_server import LiveServer, Talk
    from tests.page_server import PageServer

# A busy machine is not a failing test: no deadline for an example, and no complaint about a slow start.
settings.register_profile(
    "duologue", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("duologue")

# Files that take longest, first, so that no process ends the run alone with one of them.
SLOWEST = (
    "test_recipes.py",
    "test_page.py",
    "test_live_faults.py",
    "test_attack.py",
    "test_page_live.py",
    "test_calls.py",
    "test_streaming.py",
    "test_bench_gpu.py",
    "test_synthesis.py",
    "test_benches.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: index for index, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(SLOWEST)))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights; tests read it and never write into it."""
    from tests.tiny import write_tiny_chatbot

    return write_tiny_chatbot(tmp_path_factory.mktemp("tiny"), max_positions=512, max_tokens=60)


@pytest.fixture(scope="session")
def live_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[ServerProcess]":
    """`duologue serve` with a tiny greedy model, in a process of its own, for tests that come as clients."""
    from duologue.client.process import start_server
    from tests.live import write_greedy_chatbot

    folder = write_greedy_chatbot(tmp_path_factory.mktemp("greedy"))
    with start_server(str(folder), ("--resume-s", "0")) as server:
        yield server


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> "Iterator[LiveServer]":
    """A real server whose language model follows a script, for the tests of the real-time protocol."""
    from tests.live_server import scripted_bot, serving

    with serving(*scripted_bot(tiny_folder)) as running:
        yield running


@pytest.fixture
def talk(server: "LiveServer") -> "Iterator[Talk]":
    """A client of `server` whose session is open."""
    from tests.live_server import talking

    server.engine.release()
    server.engine.failure = None
    with talking(server) as client:
        yield client
    server.engine.release()


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound file of somewhat over a second of noise."""
    path = tmp_path_factory.mktemp("sound") / "question.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(20_000), 16_000)
    return path


def _write_clips(folder: Path, clips: list[dict[str, object]]) -> None:
    """One shard: each clip as a tone of its own with pauses, so that it has a pitch and a level."""
    samples, offset, rows = [], 0, []
    for index, clip in enumerate(clips):
        num_samples = 16_000 + 800 * index
        time = np.arange(num_samples) / 16_000
        wave = 0.2 * np.sin(2 * np.pi * (120 + 10 * index) * time) * (np.sin(2 * np.pi * 3 * time) > -0.5)
        samples.append((wave * 32767).astype("<i2"))
        place = {"sample_rate": 16_000, "offset": offset, "num_samples": num_samples}
        rows.append({"language": "en", "style": "plain", "intent": "plus", **clip, **place})
        offset += num_samples
    folder.mkdir(parents=True, exist_ok=True)
    np.concatenate(samples).tofile(folder / "clips-00000.pcm")
    (folder / "clips-00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def audio_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of clips with training and validation, of tones."""
    folder = tmp_path_factory.mktemp("corpus")
    _write_clips(
        folder,
        [
            {"id": f"clip-{i}", "text": "one two", "role": "free", "voice": "a", "split": "valid" if i > 5 else "train"}
            for i in range(8)
        ],
    )
    return folder


@pytest.fixture(scope="session")
def test_set_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test set of four dialogues, one of them with two turns, of tones."""
    folder = tmp_path_factory.mktemp("test")
    asked = [
        ("plus", "test", [("What is one plus two?", "It is three.", "plain", ["three"])]),
        ("repeat", "test", [("Repeat: red stool.", "Red stool.", "plain", ["red stool"])]),
        ("plus", "test_unseen", [("What is two plus two?", "It is four.", "plain", ["four"])]),
        (
            "again_faster",
            "test",
            [
                ("What is two plus three?", "It is five.", "plain", ["five"]),
                ("Say it again faster.", "It is five.", "faster", ["five"]),
            ],
        ),
    ]
    clips: list[dict[str, object]] = []
    lines = []
    for number, (intent, split, exchanges) in enumerate(asked):
        turns: list[dict[str, object]] = []
        for question, reply, style, answers in exchanges:
            ids = [f"clip-{len(clips)}", f"clip-{len(clips) + 1}"]
            head = {"split": split, "intent": intent}
            clips.append({"id": ids[0], "text": question, "role": "user", "voice": "a", **head})
            clips.append({"id": ids[1], "text": reply, "role": "reply", "voice": "b", "style": style, **head})
            turns.append({"role": "user", "text": question, "clip": [ids[0]], "sound": ""})
            said: dict[str, object] = {
                "role": "assistant",
                "text": reply,
                "clip": [ids[1]],
                "style": style,
                "answers": answers,
            }
            turns.append(said)
        lines.append(json.dumps({"id": f"d{number}", "intent": intent, "split": split, "turns": turns}))
    _write_clips(folder, clips)
    (folder / "dialogues-00000.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def page_server() -> "Iterator[PageServer]":
    """The scripted server of the page."""
    from tests.page_server import PageServer

    with PageServer().running() as running:
        yield running


@pytest.fixture
def visit(browser: "Browser", page_server: "PageServer") -> "Iterator[Open]":
    """Opens pages; at the end none may have asked another server, thrown or complained (a dropped line may)."""
    from playwright.sync_api import expect

    from tests.browser import Visit

    visits: list[Visit] = []

    def open_page(**options: Any) -> Visit:
        visits.append(Visit.open(browser, page_server.url, **options))
        expect(visits[-1].page.locator("#line-words")).to_have_text("mock")
        return visits[-1]

    yield open_page
    for one in visits:
        one.close()
