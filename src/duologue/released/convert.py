"""Conversion of a released language model to the format of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from duologue.checkpoint import DTYPES, FLOAT_TYPES, Dtype, stored_in_file
from duologue.config import read_json, write_json
from duologue.released.language import NativeWeight, ReleasedWeights, read_released
from duologue.released.text import load_released_vocabulary, save_for_transformers
from duologue.released.weights import write_stream

PIECE_VALUES = 2**23  # values per read
PROGRESS_FILE = "conversion.json"  # marks an unfinished conversion


def convert(
    folder: str | Path,
    out: str | Path,
    dtype: Dtype | None = None,
    progress: bool = False,
    after_shard: Callable[[str], None] | None = None,
) -> None:
    """Writes a released language model as a folder for `from_pretrained`, vocabulary included.

    Every shard is renamed when complete, so an interrupted conversion resumes with the first missing one. Memory is
    bounded by a few pieces of `PIECE_VALUES` values.

    Args:
        dtype: of the new weights, that of the old ones by default.
        after_shard: called with the name of each written shard.

    Raises:
        ValueError: as `read_released`; `out` holds something else, or a conversion of other weights.
    """
    weights = read_released(folder)
    vocabulary = load_released_vocabulary(folder)
    if vocabulary.size != weights.config.vocab_size:
        raise ValueError(
            f"{folder}: the vocabulary has {vocabulary.size} ids, the model {weights.config.vocab_size} rows"
        )
    out = Path(out)
    _begin(weights, out, dtype)
    written_as = DTYPES[dtype] if dtype is not None else FLOAT_TYPES[next(iter(weights.stored.values())).dtype]
    shards: dict[str, list[NativeWeight]] = {}
    for weight in weights.native:
        shards.setdefault(weights.stored[weight.source].path.name, []).append(weight)
    total = sum(stored.numel for stored in weights.stored.values())
    with tqdm(total=total, unit_scale=True, disable=not progress) as bar:
        for name, native in sorted(shards.items()):
            shapes = {weight.key: weights.shape(weight) for weight in native}
            if not (out / name).exists():  # a shard that exists is whole
                write_stream(out / name, shapes, written_as, _pieces(weights, native, written_as))
                if after_shard is not None:
                    after_shard(name)
            bar.update(sum(math.prod(shape) for shape in shapes.values()))
    _finish(weights, out, sorted(shards), written_as)
    save_for_transformers(vocabulary, out)
    (out / PROGRESS_FILE).unlink()


def _begin(weights: ReleasedWeights, out: Path, dtype: Dtype | None) -> None:
    """Creates the folder, or resumes a conversion of the same weights."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; the choices are {', '.join(DTYPES)}")
    types = sorted({stored.dtype for stored in weights.stored.values()})
    if dtype is None and len(types) > 1:
        raise ValueError(f"{weights.folder} holds weights of the types {', '.join(types)}; give a dtype for all")
    if out.resolve() == weights.folder.resolve():
        raise ValueError(f"{out} is the folder to be converted; give another one for the result")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, not a folder")
    files = sorted({stored.path for stored in weights.stored.values()})
    source = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    job = {"version": 1, "dtype": dtype, "source": source}
    if (out / PROGRESS_FILE).exists():
        if read_json(out / PROGRESS_FILE) != job:
            raise ValueError(
                f"{out} holds a conversion of other weights or to another dtype; remove it or give another folder"
            )
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give a new folder")
    write_json(out / PROGRESS_FILE, job)


def _finish(weights: ReleasedWeights, out: Path, shards: list[str], dtype: torch.dtype) -> None:
    written = {key: stored for name in shards for key, stored in stored_in_file(out / name).items()}
    index = out / "model.safetensors.index.json"
    if shards != ["model.safetensors"]:
        weight_map = {key: stored.path.name for key, stored in written.items()}
        total = sum(stored.numel for stored in written.values()) * dtype.itemsize
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = weights.config.to_diff_dict()
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(out / "config.json", config)
    generation = weights.folder / "generation_config.json"
    if generation.exists():
        write_json(out / generation.name, read_json(generation))


def _pieces(weights: ReleasedWeights, native: Sequence[NativeWeight], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yields the values of these weights, some rows at a time."""
    for weight in native:
        stored = weights.stored[weight.source]
        num_rows, *inner = weights.shape(weight)
        first, step = weight.start or 0, max(1, PIECE_VALUES // math.prod(inner))
        for start in range(first, first + num_rows, step):
            yield stored.read(dtype, start, min(start + step, first + num_rows))
