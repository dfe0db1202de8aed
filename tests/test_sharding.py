"""Several processes over gloo train a sharded language model as one process does, and any number of them resumes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duologue.language.backbone import load_language
from duologue.training.loop import Batch, LoopConfig, run
from duologue.training.pretrain import PretrainRecipe, PretrainStage
from duologue.training.sharding import repeated_layers
from tests.tiny_language import small_corpus

ROOT = Path(__file__).parent.parent
LOOP = LoopConfig(
    3,
    1e-3,
    schedule="constant",
    warmup_steps=1,
    precision="fp32",
    evaluate_every=10**6,
    sample_every=10**6,
    average_decay=0.7,
)
SCRIPT = """
import os, signal, sys
from pathlib import Path
from dataclasses import replace
from tests.test_sharding import LOOP, Killed, made
from duologue.training.loop import run
from duologue.training.pretrain import PretrainStage
folder, out, optimizer, killed_at = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
kind = Killed if killed_at and os.environ["RANK"] == "1" else PretrainStage
stage = made(folder, replace(LOOP, optimizer=optimizer), kind)
run(stage, stage.recipe.loop, out)
"""


class Killed(PretrainStage):
    """Its process is killed while it makes a batch of the second step."""

    def batch(self, index: int) -> Batch:
        if index > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(index)


def made(folder: Path, loop: LoopConfig = LOOP, kind: type[PretrainStage] = PretrainStage) -> PretrainStage:
    return kind(small_corpus(folder, PretrainRecipe, loop=loop, activation_checkpointing=True, logits_chunk=16))


def start(rank: int, port: int, *arguments: object) -> subprocess.Popen[str]:
    environment = {
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def two_ranks(folder: Path, out: Path, optimizer: str = "adamw", killed_at: int = 0) -> list[tuple[int, str]]:
    """Runs two processes to their end; returns their exit codes and what they wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(rank, port, folder, out, optimizer, killed_at) for rank in (0, 1)]
    try:
        written = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, written, strict=True)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(load_language(out / "final" / "language").state_dict())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and the run of two processes on it."""
    return trained_by_two(tmp_path_factory.mktemp("sharding"), "adamw")


def trained_by_two(folder: Path, optimizer: str) -> Path:
    small_corpus(folder, PretrainRecipe, loop=LOOP)
    for code, text in two_ranks(folder, folder / "two", optimizer):
        assert code == 0, text[-2000:]
    return folder


def test_two_ranks_equal_one(folder: Path, tmp_path: Path) -> None:
    assert_one_trains_alike(folder, replace(LOOP, accumulate=2), tmp_path)


def test_two_ranks_equal_one_with_muon(tmp_path: Path) -> None:
    """It needs whole matrices, which no process has."""
    loop = replace(LOOP, accumulate=2, optimizer="muon")
    folder = trained_by_two(tmp_path / "corpus", "muon")
    assert_one_trains_alike(folder, loop, tmp_path / "one")
    assert_one_goes_on(folder, replace(loop, num_steps=5), tmp_path)


def assert_one_trains_alike(folder: Path, loop: LoopConfig, tmp_path: Path) -> None:
    run(made(folder, loop), loop, tmp_path)
    one, two = weights(tmp_path), weights(folder / "two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-4, rtol=1e-4)
    assert (folder / "two" / "log.csv").read_text().count("tokens_per_s") == 1


def test_one_rank_resumes_what_two_ranks_wrote(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "two" / "checkpoints", tmp_path / "checkpoints")
    run(made(folder), LOOP, tmp_path)  # nothing is left to train, so the weights are those of the checkpoint
    for name, value in weights(folder / "two").items():
        assert torch.equal(value, weights(tmp_path)[name]), name
    assert_one_goes_on(folder, replace(LOOP, num_steps=5, accumulate=2), tmp_path)


def assert_one_goes_on(folder: Path, longer: LoopConfig, tmp_path: Path) -> None:
    run(made(folder, longer), longer, tmp_path / "whole")
    shutil.copytree(folder / "two" / "checkpoints", tmp_path / "rest" / "checkpoints")
    run(made(folder, longer), longer, tmp_path / "rest")
    resumed = weights(tmp_path / "rest")
    for name, value in weights(tmp_path / "whole").items():  # with the moments of the optimizer, too
        torch.testing.assert_close(value, resumed[name], atol=1e-4, rtol=1e-4)


def test_a_sharded_layer_is_still_one_of_the_repeated(folder: Path) -> None:
    """Its class is another then, and a checkpoint leaves out frozen weights of what has such layers."""
    model = load_language(folder / "two" / "final" / "language")
    layers = repeated_layers(model)
    assert len(layers) == model.config.num_hidden_layers
    for layer in layers:
        layer.__class__ = type(f"FSDP{type(layer).__name__}", (type(layer),), {})
    assert repeated_layers(model) == layers


@pytest.mark.slow
def test_a_killed_rank_stops_the_others_with_a_sentence(folder: Path, tmp_path: Path) -> None:
    (first, text), (second, _) = two_ranks(folder, tmp_path, killed_at=1)
    assert second == -signal.SIGKILL
    assert first == 1
    assert "RankLost: another process of this training ended" in text
