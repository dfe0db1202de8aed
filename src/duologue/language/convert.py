"""A released language model written as a folder that plain transformers loads by `from_pretrained`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
from tqdm import tqdm

from duologue.config import read_json, write_json
from duologue.headers import FLOAT_TYPES, Stored, header_bytes, read_header, read_tensor
from duologue.language.backbone import DTYPES, Dtype
from duologue.language.released import Part, ReleasedWeights, read_released
from duologue.language.released_text import load_released_vocabulary, save_for_transformers

COPY_BYTES = 2**24
PROGRESS_FILE = "conversion.json"  # in a folder whose conversion is not finished


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
    written_as = DTYPES[dtype] if dtype is not None else FLOAT_TYPES[next(iter(weights.stored.values())).dtype]
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
                _write_shard(out / name, places, written_as, bar.update)
                if after_shard is not None:
                    after_shard(name)
            else:
                bar.update(sum(place.num_bytes for place in places.values()))
    _finish(weights, out, sorted(shards), written_as)
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


def _finish(weights: ReleasedWeights, out: Path, shards: list[str], dtype: torch.dtype) -> None:
    written = {key: stored for name in shards for key, stored in read_header(out / name).items()}
    index = out / "model.safetensors.index.json"
    if shards != ["model.safetensors"]:
        weight_map = {key: stored.path.name for key, stored in written.items()}
        total = sum(stored.num_bytes for stored in written.values())
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = weights.config.to_diff_dict()
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(out / "config.json", config)
    generation = weights.folder / "generation_config.json"
    if generation.exists():
        write_json(out / generation.name, read_json(generation))


def _write_shard(path: Path, places: Mapping[str, Stored], dtype: torch.dtype, done: Callable[[int], object]) -> None:
    """One safetensors file, its tensors copied range by range."""
    scratch = path.with_name(f".{path.name}.new")
    with scratch.open("wb") as file:
        file.write(header_bytes({key: place.shape for key, place in places.items()}, dtype))
        for place in places.values():
            _copy(place, file, dtype, done)
    scratch.replace(path)


def _copy(place: Stored, file: BinaryIO, dtype: torch.dtype, done: Callable[[int], object]) -> None:
    width = FLOAT_TYPES[place.dtype].itemsize
    piece = COPY_BYTES // width * width
    for start in range(0, place.num_bytes, piece):
        size = min(piece, place.num_bytes - start)
        chunk = replace(place, shape=(size // width,), offset=place.offset + start, num_bytes=size)
        file.write(read_tensor(chunk, dtype).view(torch.uint8).numpy().tobytes())
        done(size)
