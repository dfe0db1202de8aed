"""What memory the parts of a model folder need, told by the headers of its weight files alone.

Works on folders of ours, converted ones and released ones: a part is a folder with weight files in it. Full-size files
are not read, so sparse ones will do.
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
WORKSPACE_GB = 1.0  # activations, the program itself, buffers of the allocator
DEFAULT_POSITIONS = 8192
# Bytes for each weight of the layers' matrices; scales of int4 groups included.
SCHEME_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.01, "int4": 0.54}
_NUMBERS = ("F", "BF", "I8", "U8")  # names of safetensors: floating point, and 8-bit integers of quantized weights


@dataclass(frozen=True)
class Part:
    """One folder with weights.

    Attributes:
        name: its path inside of the model folder.
        num_parameters: floating point values.
        is_language: whether a language model; then the three below are more than 0.
        num_in_layers: parameters that quantization reaches: the matrices of the layers.
        token_bytes: keys and values of one token of a conversation, in 16 bit.
        max_positions: tokens that one conversation may hold.
    """

    name: str
    num_parameters: int
    is_language: bool = False
    num_in_layers: int = 0
    token_bytes: int = 0
    max_positions: int = 0

    def needed_gb(self, scheme: str) -> float:
        """Memory in 10^9 bytes when loaded: a language model in the given scheme with one full conversation, others in
        float32. Raises ValueError for an unknown scheme."""
        if scheme not in SCHEME_BYTES:
            raise ValueError(f"unknown scheme {scheme!r}; the choices are {', '.join(SCHEME_BYTES)}")
        if not self.is_language:
            return self.num_parameters * SCHEME_BYTES["float32"] / GB
        plain = SCHEME_BYTES["float32" if scheme == "float32" else "bfloat16"]
        outside = (self.num_parameters - self.num_in_layers) * plain
        conversation = self.token_bytes * self.max_positions * plain / SCHEME_BYTES["bfloat16"]
        return (outside + self.num_in_layers * SCHEME_BYTES[scheme] + conversation) / GB


@dataclass(frozen=True)
class Advice:
    """How a model can be run here.

    Attributes:
        device, scheme: the best that fits; both empty where nothing does.
        needed_gb: in that scheme, or in the smallest.
        available_gb: of that device, or of the larger one.
    """

    device: str
    scheme: str
    needed_gb: float
    available_gb: float


@dataclass(frozen=True)
class Estimate:
    """All parts of one model folder."""

    folder: Path
    parts: tuple[Part, ...]

    def needed_gb(self, scheme: str) -> float:
        """Everything on one device, in 10^9 bytes."""
        return WORKSPACE_GB + sum(part.needed_gb(scheme) for part in self.parts)

    def advise(self, memory_gb: float, gpu_gb: float = 0.0) -> Advice:
        """The GPU before the processor, 16 bit before quantized.

        Args:
            memory_gb: free memory of the machine; gpu_gb: free memory of its GPU, 0 without one.
        """
        schemes = ["bfloat16"]
        if any(part.is_language for part in self.parts):
            schemes += ["int8", "int4"]
        for device, available in (("cuda", gpu_gb), ("cpu", memory_gb)):
            for scheme in schemes:
                if self.needed_gb(scheme) <= available:
                    return Advice(device, scheme, self.needed_gb(scheme), available)
        return Advice("", "", self.needed_gb(schemes[-1]), max(memory_gb, gpu_gb))


def estimate(folder: str | Path) -> Estimate:
    """Reads the headers of all weight files of a model folder, and the configs of its language models.

    Raises:
        ValueError: one sentence: no such folder, no weights in it, or a file is truncated or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    owners = sorted({path.parent for path in folder.rglob("*") if path.suffix in (".safetensors", ".pt")})
    parts = tuple(_part(owner, folder) for owner in owners)
    if not parts:
        raise ValueError(f"{folder} holds no .safetensors and no .pt file")
    return Estimate(folder, parts)


def _part(owner: Path, folder: Path) -> Part:
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
        return Part(name, num_parameters)
    positions = config.get("seq_length", config.get("max_position_embeddings"))
    token_bytes = 2 * sizes[0] * sizes[1] * sizes[2] * 2
    max_positions = min(positions, DEFAULT_POSITIONS) if type(positions) is int else DEFAULT_POSITIONS
    return Part(name, num_parameters, True, num_in_layers, token_bytes, max_positions)


def _shapes(owner: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Key and shape of every tensor of numbers in a folder's weight files; no value is read."""
    for path in sorted(owner.glob("*.safetensors")):
        for key, stored in stored_in_file(path).items():
            if stored.dtype.startswith(_NUMBERS):
                yield f"{path.name} {key}", stored.shape
    for path in sorted(owner.glob("*.pt")):
        try:
            tensors = torch.load(path, map_location="meta", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError):
            raise ValueError(f"{path} is damaged, or holds objects besides tensors, which are not loaded") from None
        for key, tensor in tensors.items() if isinstance(tensors, Mapping) else ():
            yield f"{path.name} {key}", tuple(tensor.shape)
