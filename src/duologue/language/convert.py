"""A released language model written as a folder that plain transformers loads by `from_pretrained`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from duologue.config import read_json, write_json
from duologue.headers import FLOAT_TYPES, Stored, read_header, read_tensor
from duologue.language.backbone import DTYPES, Dtype
from duologue.language.released import Part, ReleasedWeights, read_released
from duologue.language.released_text import load_released_vocabulary, save_for_transformers

COPY_BYTES = 2**24
PROGRESS_FILE = "conversion.json"  # in a folder whose conversion is not finished
_NAMES = {torch_dtype: name for name, torch_dtype in FLOAT_TYPES.items()}


def convert(
    folder: str | Path,
    out: str | Path,
    dtype: Dtype | None = None,
    progress: bool = False,
    after_shard: Callable[[str], None] | None = None,
) -> None:
    """Writes a released folder as one that plain transformers loads by `from_pretrained`, vocabulary included.

    Shard by shard: every file is written aside and renamed when it is whole, so an interrupted conversion goes on with
    the first shard that is missing. Memory beside the program itself: a few pieces of `COPY_BYTES`.

    Args:
        dtype: of the new weights; that of the old ones by default.
        after_shard: called with the name of each shard that was written.
    Raises:
        ValueError: as `read_released`; `out` holds something else, or a conversion from other weights.
    """
    weights = read_released(folder)
    vocabulary = load_released_vocabulary(folder)
    if vocabulary.size != weights.config.vocab_size:
        raise ValueError(
            f"{folder}: the vocabulary has {vocabulary.size} ids, the model {weights.config.vocab_size} rows"
        )
    out = Path(out)
    _begin(weights, out, dtype)
    wanted = None if dtype is None else _NAMES[DTYPES[dtype]]
    shards: dict[str, list[Part]] = {}
    for part in weights.parts:
        shards.setdefault(weights.stored[part.source].path.name, []).append(part)
    for parts in shards.values():
        parts.sort(key=lambda part: weights.place(part).offset)
    total = sum(stored.num_bytes for stored in weights.stored.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for name, parts in sorted(shards.items()):
            places = {part.key: weights.place(part) for part in parts}
            if not (out / name).exists():  # a shard that exists is whole
                _write_shard(out / name, places, wanted, bar.update)
                if after_shard is not None:
                    after_shard(name)
            else:
                bar.update(sum(place.num_bytes for place in places.values()))
    _finish(weights, out, sorted(shards))
    save_for_transformers(vocabulary, out)
    (out / PROGRESS_FILE).unlink()


def _begin(weights: ReleasedWeights, out: Path, dtype: Dtype | None) -> None:
    """Makes the folder, or goes on in one that the same weights were being written to."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; the choices are {', '.join(DTYPES)}")
    types = sorted({stored.dtype for stored in weights.stored.values()})
    if dtype is None and len(types) > 1:
        raise ValueError(
            f"{weights.folder} holds weights of the types {', '.join(types)}; say which dtype all shall have"
        )
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


def _finish(weights: ReleasedWeights, out: Path, shards: list[str]) -> None:
    written = {key: stored for name in shards for key, stored in read_header(out / name).items()}
    index = out / "model.safetensors.index.json"
    if shards != ["model.safetensors"]:
        weight_map = {key: stored.path.name for key, stored in written.items()}
        total = sum(stored.num_bytes for stored in written.values())
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = weights.config.to_diff_dict()
    (dtype,) = {stored.dtype for stored in written.values()}
    config["dtype"] = str(FLOAT_TYPES[dtype]).removeprefix("torch.")
    write_json(out / "config.json", config)
    generation = weights.folder / "generation_config.json"
    if generation.exists():
        write_json(out / generation.name, read_json(generation))


def _write_shard(path: Path, places: Mapping[str, Stored], dtype: str | None, done: Callable[[int], object]) -> None:
    """One safetensors file, its tensors copied range by range."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, place in places.items():
        size = place.numel * FLOAT_TYPES[dtype or place.dtype].itemsize
        header[key] = {"dtype": dtype or place.dtype, "shape": list(place.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    scratch = path.with_name(f".{path.name}.new")
    with scratch.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, place in places.items():
            _copy(place, key, file, dtype or place.dtype, done)
    scratch.replace(path)


def _copy(place: Stored, key: str, file: BinaryIO, dtype: str, done: Callable[[int], object]) -> None:
    piece = COPY_BYTES // FLOAT_TYPES[place.dtype].itemsize * FLOAT_TYPES[place.dtype].itemsize
    for start in range(0, place.num_bytes, piece):
        size = min(piece, place.num_bytes - start)
        numel = size // FLOAT_TYPES[place.dtype].itemsize
        chunk = Stored(place.path, place.key, place.dtype, (numel,), place.offset + start, size)
        tensor = read_tensor(chunk, FLOAT_TYPES[dtype])
        file.write(tensor.view(torch.uint8).numpy().tobytes())
        done(size)
