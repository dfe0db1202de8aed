"""Component folders: `config.json` and `model.safetensors`.

    config.json          {"kind": class of the module, "version": 1, ...the fields of its config..., "extra": {...}}
    model.safetensors    its state dict; larger ones are sharded with an index, in the layout of transformers

Matrices may be stored in int8. Then `<key>` holds whole numbers and `<key>.int8_scale` one float32 factor per row;
readers return them in float32.

Loading executes no code, and every fault raises an error that names file and key. Files are replaced one by one,
weights first, so an interrupted save leaves readable files.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from duologue.config import parse_config, read_json, to_mapping, write_json

FORMAT_VERSION = 1
MAX_SHARD_BYTES = 2**31
_OWN_KEYS = ("kind", "version", "extra")
_SCALE = ".int8_scale"
# Floating-point types by their names in safetensors, and those in which a language model can run.
FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Module = TypeVar("Module", bound=nn.Module)
Config = TypeVar("Config")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, known from the header; values are read on demand.

    Attributes:
        dtype: safetensors name such as F32 or BF16; that of the values, F32 for a matrix in int8.
        scale: factors of the rows of a matrix in int8; None for others.
    """

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    scale: StoredTensor | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self, dtype: torch.dtype | None = None, start: int | None = None, stop: int | None = None) -> Tensor:
        """Reads rows [start, stop) in the given dtype; by default all rows in the stored dtype.

        Raises:
            ValueError: the file is damaged, or a value is not finite in that dtype.
        """
        with _open(self.path) as file:
            # A tensor without dimensions has no rows to slice.
            stored: Tensor = file.get_slice(self.key)[start:stop] if self.shape else file.get_tensor(self.key)
            if self.scale is not None:
                factors = self.scale.read(None, start, stop)
                stored = (stored.flatten(1) * factors[:, None]).view(stored.shape)
            tensor = stored.to(stored.dtype if dtype is None else dtype, copy=True)
        _check_finite(str(self.path), self.key, tensor)
        return tensor


