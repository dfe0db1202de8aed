"""The training loop on a model of a few weights: resuming, accumulating, two processes, and stopping in time."""

import csv
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from duologue.training.checkpoints import Checkpoints
from duologue.training.loop import Batch, LoopConfig, NonFiniteLoss, make_optimizer, run


class Line:
    """Fits a line through noise, with dropout, so that every random number counts."""

    phases: Mapping[str, nn.Module]
    weights: Mapping[str, float]

    def __init__(self, stop_at: int | None = None, bad_at: int | None = None) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.phases = {"model": self.model}
        self.weights = {"error": 1.0, "size": 0.01}
        self.stop_at, self.bad_at = stop_at, bad_at
        self.sampled: list[str] = []

    def batch(self, index: int) -> Batch:
        if index == self.stop_at:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(16, 4, generator=generator)
        x[0, 0] = torch.nan if index == self.bad_at else x[0, 0]
        return {"x": x, "y": x.sum(1, keepdim=True)}

    def losses(self, phase: str, batch: Batch, progress: float) -> dict[str, Tensor]:
        y = self.phases[phase](batch["x"])
        return {"error": (y - batch["y"]).square().mean(), "size": y.abs().mean()}

    def evaluate(self) -> dict[str, float]:
        return {"bias": float(sum(p.detach().sum() for p in self.model[2].parameters()))}

    def sample(self, folder: Path) -> None:
        self.sampled.append(folder.name)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), folder / "model.pt")


class Inner(nn.Linear):
    """A layer that `repeated_layers` finds."""


