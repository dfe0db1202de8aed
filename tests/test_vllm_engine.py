"""The engine over a vLLM server: the same ids, faults in one sentence, and nothing left running."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import duologue
from duologue.cli import main
from duologue.interleave import INTERLEAVED, SPEECH_ONLY, TEXT_ONLY, Schedule
from duologue.language.engine import PlainEngine
from duologue.language.requests import EngineFull
from duologue.language.sampling import Sampling
from duologue.language.vllm import VllmEngine
from duologue.models import Models
from duologue.vocabulary import Vocabulary
from tests.tiny import write_tiny_chatbot
from tests.tiny_language import tiny_model, tiny_vocabulary
from tests.vllm_runners import Job
from tests.vllm_server import FakeVllm, fake_vllm

PROMPT = list(range(3, 40))
JOBS: list[Job] = [
    (PROMPT, Sampling(temperature=1.0, max_tokens=60, seed=1), INTERLEAVED),
    (PROMPT[:5], Sampling(temperature=1.0, top_p=0.9, max_tokens=40, seed=3), Schedule(3, 5)),
    (PROMPT[:7], Sampling(temperature=0.7, top_k=5, max_tokens=31, seed=4), TEXT_ONLY),
    (PROMPT[:9], Sampling(temperature=0.0, speech_temperature=2.0, top_p=1.0, max_tokens=25), SPEECH_ONLY),
]
GIVE_UP_S = 60.0


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return tiny_vocabulary()


@pytest.fixture(scope="module")
def plain(vocabulary: Vocabulary) -> PlainEngine:
    torch.manual_seed(1)
    return PlainEngine(tiny_model(vocabulary), vocabulary)


@pytest.fixture
def server(plain: PlainEngine) -> Iterator[FakeVllm]:
    with fake_vllm(plain) as server:
        yield server


@pytest.fixture
def engine(server: FakeVllm, vocabulary: Vocabulary) -> Iterator[VllmEngine]:
    engine = VllmEngine(server.url, vocabulary, max_sessions=8)
    server.requests.clear()
    yield engine
    engine.close()


def until(condition: threading.Event) -> None:
    assert condition.wait(GIVE_UP_S)


def test_ids_are_those_of_our_engine(engine: VllmEngine, plain: PlainEngine, server: FakeVllm) -> None:
    expected = [list(plain.stream(*job)) for job in JOBS]

    async def together() -> list[list[int]]:
        async def one(job: Job) -> list[int]:
            return [token async for token in engine.generate(*job)]

        return await asyncio.gather(*(one(job) for job in JOBS))

    assert asyncio.run(together()) == expected
    assert [list(engine.stream(*job)) for job in JOBS] == expected  # other loops and threads read too
    assert engine.running == engine.cached_tokens == 0
    for body in server.requests:
        assert (body["temperature"], body["model"], body["ignore_eos"]) == (0, "tiny", True)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("dies", r"closed the connection \(RemoteProtocolError\)"),
        ("ends", "ended a reply early$"),
        ("done", "ended a reply early$"),
        ("length", r"ended a reply early \(finish_reason 'length'\)"),
        ("error event", "failed: EngineCore died$"),
        ("refused", r"refused a request \(400\): the prompt is longer than the model$"),
        ("proxy", r"refused a request \(502\): <html>bad gateway</html>$"),
        ("no ids", "sent no token_ids"),
        ("no choices", "sent no token_ids"),
        ("empty choices", "sent no token_ids"),
        ("not json", r"answered something that is not vLLM's: b'\{oops'"),
        ("list", r"answered something that is not vLLM's: b'\[1, 2\]'"),
        ("wrong kind", "gave an impossible id: .* kind control where only .* can come"),
        ("unknown id", "gave an impossible id: token id 1000000 is outside of the vocabulary"),
    ],
)
def test_a_fault_ends_one_reply_with_one_sentence(
    engine: VllmEngine, server: FakeVllm, plain: PlainEngine, vocabulary: Vocabulary, fault: str, sentence: str
) -> None:
    server.wrong_id = vocabulary.control_id("[gMASK]")
    job = PROMPT, Sampling(temperature=1.0, max_tokens=60, seed=1), Schedule(30, 5)
    expected = list(plain.stream(*job))
    server.fault = fault
    message = f"^the language engine failed: VllmError: .*{server.url} {sentence}"
    with pytest.raises(RuntimeError, match=message) as caught:
        list(engine.stream(*job))
    assert "\n" not in str(caught.value)
    server.fault = ""
    assert engine.running == 0
    assert list(engine.stream(*job)) == expected


def test_ids_before_a_fault_are_read(engine: VllmEngine, server: FakeVllm, plain: PlainEngine) -> None:
    server.fault = "dies"
    stream = engine.stream(*JOBS[0])
    assert [next(stream) for _ in range(server.after)] == list(plain.stream(*JOBS[0]))[: server.after]
    with pytest.raises(RuntimeError, match="closed the connection"):
        next(stream)


def test_a_missing_server_or_another_one_is_named(vocabulary: Vocabulary, server: FakeVllm) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(
        ValueError, match=f"^no vLLM server answers at {url} .*: docs/engines.md says how to start one$"
    ):
        VllmEngine(url, vocabulary)
    server.fault = "no model"
    with pytest.raises(ValueError, match=r"lists no model with its max_model_len: it is not vLLM$"):
        VllmEngine(server.url, vocabulary)
    server.fault = "no processor"
    with pytest.raises(ValueError, match=r"where only speech can come: .*--logits-processors"):
        VllmEngine(server.url, vocabulary)
    for url in ("127.0.0.1:8001", "ftp://host", "http://host/other"):
        with pytest.raises(ValueError, match="looks like http://127.0.0.1:8001"):
            VllmEngine(url, vocabulary)
    left = [thread for thread in threading.enumerate() if thread.name == "vllm"]
    assert not left


def test_a_server_that_dies_later_is_named(engine: VllmEngine, server: FakeVllm) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    engine._client.base_url = f"http://127.0.0.1:{port}"
    with pytest.raises(RuntimeError, match="no vLLM server answers at"):
        list(engine.stream(*JOBS[0]))


@pytest.mark.parametrize("way", ["cancel", "leave"])
def test_barge_in_closes_the_connection(engine: VllmEngine, server: FakeVllm, way: str) -> None:
    server.hold_after = 2  # a fast server would have sent everything before the client reads its third id

    async def run() -> list[int]:
        read = []
        stream = engine.generate(*JOBS[0], "talk")
        async for token in stream:
            read.append(token)
            if len(read) == 3:
                if way == "cancel":
                    engine.cancel("talk")
                else:
                    break
        await stream.aclose()  # type: ignore[attr-defined]
        return read

    assert len(asyncio.run(run())) == 3
    assert engine.running == 0
    deadline = time.monotonic() + GIVE_UP_S
    while engine._tasks:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.hold.set()
    until(server.aborted)
    engine.cancel("talk")  # unknown by now


def test_warming_asks_for_one_id_of_whole_new_blocks(engine: VllmEngine, server: FakeVllm) -> None:
    server.cached = 16

    async def run() -> None:
        for length in (15, 16, 20, 31, 37, 33):
            await engine.warm(PROMPT[:length])

    asyncio.run(run())
    assert [len(body["prompt"]) for body in server.requests] == [16, 32]
    assert {body["max_tokens"] for body in server.requests} == {1}
    assert engine.num_cached == 32
    server.fault = "refused"
    with pytest.raises(RuntimeError, match="refused a request"):
        asyncio.run(engine.warm([7] * 40))
    with pytest.raises(ValueError, match="must hold at least one id"):
        asyncio.run(engine.warm([]))


def test_limits_stand_in_front(server: FakeVllm, vocabulary: Vocabulary) -> None:
    engine = VllmEngine(server.url, vocabulary, max_sessions=1, max_cached_tokens=120)
    server.requests.clear()
    server.hold.clear()
    stream = engine.stream(*JOBS[1], "one")
    threading.Timer(0.2, server.hold.set).start()
    next(stream)
    with pytest.raises(EngineFull, match="runs at most 1 at a time"):
        next(engine.stream(*JOBS[1]))
    asyncio.run(engine.warm(PROMPT))  # ignored
    stream.close()  # type: ignore[attr-defined]
    with pytest.raises(EngineFull, match="holds at most 120 ids"):
        next(engine.stream(PROMPT, Sampling(max_tokens=100)))
    for prompt, sampling, message in (
        ([], Sampling(), "at least one id"),
        ([10**6], Sampling(max_tokens=5), "outside of the vocabulary"),
        (PROMPT, Sampling(max_tokens=500), "do not fit the 512 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            next(engine.stream(prompt, sampling))
    assert len(server.requests) == 1
    engine.close()
    engine.close()


def test_a_key_is_sent(server: FakeVllm, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "open-sesame")
    VllmEngine(server.url, vocabulary).close()
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer open-sesame"}


def test_a_chatbot_answers_over_the_server(tmp_path: Path) -> None:
    folder = write_tiny_chatbot(tmp_path, max_tokens=60)
    plain = duologue.load(folder)
    engine = plain.models.engine
    assert isinstance(engine, PlainEngine)
    with fake_vllm(engine) as server:
        bot = duologue.load(folder, engine="vllm", engine_url=server.url)
        assert isinstance(bot.models.engine, VllmEngine)
        replies = [one.chat(text="Who are you?", on_event=lambda event: None) for one in (plain, bot)]
        assert replies[0].speech_tokens == replies[1].speech_tokens
        assert replies[0].text == replies[1].text
        assert replies[0].speech_tokens
        bot.models.engine.close()
    with pytest.raises(ValueError, match="give dtype and quantization to it"):
        Models.load(folder, dtype="bfloat16", engine="vllm", engine_url="http://127.0.0.1:1")
    with pytest.raises(ValueError, match="engine 'plain' has no server"):
        Models.load(folder, engine_url="http://127.0.0.1:1")


def test_serve_reports_a_missing_server_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_tiny_chatbot(tmp_path))
    for arguments, sentence in (
        (["--engine", "vllm"], "engine 'vllm' needs the URL of its server"),
        (["--engine", "vllm", "--engine-url", "http://127.0.0.1:9"], "no vLLM server answers at http://127.0.0.1:9"),
    ):
        assert main(["serve", "--port", "0", "--model", folder, *arguments]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
