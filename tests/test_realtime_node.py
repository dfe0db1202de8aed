"""The realtime session of `@openai/agents` for Node, unmodified, against the real server.

It comes with `npm install --no-package-lock --prefix tests/node`.
"""

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from duologue import rates
from tests.live_server import NUM_SPEECH, TEXT, LiveServer, question, scripted_bot, serving

FOLDER = Path(__file__).parent / "node"
KEY = "a-key-of-enough-length"
MIN_NODE = 20


def _missing() -> str:
    """What is not there, in words."""
    if shutil.which("node") is None:
        return "there is no node"
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").split(".")[0]) < MIN_NODE:
        return f"@openai/agents needs Node {MIN_NODE} or newer, and this is {version}"
    if not (FOLDER / "node_modules" / "@openai" / "agents").is_dir():
        return "@openai/agents is not there: npm install --no-package-lock --prefix tests/node"
    return ""


pytestmark = pytest.mark.skipif(bool(_missing()), reason=_missing())


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[LiveServer]:
    with serving(*scripted_bot(tiny_folder), api_keys=(KEY,)) as running:
        yield running


class Node:
    """The Node program `talk.mjs`."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def do(self, act: str, **fields: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"act": act, **fields}) + "\n")
        self._process.stdin.flush()

    def until(self, kind: str) -> list[dict[str, Any]]:
        """What it tells, up to the first of this type."""
        assert self._process.stdout is not None
        events: list[dict[str, Any]] = []
        while not events or events[-1]["type"] != kind:
            line = self._process.stdout.readline()
            assert line, f"it ended; before that it told {events}"
            events.append(json.loads(line))
            assert events[-1]["type"] != "error", events[-1]
        return events


@pytest.fixture
def node(server: LiveServer) -> Iterator[Node]:
    server.engine.release()
    command = ["node", str(FOLDER / "talk.mjs"), f"{server.url}/realtime?model=gpt-realtime", KEY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            running = Node(process)
            running.until("connected")
            yield running
        finally:
            process.kill()


def spoken(after_s: float = 1.5) -> str:
    """A question; the session's turn detection waits longer than ours."""
    return base64.b64encode(question(after_s=after_s).tobytes()).decode()


def heard_s(events: list[dict[str, Any]]) -> float:
    num_bytes: int = sum(event["num_bytes"] for event in events if event["type"] == "audio")
    return num_bytes / 48_000


def test_a_spoken_and_a_written_question_are_answered(node: Node) -> None:
    whole_s = rates.speak_samples_for_tokens(NUM_SPEECH) / rates.SPEAK_SAMPLE_RATE
    node.do("say", pcm=spoken())
    events = node.until("agent_end")
    assert events[-1]["output"] == TEXT
    assert heard_s(events) == pytest.approx(whole_s, abs=0.02)
    node.do("write", text="And seven plus six?")
    events = node.until("agent_end")
    assert events[-1]["output"] == TEXT
    assert heard_s(events) == pytest.approx(whole_s, abs=0.02)
    node.do("history")
    items = node.until("history")[-1]["items"]
    assert [item["role"] for item in items] == ["user", "assistant", "user", "assistant"]
    assert [item["status"] for item in items] == ["completed"] * 4
    assert items[1]["content"][0]["transcript"] == TEXT


@pytest.mark.parametrize("by", ["voice", "program"])
def test_an_answer_is_interrupted(server: LiveServer, node: Node, by: str) -> None:
    server.engine.hold(35)
    node.do("write", text="What is seven plus five?")
    node.until("audio")
    if by == "voice":
        node.do("say", pcm=spoken())
    else:
        node.do("interrupt")
    node.until("audio_interrupted")
    node.until("agent_end")
    server.engine.release()
    if by == "program":
        node.do("write", text="And seven plus six?")
    assert node.until("agent_end")[-1]["output"] == TEXT
    node.do("history")
    items = node.until("history")[-1]["items"]
    assert [item["role"] for item in items] == ["user", "assistant"] * 2
    assert items[1]["status"] == "incomplete"
    assert items[3]["content"][0]["transcript"] == TEXT
