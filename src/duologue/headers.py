"""What weight files hold, read from their headers alone: names, types and shapes, and where the bytes lie.

A safetensors file is 8 bytes of length, a JSON header and the tensors' bytes. Checking a folder by its headers takes
milliseconds at any size, so whatever is wrong with one is said before any long work; reading one tensor at a time keeps
memory at the size of that tensor.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import read_json

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
TYPE_NAMES = {dtype: name for name, dtype in FLOAT_TYPES.items()}
TYPES = {**FLOAT_TYPES, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
TYPES |= {"U8": torch.uint8, "BOOL": torch.bool}
TYPE_BYTES = {name: dtype.itemsize for name, dtype in TYPES.items()}
TYPE_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file.

    Attributes:
        dtype: as the header names it: F32, BF16, ...
        offset: of its first byte, from the beginning of the file.
    """

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(path: str | Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises:
        ValueError: one sentence naming the file, and the key where there is one: missing, no safetensors file,
            truncated, or a tensor whose bytes do not fit its shape.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"{path} is truncated or no safetensors file: its header does not fit its {size} bytes")
        text = file.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
        found = {key: _stored(path, key, entry, 8 + length) for key, entry in entries.items()}
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no safetensors file: its header cannot be read ({error!r})") from None
    end = 8 + length
    for stored in sorted(found.values(), key=lambda stored: stored.offset):
        if stored.offset != end:
            raise ValueError(f"{path} is damaged: the bytes of {stored.key!r} do not begin where those before them end")
        end += stored.num_bytes
        if end > size:
            raise ValueError(
                f"{path} is truncated: it has {size} bytes, and the weight {stored.key!r} ends at byte {end}"
            )
    if end != size:
        raise ValueError(f"{path} is damaged: it has {size - end} bytes more than its header tells")
    return dict(sorted(found.items(), key=lambda item: item[1].offset))


def read_headers(folder: str | Path, name: str = "model") -> dict[str, Stored]:
    """All tensors of `<name>.safetensors`, or of the shards that `<name>.safetensors.index.json` lists.

    Raises:
        ValueError: as `read_header`; or the index and the shards disagree.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist" if not folder.exists() else f"{folder} is a file, not a folder")
    index = folder / f"{name}.safetensors.index.json"
    if not index.exists():
        if not (folder / f"{name}.safetensors").exists():
            raise ValueError(f"{folder} holds neither {name}.safetensors nor {index.name}")
        return read_header(folder / f"{name}.safetensors")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} has no key 'weight_map' that puts every weight into a file")
    found: dict[str, Stored] = {}
    for file_name in sorted(set(weight_map.values())):
        first = min(key for key, file in weight_map.items() if file == file_name)
        if Path(file_name).name != file_name:
            raise ValueError(f"{index} names the file {file_name!r}, which is not one of its own folder")
        if not (folder / file_name).is_file():
            raise ValueError(f"{folder / file_name} does not exist, but {index.name} puts the weight {first!r} into it")
        for key, stored in read_header(folder / file_name).items():
            if weight_map.get(key) != file_name:
                raise ValueError(f"{stored.path} holds the weight {key!r}, which {index.name} does not put there")
            found[key] = stored
    for key, file_name in weight_map.items():
        if key not in found:
            raise ValueError(f"{folder / file_name} lacks the weight {key!r} that {index.name} puts there")
    return found


def check_stored(found: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], where: str | Path) -> None:
    """Compares what a folder holds with what its config asks for.

    Raises:
        ValueError: one sentence naming file and key: a weight is missing, unexpected, of another shape, or of a type
            that is no plain floating point (8-bit floats, packed integers).
    """
    for key, stored in found.items():
        if stored.dtype not in FLOAT_TYPES:
            raise ValueError(
                f"{stored.path}: weight {key!r} is of type {stored.dtype}: quantized weights are not read here, give "
                f"the checkpoint in {', '.join(FLOAT_TYPES)}"
            )
        if key not in shapes:
            raise ValueError(f"{stored.path} holds the unexpected weight {key!r}")
        if stored.shape != tuple(shapes[key]):
            raise ValueError(
                f"{stored.path}: weight {key!r} has shape {list(stored.shape)}, but the config asks for "
                f"{list(shapes[key])}"
            )
    for key in shapes:
        if key not in found:
            raise ValueError(f"{where} lacks the weight {key!r}")


def check_plain(config: Mapping[str, Any], path: str | Path) -> None:
    """Refuses the config of a quantized checkpoint. Raises ValueError naming the file and the key."""
    for key in ("quantization_config", "quantization_bit", "compression_config"):
        if config.get(key):
            raise ValueError(
                f"{path} has the key {key!r}: the checkpoint is quantized; give the one in plain floating point, it "
                "can be quantized while it is loaded"
            )


def read_tensor(stored: Stored, dtype: torch.dtype | None = None) -> Tensor:
    """Reads one tensor, in the given type.

    Raises:
        ValueError: the file ends early, or a value is not finite.
    """
    values = bytearray(stored.num_bytes)
    with stored.path.open("rb") as file:
        file.seek(stored.offset)
        if file.readinto(values) != stored.num_bytes:
            raise ValueError(f"{stored.path} is truncated: the weight {stored.key!r} ends early")
    if not values:
        return torch.empty(stored.shape, dtype=dtype or TYPES[stored.dtype])
    tensor = torch.frombuffer(values, dtype=TYPES[stored.dtype]).reshape(stored.shape)
    if dtype is not None:
        tensor = tensor.to(dtype)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"{stored.path}: weight {stored.key!r} holds values that are not finite"
            + (f" in {tensor.dtype}" if dtype is not None else "")
        )
    return tensor


def header_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """Length and header of a safetensors file whose tensors follow in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _stored(path: Path, key: str, entry: Mapping[str, Any], start: int) -> Stored:
    dtype, shape, (begin, end) = str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), entry["data_offsets"]
    if dtype not in TYPE_BYTES:
        raise ValueError(f"{path}: weight {key!r} is of the unknown type {dtype!r}")
    if math.prod(shape) * TYPE_BYTES[dtype] != end - begin:
        raise ValueError(f"{path} is damaged: weight {key!r} of shape {list(shape)} does not take {end - begin} bytes")
    return Stored(path, key, dtype, shape, start + int(begin), int(end - begin))