def save_component(
    folder: str | Path,
    module: nn.Module,
    config: object,
    *,
    extra: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a module and its config.

    Args:
        folder: created if missing; earlier weights in it are replaced.
        module: its state dict is stored; tied parameters are stored once.
        config: a frozen dataclass, see `duologue.config`.
        extra: JSON values stored with the weights, such as a tokenizer hash or the training step.
        dtype: dtype of stored floating-point tensors; unchanged by default. `torch.int8` is for matrices; all other
            tensors are then stored in float16.
        max_shard_bytes: maximum size of a file with more than one tensor.

    Raises:
        ValueError: a weight is not finite, or the config has a reserved key.
    """
    folder = Path(folder)
    fields = to_mapping(config)
    for key in _OWN_KEYS:
        if key in fields:
            raise ValueError(f"{type(config).__name__} has a field {key!r}, which the checkpoint format needs itself")
    tensors = module_tensors(module)
    if dtype is torch.int8:
        tensors = in_int8(tensors)
    elif dtype is not None:
        tensors = {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}
    save_tensors(folder, tensors, max_shard_bytes=max_shard_bytes)
    head = {"kind": type(module).__name__, "version": FORMAT_VERSION}
    write_json(folder / "config.json", {**head, **fields, "extra": dict(extra or {})})


def load_component(
    folder: str | Path, cls: Callable[[Config], Module], config_cls: type[Config], *, dtype: torch.dtype | None = None
) -> Module:
    """Builds `cls(config)` and loads its weights, on the CPU in evaluation mode.

    Args:
        folder: written by `save_component`.
        cls: the module's class.
        config_cls: the frozen dataclass of its config.
        dtype: dtype of floating-point tensors; that of `cls` (float32) by default.

    Raises:
        ValueError: names file and key of a missing, truncated or unknown part, or of a weight that is missing,
            unexpected, of another shape or not finite.
    """
    folder = Path(folder)
    path = folder / "config.json"
    kind = getattr(cls, "__name__", str(cls))
    data = _component_json(folder)
    if data["kind"] != kind:
        raise ValueError(f"{path} describes a {data['kind']}, not a {kind}")
    config = parse_config(config_cls, {k: v for k, v in data.items() if k not in _OWN_KEYS}, str(path))
    module = cls(config)
    if dtype is not None:
        module = module.to(dtype)
    load_weights(module, load_tensors(folder), str(folder))
    return module.eval()


def read_kind(folder: str | Path) -> str:
    """Returns the class name of the module in a component folder."""
    return str(_component_json(Path(folder))["kind"])


def read_extra(folder: str | Path) -> dict[str, Any]:
    """Returns the `extra` values of a component folder."""
    return dict(_component_json(Path(folder)).get("extra", {}))


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict of a module with tied weights once, as `load_weights` expects."""
    aliases = _aliases(module)
    return {key: tensor for key, tensor in module.state_dict().items() if key not in aliases}


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Loads exactly these tensors into a module.

    Raises:
        ValueError: a key is missing or unexpected, or a tensor has another shape or kind of dtype, or is not finite.
    """
    own = module.state_dict()
    aliases = _aliases(module)
    complete = dict(tensors) | {key: tensors[first] for key, first in aliases.items() if first in tensors}
    missing = [key for key in own if key not in complete]
    unexpected = [key for key in complete if key not in own]
    if missing:
        raise ValueError(f"{where} has no weight {missing[0]!r}{_and_more(missing)} that {_named(module)} needs")
    if unexpected:
        raise ValueError(f"{where} has a weight {unexpected[0]!r}{_and_more(unexpected)} that {_named(module)} lacks")
    for key, tensor in complete.items():
        if tensor.shape != own[key].shape:
            raise ValueError(
                f"{where}: weight {key!r} has shape {tuple(tensor.shape)}, the config asks for {tuple(own[key].shape)}"
            )
        if tensor.is_floating_point() != own[key].is_floating_point():
            raise ValueError(f"{where}: weight {key!r} is of type {tensor.dtype}, expected {own[key].dtype}")
        _check_finite(where, key, tensor)
    module.load_state_dict(complete)


def save_tensors(
    folder: str | Path, tensors: Mapping[str, Tensor], name: str = "model", *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes named tensors as `<name>.safetensors`, or as shards with an index beyond `max_shard_bytes`.

    Raises:
        ValueError: a tensor is not finite, or the limit is not positive.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ready = {}
    for key, tensor in tensors.items():
        _check_finite(str(folder), key, tensor)
        ready[key] = tensor.detach().cpu().contiguous()
    shards = _shards(ready, max_shard_bytes)
    names = [
        f"{name}.safetensors" if len(shards) == 1 else f"{name}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i in range(len(shards))
    ]
    index = folder / f"{name}.safetensors.index.json"
    for file_name, shard in zip(names, shards, strict=True):
        scratch = folder / f".{file_name}.{os.getpid()}.new"
        save_file(shard, scratch, metadata={"format": "pt"})
        scratch.replace(folder / file_name)
    if len(shards) > 1:
        total = sum(_num_bytes(tensor) for tensor in ready.values())
        weight_map = {key: file_name for file_name, shard in zip(names, shards, strict=True) for key in shard}
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    else:
        index.unlink(missing_ok=True)
    for old in [folder / f"{name}.safetensors", *folder.glob(f"{name}-*-of-*.safetensors")]:
        if old.name not in names:
            old.unlink(missing_ok=True)


def load_tensors(folder: str | Path, name: str = "model") -> dict[str, Tensor]:
    """Reads tensors written by `save_tensors`; matrices in int8 are returned in float32.

    Raises:
        ValueError: a file is missing, truncated or damaged, or index and shards disagree.
    """
    return {key: stored.read() for key, stored in stored_tensors(folder, name).items()}


def stored_tensors(folder: str | Path, name: str = "model") -> dict[str, StoredTensor]:
    """Returns the tensors of `<name>.safetensors` or its shards without reading values.

    Raises:
        ValueError: as `load_tensors`.
    """
    folder = Path(folder)
    _check_folder(folder)
    index = folder / f"{name}.safetensors.index.json"
    if not index.exists():
        return stored_in_file(folder / f"{name}.safetensors")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} has no key 'weight_map' that puts every weight into a file")
    files: dict[str, dict[str, StoredTensor]] = {}
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name:
            raise ValueError(f"{index} names the file {file_name!r}, which is not in the same folder")
        if not (folder / file_name).is_file():
            first = min(key for key, file in weight_map.items() if file == file_name)
            raise ValueError(f"{folder / file_name} does not exist, but {index.name} puts the weight {first!r} into it")
        files[file_name] = _stored_as_they_are(folder / file_name)
    for key, file_name in weight_map.items():
        if key not in files[file_name]:
            raise ValueError(f"{folder / file_name} lacks the weight {key!r} that {index.name} puts there")
    found = [stored for tensors in files.values() for stored in tensors.values()]
    for stored in found:
        if weight_map.get(stored.key) != stored.path.name:
            raise ValueError(f"{stored.path} holds the weight {stored.key!r}, which {index.name} does not put there")
    return _with_scales({stored.key: stored for stored in found})


def stored_in_file(path: str | Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one safetensors file in byte order without reading values.

    Raises:
        ValueError: the file is missing, truncated or damaged.
    """
    return _with_scales(_stored_as_they_are(Path(path)))


def _stored_as_they_are(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, the scales of matrices in int8 among them."""
    found = {}
    with _open(path) as file:
        for key in file.offset_keys():
            part = file.get_slice(key)
            found[key] = StoredTensor(path, key, str(part.get_dtype()), tuple(part.get_shape()))
    return found


def file_hash(folder: str | Path) -> str:
    """Returns the SHA-256 (hex) over names and contents of all .json and .safetensors files below a folder.

    Corpora and dependent models record it as the identity of a component.

    Raises:
        ValueError: the folder is missing or holds no such file.
    """
    folder = Path(folder)
    _check_folder(folder)
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in (".json", ".safetensors") and not path.name.startswith(".") and path.is_file()
    )
    if not files:
        raise ValueError(f"{folder} holds no .json and no .safetensors file")
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return whole.hexdigest()


def _with_scales(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Joins matrices in int8 with their scales."""
    scaled = {key: stored[key + _SCALE] for key in stored if key + _SCALE in stored}
    scales = {scale.key for scale in scaled.values()}
    return {
        key: replace(one, dtype="F32", scale=scaled[key]) if key in scaled else one
        for key, one in stored.items()
        if key not in scales
    }


def in_int8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns matrices (N, ...) in int8 with a scale per row (N,), and other floating-point tensors in float16."""
    stored: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            stored[key] = tensor
        elif tensor.dim() < 2 or not tensor.numel():
            stored[key] = tensor.half()
        else:
            rows = tensor.detach().float().flatten(1)
            scale = (rows.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
            stored[key] = (rows / scale[:, None]).round().to(torch.int8).view(tensor.shape)
            stored[key + _SCALE] = scale
    return stored


def _component_json(folder: Path) -> dict[str, Any]:
    _check_folder(folder)
    path = folder / "config.json"
    data = read_json(path)
    for key in ("kind", "version"):
        if key not in data:
            raise ValueError(f"{path} has no key {key!r}: it is not the config of one of our components")
    if data["version"] != FORMAT_VERSION:
        raise ValueError(f"{path} is of version {data['version']!r}; this program reads version {FORMAT_VERSION}")
    return data


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise ValueError(f"{folder} does not exist")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder")


def _aliases(module: nn.Module) -> dict[str, str]:
    """Maps each key that shares memory with an earlier key (tied weights) to that key."""
    first: dict[tuple[object, ...], str] = {}
    aliases = {}
    for key, tensor in module.state_dict().items():
        if tensor.numel() == 0:
            continue
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if first.setdefault(place, key) != key:
            aliases[key] = first[place]
    return aliases


def _shards(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + _num_bytes(tensor) > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += _num_bytes(tensor)
    return shards


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated, damaged or no safetensors file ({error})") from None


def _check_finite(where: str, key: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{where}: weight {key!r} holds values that are not finite")


def _and_more(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


def _named(module: nn.Module) -> str:
    return f"the {type(module).__name__}"
