"""A real vLLM server with our logits processor: `make test-vllm`. Skips without the environment that this installs."""

import asyncio
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from duologue.interleave import INTERLEAVED, SPEECH_ONLY, TEXT_ONLY, Schedule
from duologue.language.engine import PlainEngine
from duologue.language.sampling import Sampling
from duologue.language.vllm import VllmEngine
from duologue.released.convert import convert
from duologue.released.language import load_released_language
from duologue.released.random_weights import ReleasedLanguageSizes, write_random_language
from duologue.released.text import load_released_vocabulary
from duologue.vocabulary import Vocabulary
from tests.vllm_runners import Job

VARIABLE = "DUOLOGUE_VLLM_PYTHON"
PYTHON = os.environ.get(VARIABLE)
CPU_BLOCK = 32  # ids of a cached block: the smallest of the CPU attention, whose default is 128
START_S = 400.0
# vLLM on a CPU takes heads of 32 and more.
SIZES = ReleasedLanguageSizes(128, 2, 4, 2, 32, 192, 2048, codebook_size=256, num_ranks=448, first_speech=40)
PROMPT = [300 + i % 140 for i in range(100)]
JOBS: list[Job] = [
    (PROMPT, Sampling(temperature=0.0, max_tokens=80), INTERLEAVED),
    (PROMPT[:50], Sampling(temperature=1.0, top_p=0.9, max_tokens=90, seed=3), Schedule(3, 5)),
    (PROMPT[:7], Sampling(temperature=0.7, top_k=5, max_tokens=60, seed=4), TEXT_ONLY),
    (PROMPT[:9], Sampling(temperature=0.0, speech_temperature=1.0, top_p=1.0, max_tokens=70, seed=5), INTERLEAVED),
    (PROMPT[3:], Sampling(temperature=0.5, max_tokens=50, seed=6), SPEECH_ONLY),
    (PROMPT[5:30], Sampling(temperature=0.5, max_tokens=50, seed=7, text_language="en"), Schedule(10, 5)),
]

pytestmark = pytest.mark.skipif(PYTHON is None, reason=f"{VARIABLE} names no Python with vLLM: run make test-vllm")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "original"
    write_random_language(folder, SIZES, seed=1)
    return folder


@pytest.fixture(scope="module")
def vocabulary(original: Path) -> Vocabulary:
    return load_released_vocabulary(original)


@pytest.fixture(scope="module")
def plain(original: Path, vocabulary: Vocabulary) -> PlainEngine:
    return PlainEngine(load_released_language(original, "float32"), vocabulary)


@pytest.fixture(scope="module", params=["original", "converted"])
def engine(request: pytest.FixtureRequest, original: Path, vocabulary: Vocabulary) -> Iterator[VllmEngine]:
    folder = original
    if request.param == "converted":
        folder = original.parent / "converted"
        convert(original, folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = folder.parent / f"{request.param}.log"
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--logits-processors", "duologue.vllm_processor:Interleave", "--skip-tokenizer-init"]
    command += ["--enable-prompt-tokens-details", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    command += ["--block-size", str(CPU_BLOCK)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent / "src")
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        try:
            engine = _wait_for(process, f"http://127.0.0.1:{port}", vocabulary, log)
            yield engine
            engine.close()
        finally:
            process.terminate()
    print(log.read_text(errors="replace"), file=sys.stderr)


def _wait_for(process: subprocess.Popen[bytes], url: str, vocabulary: Vocabulary, log: Path) -> VllmEngine:
    deadline = time.monotonic() + START_S
    while True:
        try:
            return VllmEngine(url, vocabulary)
        except ValueError as error:
            if process.poll() is not None or time.monotonic() > deadline or "no vLLM server answers" not in str(error):
                pytest.fail(f"{error}\n{log.read_text(errors='replace')[-8000:]}")
            time.sleep(1.0)


def _metric(engine: VllmEngine, name: str) -> float:
    """Returns the sum of a metric of the server over its labels."""
    page = httpx.get(f"{engine.url}/metrics", trust_env=False).text
    values = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", page, re.MULTILINE)
    assert values, name
    return sum(map(float, values))


def _settle(engine: VllmEngine) -> None:
    """Waits for the usage, which follows the last id."""
    deadline = time.monotonic() + 30.0
    while engine._tasks:
        assert time.monotonic() < deadline
        time.sleep(0.05)


async def _collect(engine: VllmEngine, job: Job) -> list[int]:
    return [token async for token in engine.generate(*job)]


async def _together(engine: VllmEngine, jobs: list[Job]) -> list[list[int]]:
    return await asyncio.gather(*(_collect(engine, job) for job in jobs))


def test_mixed_schedules_in_one_batch_give_the_ids_of_our_engine(engine: VllmEngine, plain: PlainEngine) -> None:
    expected = [list(plain.stream(*job)) for job in JOBS]
    assert asyncio.run(_together(engine, JOBS)) == expected
    assert asyncio.run(_together(engine, [*JOBS, *JOBS[::-1]])) == [*expected, *expected[::-1]]
    assert [list(engine.stream(*job)) for job in JOBS] == expected


def test_warming_and_later_turns_find_the_prefix(engine: VllmEngine, plain: PlainEngine) -> None:
    prompt = [310 + i * i % 130 for i in range(90)]
    before = engine.num_cached, _metric(engine, "vllm:prefix_cache_hits_total")
    asyncio.run(engine.warm(prompt[:80]))
    assert engine.num_cached == before[0]
    job = prompt, Sampling(temperature=0.0, max_tokens=40), INTERLEAVED
    reply = list(engine.stream(*job))
    assert reply == list(plain.stream(*job))
    _settle(engine)
    assert engine.num_cached - before[0] == 64
    turn = [*prompt, *reply, *prompt[:5]]
    list(engine.stream(turn, Sampling(temperature=0.0, max_tokens=5), INTERLEAVED))
    _settle(engine)
    found = engine.num_cached - before[0] - 64
    assert found == (len(prompt) + len(reply) - 1) // CPU_BLOCK * CPU_BLOCK
    assert _metric(engine, "vllm:prefix_cache_hits_total") - before[1] == 64 + found


def test_barge_in_takes_the_reply_out_of_the_batch(engine: VllmEngine) -> None:
    async def run() -> None:
        stream = engine.generate(PROMPT, Sampling(temperature=1.0, top_p=1.0, max_tokens=900), Schedule(800, 5), "talk")
        async for _ in stream:
            engine.cancel("talk")

    before = _metric(engine, "vllm:generation_tokens_total")
    asyncio.run(run())
    deadline = time.monotonic() + 60.0
    while _metric(engine, "vllm:num_requests_running") > 0:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert _metric(engine, "vllm:generation_tokens_total") - before < 450


def test_malformed_arguments_are_refused_by_the_server(engine: VllmEngine) -> None:
    body = {"model": engine.model, "prompt": [300], "max_tokens": 4, "vllm_xargs": {"duologue": "{"}, "temperature": 0}
    answer = httpx.post(f"{engine.url}/v1/completions", json=body, trust_env=False)
    assert answer.status_code == 400
    assert "is not JSON" in answer.text
    assert list(engine.stream(PROMPT, Sampling(max_tokens=3)))  # and it lives