class Layer(nn.Module):
    _no_split_modules = ("Inner",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.embedding = Inner(48, 24), nn.Embedding(5, 24)


CONFIG = LoopConfig(num_steps=12, learning_rate=0.01, warmup_steps=3, log_every=1, evaluate_every=4, sample_every=6)


def weights_in(stage: Line) -> Tensor:
    return torch.cat([value.flatten() for value in stage.model.state_dict().values()])


def weights_of(folder: Path) -> Tensor:
    state = torch.load(folder / "final" / "model.pt", weights_only=True)
    return torch.cat([value.flatten() for value in state.values()])


@pytest.mark.parametrize("in_background", [False, True])
def test_resumed_equals_uninterrupted(tmp_path: Path, in_background: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With checkpoints written in the background, too, as on CUDA."""
    made = partial(Checkpoints, in_background=in_background)
    monkeypatch.setattr("duologue.training.loop.Checkpoints", lambda *parts, **_: made(*parts))
    config = replace(CONFIG, checkpoint_every_s=0.0, average_decay=0.5, average_from=0.3)
    run(Line(), config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Line(stop_at=7), config, tmp_path / "cut")
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-0000007"]
    run(Line(), config, tmp_path / "cut")
    assert torch.equal(weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut"))
    logs = [list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("whole", "cut")]
    first, second = ([(row["step"], row["name"], row["value"]) for row in log] for log in logs)
    assert first == second


def test_the_average_of_the_weights_is_evaluated_and_saved(tmp_path: Path) -> None:
    """It begins with the weights after the seventh of twelve steps; the training itself knows nothing of it."""
    trail: list[Tensor] = []

    class Trailing(Line):
        def losses(self, phase: str, batch: Batch, progress: float) -> dict[str, Tensor]:
            trail.append(weights_in(self).clone())
            return super().losses(phase, batch, progress)

    stage, decay = Trailing(), 0.6
    metrics = run(stage, replace(CONFIG, average_decay=decay, average_from=0.5), tmp_path / "averaged")
    run(Line(), CONFIG, tmp_path / "plain")
    assert torch.equal(weights_in(stage), weights_of(tmp_path / "plain"))
    average = trail[7]
    for weights in (*trail[8:], weights_in(stage)):
        average = decay * average + (1 - decay) * weights
    torch.testing.assert_close(weights_of(tmp_path / "averaged"), average)
    assert metrics["bias"] == pytest.approx(float(average[-9:].sum()), rel=1e-5)
    with pytest.raises(ValueError, match="from 0 to below 1"):
        replace(CONFIG, average_decay=1.0)


def test_muon_moves_matrices_as_far_as_adamw() -> None:
    """The first step of either has an RMS of about the learning rate on a matrix, however large its gradient is."""
    moved = {}
    for optimizer in ("adamw", "muon"):
        layer = Layer()
        before = [p.detach().clone() for p in layer.parameters()]
        made = make_optimizer(layer, replace(CONFIG, optimizer=optimizer, weight_decay=0.0))
        (100 * layer.inner.weight.square().sum() + layer.inner.bias.sum() + layer.embedding.weight.sum()).backward()
        made.step()
        moved[optimizer] = [
            float((p.detach() - old).square().mean().sqrt()) for p, old in zip(layer.parameters(), before, strict=True)
        ]
    weight, *rest = moved["muon"]
    assert weight == pytest.approx(0.2 * CONFIG.learning_rate, rel=0.25)
    assert rest == moved["adamw"][1:]  # bias and embedding are AdamW's


def test_muon_needs_layers() -> None:
    with pytest.raises(ValueError, match="needs the layers of a language model"):
        make_optimizer(nn.Linear(3, 3), replace(CONFIG, optimizer="muon"))


def test_a_checkpoint_of_an_earlier_release_is_refused(tmp_path: Path) -> None:
    run(Line(), replace(CONFIG, num_steps=1), tmp_path)
    state = tmp_path / "checkpoints" / "step-0000001" / "state.json"
    state.write_text('{"version": 1, "step": 1, "progress": 0.1}')
    with pytest.raises(ValueError, match="version 1; this release resumes version 2"):
        run(Line(), CONFIG, tmp_path)


def test_worker_processes_prepare_the_same_batches(tmp_path: Path) -> None:
    run(Line(), CONFIG, tmp_path / "thread")
    run(Line(), replace(CONFIG, num_workers=2), tmp_path / "workers")
    assert torch.equal(weights_of(tmp_path / "thread"), weights_of(tmp_path / "workers"))


def test_logs_evaluates_samples(tmp_path: Path) -> None:
    stage = Line()
    metrics = run(stage, CONFIG, tmp_path)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert {row["name"] for row in rows} == {"error", "size", "grad_norm", "valid/bias"}
    assert [int(row["step"]) for row in rows if row["name"] == "valid/bias"] == [4, 8, 12]
    assert stage.sampled == ["step-0000006", "step-0000012"]
    assert metrics == stage.evaluate()


def test_a_loss_that_is_no_number_stops_before_the_step(tmp_path: Path) -> None:
    run(Line(), replace(CONFIG, num_steps=4), tmp_path / "good")
    bad = Line(bad_at=4)
    with pytest.raises(NonFiniteLoss, match=r"step 5, batch 4: error = nan"):
        run(bad, replace(CONFIG, schedule="constant"), tmp_path / "bad")
    good = Line()
    run(good, replace(CONFIG, schedule="constant", num_steps=4), tmp_path / "constant")
    assert torch.equal(weights_in(good), weights_in(bad))


def test_learning_rate() -> None:
    config = LoopConfig(num_steps=110, learning_rate=1.0, warmup_steps=10, min_lr_ratio=0.1, schedule="linear")
    assert [config.lr_at(step, step / 110) for step in (0, 9, 10)] == [0.1, 1.0, 1.0]
    assert config.lr_at(60, 60 / 110) == pytest.approx(0.55)
    assert config.lr_at(110, 1.0) == config.lr_at(1000, 1.0) == pytest.approx(0.1)
    cosine = LoopConfig(num_steps=110, learning_rate=1.0, warmup_steps=10, min_lr_ratio=0.0)
    assert cosine.lr_at(60, 60 / 110) == pytest.approx(0.5)


def test_a_run_by_the_clock_ends_with_its_time_and_goes_on_with_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("duologue.training.loop.time.monotonic", lambda: float(next(clock)))
    config = replace(CONFIG, minutes=0.5, checkpoint_every_s=0.0, sample_every=1000)
    seen: list[float] = []

    class Watched(Line):
        def losses(self, phase: str, batch: Batch, progress: float) -> dict[str, Tensor]:
            seen.append(progress)
            return super().losses(phase, batch, progress)

    with pytest.raises(KeyboardInterrupt):
        run(Watched(stop_at=3), config, tmp_path)
    run(Watched(), config, tmp_path)
    assert seen == sorted(seen)
    assert seen[0] < 0.1
    assert 0.7 < seen[-1] < 1.0
    assert max(later - earlier for earlier, later in pairwise(seen)) < 0.3


@pytest.mark.slow
def test_two_processes_equal_two_batches(tmp_path: Path) -> None:
    """Data parallel over gloo: the gradient of two ranks is that of two accumulated batches."""
    run(Line(), replace(CONFIG, num_steps=4, accumulate=2), tmp_path / "one")
    script = tmp_path / "train.py"
    script.write_text(
        "from dataclasses import replace\nfrom pathlib import Path\nfrom tests.test_loop import CONFIG, Line\n"
        "from duologue.training.loop import run\n"
        f"run(Line(), replace(CONFIG, num_steps=4), Path({str(tmp_path / 'two')!r}))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    root = Path(__file__).parent.parent
    environment = {"PYTHONPATH": f"{root / 'src'}:{root}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    torch.testing.assert_close(weights_of(tmp_path / "one"), weights_of(tmp_path / "two"))
