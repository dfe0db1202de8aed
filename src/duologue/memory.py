"""Memory estimates of model folders, from the headers of their weight files.

Works on pocket, converted and released folders: a part is a folder with weight files. Weight values are not read.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from duologue.checkpoint import stored_in_file
from duologue.config import read_json

GB = 1e9
WORKSPACE_GB = 1.0  # activations, libraries, allocator buffers
DEFAULT_POSITIONS = 8192
# Bytes per weight of the layers' matrices, including int4 group scales.
SCHEME_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.01, "int4": 0.54}
_NUMBERS = ("F", "BF", "I8", "U8")  # safetensors dtype prefixes: floats, 8-bit integers of quantized weights


@dataclass(frozen=True)
class PartMemory:
    """The size of one folder with weights.

    Attributes:
        name: path inside the model folder.
        num_parameters: number of floating point values.
        is_language: whether it is a language model; only then are the fields below positive.
        num_in_layers: parameters in the layers' matrices, which quantization covers.
        token_bytes: KV cache of one token in 16 bits.
        max_positions: context length.
    """

    name: str
    num_parameters: int
    is_language: bool = False
    num_in_layers: int = 0
    token_bytes: int = 0
    max_positions: int = 0

    def needed_gb(self, scheme: str) -> float:
        """Returns the memory of the loaded part in 10^9 bytes.

        A language model is in `scheme`, with one full KV cache. Other parts are in float32. Raises ValueError for an
        unknown scheme.
        """
        if scheme not in SCHEME_BYTES:
            raise ValueError(f"unknown scheme {scheme!r}; the choices are {', '.join(SCHEME_BYTES)}")
        if not self.is_language:
            return self.num_parameters * SCHEME_BYTES["float32"] / GB
        plain = SCHEME_BYTES["float32" if scheme == "float32" else "bfloat16"]
        outside = (self.num_parameters - self.num_in_layers) * plain
        conversation = self.token_bytes * self.max_positions * plain / SCHEME_BYTES["bfloat16"]
        return (outside + self.num_in_layers * SCHEME_BYTES[scheme] + conversation) / GB


@dataclass(frozen=True)
class Placement:
    """The recommended device and number format.

    Attributes:
        device, scheme: the best that fits; both empty if none fits.
        needed_gb: memory in that scheme, or in the smallest one.
        available_gb: free memory of that device, or of the larger one.
    """

    device: str
    scheme: str
    needed_gb: float
    available_gb: float


@dataclass(frozen=True)
class MemoryEstimate:
    """The sizes of all parts of a model folder."""

    folder: Path
    parts: tuple[PartMemory, ...]

    def needed_gb(self, scheme: str) -> float:
        """Returns the memory of all parts on one device, in 10^9 bytes."""
        return WORKSPACE_GB + sum(part.needed_gb(scheme) for part in self.parts)

    def advise(self, memory_gb: float, gpu_gb: float = 0.0) -> Placement:
        """Returns the best placement: GPU before processor, 16 bits before quantized.

        Args:
            memory_gb: free memory of the machine.
            gpu_gb: free memory of its GPU, 0 without one.
        """
        schemes = ["bfloat16"]
        if any(part.is_language for part in self.parts):
            schemes += ["int8", "int4"]
        for device, available in (("cuda", gpu_gb), ("cpu", memory_gb)):
            for scheme in schemes:
                if self.needed_gb(scheme) <= available:
                    return Placement(device, scheme, self.needed_gb(scheme), available)
        return Placement("", "", self.needed_gb(schemes[-1]), max(memory_gb, gpu_gb))


def estimate(folder: str | Path) -> MemoryEstimate:
    """Reads the headers of all weight files, and the configs of the language models.

    Raises:
        ValueError: the folder does not exist or holds no weights, or a file is truncated or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    owners = sorted({path.parent for path in folder.rglob("*") if path.suffix in (".safetensors", ".pt")})
    parts = tuple(_part(owner, folder) for owner in owners)
    if not parts:
        raise ValueError(f"{folder} holds no .safetensors and no .pt file")
    return MemoryEstimate(folder, parts)


def _part(owner: Path, folder: Path) -> PartMemory:
    shapes = dict(_shapes(owner))
    num_parameters = sum(math.prod(shape) for shape in shapes.values())
    num_in_layers = sum(math.prod(shape) for key, shape in shapes.items() if ".layers." in key and len(shape) == 2)
    name = owner.relative_to(folder).as_posix() if owner != folder else folder.name
    config = read_json(owner / "config.json") if (owner / "config.json").exists() else {}
    layers = config.get("num_layers", config.get("num_hidden_layers"))
    groups = config.get("multi_query_group_num", config.get("num_key_value_heads"))
    head_dim = config.get("kv_channels", config.get("head_dim"))
    sizes = [size for size in (layers, groups, head_dim) if type(size) is int]
    if config.get("model_type") is None or len(sizes) < 3:
        return PartMemory(name, num_parameters)
    positions = config.get("seq_length", config.get("max_position_embeddings"))
    token_bytes = 2 * sizes[0] * sizes[1] * sizes[2] * 2
    max_positions = min(positions, DEFAULT_POSITIONS) if type(positions) is int else DEFAULT_POSITIONS
    return PartMemory(name, num_parameters, True, num_in_layers, token_bytes, max_positions)


def _shapes(owner: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields name and shape of every numeric tensor in a folder's weight files."""
    for path in sorted(owner.glob("*.safetensors")):
        for key, stored in stored_in_file(path).items():
            if stored.dtype.startswith(_NUMBERS):
                yield f"{path.name} {key}", stored.shape
    for path in sorted(owner.glob("*.pt")):
        try:
            tensors = torch.load(path, map_location="meta", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError):
            raise ValueError(f"{path} is damaged or holds objects other than tensors") from None
        for key, tensor in tensors.items() if isinstance(tensors, Mapping) else ():
            yield f"{path.name} {key}", tuple(tensor.shape)
