"""Components on disk: what is written is read back, and every kind of bad folder is one sentence."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from duologue.checkpoint import (
    file_hash,
    load_component,
    load_tensors,
    read_extra,
    save_component,
    save_tensors,
    stored_tensors,
)


@dataclass(frozen=True)
class TinyConfig:
    width: int = 6
    num_codes: int = 5
    rate: float = 0.5


class Tiny(nn.Module):
    counts: Tensor

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.num_codes, config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.head = nn.Linear(config.width, config.num_codes, bias=False)
        self.head.weight = self.embed.weight  # tied
        self.register_buffer("counts", torch.arange(config.num_codes))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.proj(self.embed(ids)))
        return logits


class Other(Tiny):
    pass


@pytest.fixture
def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny(TinyConfig(width=4))


@pytest.fixture
def folder(tmp_path: Path, tiny: Tiny) -> Path:
    save_component(tmp_path / "tiny", tiny, tiny.config, extra={"step": 3})
    return tmp_path / "tiny"


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def edit(folder: Path, **change: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_what_is_saved_is_loaded(folder: Path, tiny: Tiny) -> None:
    loaded = load_component(folder, Tiny, TinyConfig)
    assert loaded.config == tiny.config
    assert same(loaded, tiny)
    assert loaded.head.weight is loaded.embed.weight
    assert not loaded.training
    assert json.loads((folder / "config.json").read_text())["kind"] == "Tiny"
    assert read_extra(folder) == {"step": 3}
    ids = torch.tensor([[0, 4, 2]])
    assert torch.equal(loaded(ids), tiny(ids))


@pytest.mark.parametrize("max_shard_bytes", [1, 100, 10_000])
def test_shards_hold_the_same_weights(tmp_path: Path, tiny: Tiny, max_shard_bytes: int) -> None:
    save_component(tmp_path, tiny, tiny.config, max_shard_bytes=max_shard_bytes)
    assert same(load_component(tmp_path, Tiny, TinyConfig), tiny)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) == {1: 4, 100: 3, 10_000: 1}[max_shard_bytes]
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(files)
        assert index["metadata"]["total_size"] == sum(
            t.numel() * t.element_size() for t in load_tensors(tmp_path).values()
        )


def test_a_second_save_leaves_nothing_of_the_first(tmp_path: Path, tiny: Tiny) -> None:
    for max_shard_bytes in (1, 10_000, 100, 10_000):
        save_component(tmp_path, tiny, tiny.config, max_shard_bytes=max_shard_bytes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_half_precision_on_disk_is_full_in_memory(tmp_path: Path, tiny: Tiny) -> None:
    save_component(tmp_path, tiny, tiny.config, dtype=torch.bfloat16)
    assert load_tensors(tmp_path)["proj.weight"].dtype is torch.bfloat16
    assert load_tensors(tmp_path)["counts"].dtype is torch.int64
    loaded = load_component(tmp_path, Tiny, TinyConfig)
    assert loaded.proj.weight.dtype is torch.float32
    assert torch.equal(loaded.proj.weight, tiny.proj.weight.bfloat16().float())
    assert load_component(tmp_path, Tiny, TinyConfig, dtype=torch.bfloat16).proj.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("max_shard_bytes", [2**31, 100])
def test_matrices_in_int8_are_floats_in_memory(tmp_path: Path, tiny: Tiny, max_shard_bytes: int) -> None:
    with torch.no_grad():
        tiny.proj.weight[2] = 0.0  # a row without a scale of its own
        tiny.proj.weight[3] *= 1000.0
    save_component(tmp_path / "int8", tiny, tiny.config, dtype=torch.int8, max_shard_bytes=max_shard_bytes)
    stored: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "int8").glob("*.safetensors"):
        stored |= load_file(path)
    assert stored["proj.weight"].dtype == torch.int8
    assert stored["proj.bias"].dtype == torch.float16
    described = stored_tensors(tmp_path / "int8")
    assert "proj.weight.int8_scale" not in described
    assert described["proj.weight"].dtype == "F32"
    rows = described["proj.weight"].read(torch.float16, 1, 3)
    assert torch.equal(rows, load_tensors(tmp_path / "int8")["proj.weight"][1:3].half())
    read = load_component(tmp_path / "int8", Tiny, TinyConfig)
    assert read.proj.weight.dtype == torch.float32
    assert torch.equal(read.counts, tiny.counts)
    assert read.head.weight is read.embed.weight
    for own, found in ((tiny.proj.weight, read.proj.weight), (tiny.embed.weight, read.embed.weight)):
        step = own.detach().abs().amax(1, keepdim=True) / 127
        assert bool(((own - found).abs() <= 0.5001 * step).all())
    save_component(tmp_path / "again", read, read.config, dtype=torch.int8)
    assert torch.equal(load_component(tmp_path / "again", Tiny, TinyConfig).proj.weight, read.proj.weight)
    tensors = {key: value for key, value in stored.items() if key != "proj.weight"}
    save_tensors(tmp_path / "int8", tensors)
    with pytest.raises(ValueError, match=r"has no weight 'proj\.weight'"):
        load_component(tmp_path / "int8", Tiny, TinyConfig)


def test_the_hash_is_of_the_contents(tmp_path: Path, folder: Path, tiny: Tiny) -> None:
    save_component(tmp_path / "copy", tiny, tiny.config, extra={"step": 3})
    assert file_hash(folder) == file_hash(tmp_path / "copy")
    assert len(file_hash(folder)) == 64
    (tmp_path / "copy" / "notes.txt").write_text("not part of it")
    assert file_hash(folder) == file_hash(tmp_path / "copy")
    with torch.no_grad():
        tiny.proj.bias[0] += 1
    save_component(tmp_path / "copy", tiny, tiny.config, extra={"step": 3})
    assert file_hash(folder) != file_hash(tmp_path / "copy")


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_component(folder, Tiny, TinyConfig)
    assert "\n" not in str(caught.value)


def test_missing_parts_are_named(tmp_path: Path, folder: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere does not exist")
    refused(folder / "config.json", "is a file, not a folder")
    (folder / "model.safetensors").rename(tmp_path / "aside")
    refused(folder, "model.safetensors does not exist")
    (folder / "config.json").unlink()
    refused(folder, "config.json does not exist")
    with pytest.raises(ValueError, match="holds no .json and no .safetensors"):
        file_hash(folder)


def test_the_config_is_strict(folder: Path) -> None:
    edit(folder, depth=3)
    refused(folder, "unknown key 'depth' in .*config.json; the keys are width, num_codes, rate")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "is of version 9; this program reads version 1"),
        ({"width": "wide"}, "width in .*config.json must be int, got 'wide'"),
        ({"width": 8}, r"weight 'embed.weight' has shape \(5, 4\), the config asks for \(5, 8\)"),
        ({"kind": "Huge"}, "describes a Huge, not a Tiny"),
    ],
)
def test_another_config_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    edit(folder, **change)
    refused(folder, message)


def test_a_foreign_config_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "whisper"}')
    refused(folder, "has no key 'kind': it is not the config of one of our components")


def test_another_component_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="describes a Tiny, not a Other"):
        load_component(folder, Other, TinyConfig)


@pytest.mark.parametrize("keep", [0, 4, 100, -8])
def test_truncated_weights_are_refused(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "model.safetensors is truncated, damaged or no safetensors file")


def test_a_lost_shard_is_named(tmp_path: Path, tiny: Tiny) -> None:
    save_component(tmp_path, tiny, tiny.config, max_shard_bytes=1)
    (tmp_path / "model-00002-of-00004.safetensors").rename(tmp_path / "aside")
    refused(tmp_path, "model-00002-of-00004.safetensors does not exist")
    save_tensors(tmp_path / "empty", {"x": torch.zeros(1)})
    (tmp_path / "empty" / "model.safetensors").rename(tmp_path / "model-00002-of-00004.safetensors")
    refused(tmp_path, "model-00002-of-00004.safetensors lacks the weight")


def test_wrong_weights_are_named(folder: Path) -> None:
    good = load_tensors(folder)
    save_tensors(folder, {key: value for key, value in good.items() if not key.startswith("proj")})
    refused(folder, r"has no weight 'proj.weight' \(and 1 more\) that the Tiny needs")
    save_tensors(folder, good | {"extra.weight": torch.zeros(2)})
    refused(folder, "has a weight 'extra.weight' that the Tiny lacks")
    save_tensors(folder, good | {"counts": torch.zeros(5)})
    refused(folder, "weight 'counts' is of type torch.float32, expected torch.int64")


def test_weights_that_are_not_finite_are_refused_both_ways(folder: Path, tiny: Tiny) -> None:
    with torch.no_grad():
        tiny.proj.bias[1] = float("nan")
    with pytest.raises(ValueError, match="weight 'proj.bias' holds values that are not finite"):
        save_component(folder, tiny, tiny.config)
    raw = load_tensors(folder)
    raw["proj.bias"][1] = float("inf")
    save_file(raw, folder / "model.safetensors")
    refused(folder, "weight 'proj.bias' holds values that are not finite")


def test_a_config_may_not_use_the_format_s_own_keys(tmp_path: Path, tiny: Tiny) -> None:
    @dataclass(frozen=True)
    class Clash:
        kind: str = "x"

    with pytest.raises(ValueError, match="Clash has a field 'kind'"):
        save_component(tmp_path, tiny, Clash())


def test_the_shard_limit_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes must be positive, got 0"):
        save_tensors(tmp_path, {}, max_shard_bytes=0)
