"""Weight files with random values at any size, written tensor by tensor: for load tests and speed, they say nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from duologue.checkpoint import MAX_SHARD_BYTES
from duologue.config import write_json
from duologue.headers import header_bytes

LABEL = "random_weights"  # key in the config of a part that was written here
CHUNK = 2**24  # values drawn at once


def write_random(
    folder: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Writes `model.safetensors`, or shards with an index, such that a network of these weights stays in bounds.

    Scales of norms (vectors `...norm.weight`) are 1, other vectors 0, matrices normal with variance 1 / inputs, tables
    (`embed...`, `codebook...`) normal with variance 1 / 25.

    Args:
        shapes: key to shape, in the order of the files.
        progress: show a progress bar.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    size = 0
    for key, shape in shapes.items():
        num_bytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += num_bytes
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for number, keys in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            weight_map |= dict.fromkeys(keys, name)
            _write_shard(folder / name, {key: shapes[key] for key in keys}, dtype, generator, bar)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _write_shard(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, generator: torch.Generator, bar: Any
) -> None:
    with path.open("wb") as file:
        file.write(header_bytes(shapes, dtype))
        for key, shape in shapes.items():
            numel = math.prod(shape)
            for start in range(0, numel, CHUNK):
                count = min(CHUNK, numel - start)
                values = torch.full((count,), _constant(key, shape)) + _scale(key, shape) * torch.randn(
                    count, generator=generator
                )
                file.write(values.to(dtype).view(torch.uint8).numpy().tobytes())
                bar.update(count * dtype.itemsize)


def _constant(key: str, shape: tuple[int, ...]) -> float:
    return 1.0 if len(shape) == 1 and key.endswith("norm.weight") else 0.0


def _scale(key: str, shape: tuple[int, ...]) -> float:
    if len(shape) < 2:
        return 0.0
    if "embed" in key or "codebook" in key:
        return 0.2
    return 1.0 / math.sqrt(math.prod(shape[1:]))
