"""Checks of released weight files by their headers, and a streaming writer.

A header check takes milliseconds at any size, so faults are reported before long work.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duologue.checkpoint import FLOAT_TYPES, StoredTensor

LABEL = "random_weights"  # key in the config of a part whose weights are random
_TYPE_NAMES = {dtype: name for name, dtype in FLOAT_TYPES.items()}


def check_stored(found: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]], where: str | Path) -> None:
    """Compares the tensors of a folder with the shapes of its config.

    Raises:
        ValueError: names file and key: a weight is missing, unexpected, of another shape or quantized.
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
    """Raises ValueError for the config of a quantized checkpoint, naming file and key."""
    for key in ("quantization_config", "quantization_bit", "compression_config"):
        if config.get(key):
            raise ValueError(
                f"{path} has the key {key!r}: the checkpoint is quantized; give the one in plain floating point, it "
                "can be quantized while it is loaded"
            )


def write_stream(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, pieces: Iterable[Tensor]
) -> None:
    """Writes a safetensors file that need not fit into memory; it is renamed when complete.

    Args:
        shapes: shapes by key, in file order.
        pieces: the values of all tensors in that order, in pieces of any size.
    """
    scratch = path.with_name(f".{path.name}.new")
    with scratch.open("wb") as file:
        file.write(header_bytes(shapes, dtype))
        for piece in pieces:
            file.write(piece.to(dtype).contiguous().view(torch.uint8).numpy().tobytes())
    scratch.replace(path)


def header_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """Returns length and header of a safetensors file with these tensors in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
