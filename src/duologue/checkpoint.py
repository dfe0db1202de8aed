"""Weights on disk: a component is a folder with `config.json` and `model.safetensors`.

    config.json          {"kind": class of the module, "version": 1, ...the fields of its config..., "extra": {...}}
    model.safetensors    its state dict; past `max_shard_bytes` it becomes model-00001-of-00003.safetensors and so on
                         with model.safetensors.index.json, the layout of transformers

Nothing is executed when a folder is read, and whatever is wrong with one is said in one sentence with the file and the
key. Files are replaced one by one, weights first: a save that is cut short leaves readable files.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
# Floating-point types by their names in safetensors, and those in which a language model can run.
FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Module = TypeVar("Module", bound=nn.Module)
Config = TypeVar("Config")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, known from the file's header; its values are read on demand.

    Attributes:
        dtype: as the file names it: F32, BF16, ...
    """

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self, dtype: torch.dtype | None = None, start: int | None = None, stop: int | None = None) -> Tensor:
        """Rows [start, stop) in memory of their own, in the given type; by default all rows in the stored type.

        Raises:
            ValueError: the file is damaged, or a value is not finite in that type.
        """
        with _open(self.path) as file:
            # A tensor without dimensions has no rows to slice.
            stored = file.get_slice(self.key)[start:stop] if self.shape else file.get_tensor(self.key)
            tensor: Tensor = stored.to(stored.dtype if dtype is None else dtype, copy=True)
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
    """Write a module and the config it was made from.

    Args:
        folder: created where it is missing; weights of an earlier save in it are replaced.
        module: its state dict is stored; parameters that share memory are stored once.
        config: a frozen dataclass, see `duologue.config`.
        extra: JSON values that travel with the weights, like the hash of the tokenizer they belong to or the step.
        dtype: floating point tensors are stored in this type; as they are by default.
        max_shard_bytes: the weights are cut into files of at most this size (one tensor at least in each).

    Raises:
        ValueError: a weight is not finite (its key is named), or the config has a key that the format needs itself.
    """
    folder = Path(folder)
    fields = to_mapping(config)
    for key in _OWN_KEYS:
        if key in fields:
            raise ValueError(f"{type(config).__name__} has a field {key!r}, which the checkpoint format needs itself")
    tensors = module_tensors(module)
    if dtype is not None:
        tensors = {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}
    save_tensors(folder, tensors, max_shard_bytes=max_shard_bytes)
    head = {"kind": type(module).__name__, "version": FORMAT_VERSION}
    write_json(folder / "config.json", {**head, **fields, "extra": dict(extra or {})})


def load_component(
    folder: str | Path, cls: Callable[[Config], Module], config_cls: type[Config], *, dtype: torch.dtype | None = None
) -> Module:
    """Make `cls(config)` from a component's folder and fill in its weights, on the CPU and in evaluation mode.

    Args:
        folder: as `save_component` wrote it.
        cls: the module's class, called with the config.
        config_cls: the frozen dataclass of its config.
        dtype: type of the module's floating point tensors; the type `cls` makes them in (float32) by default.

    Raises:
        ValueError: one sentence naming file and key: a part is missing or truncated, the component is another one or of
            a later version, a config key is unknown, a weight is missing, unexpected, of another shape or not finite.
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
    """The class of the module in a component's folder."""
    return str(_component_json(Path(folder))["kind"])


def read_extra(folder: str | Path) -> dict[str, Any]:
    """What `save_component` was given as `extra`."""
    return dict(_component_json(Path(folder)).get("extra", {}))


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module with tensors that share memory (tied weights) once, as `load_weights` takes it."""
    aliases = _aliases(module)
    return {key: tensor for key, tensor in module.state_dict().items() if key not in aliases}


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Fill a module with exactly these tensors.

    Raises:
        ValueError: a key is missing or unexpected, or a tensor has another shape or type of number, or is not finite.
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
    """Write named tensors as `<name>.safetensors`, or as numbered shards with an index past `max_shard_bytes`.

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
    """Read what `save_tensors` wrote, whole or sharded.

    Raises:
        ValueError: a file is missing, truncated or damaged, or the index and the shards disagree.
    """
    stored = stored_tensors(folder, name)
    tensors: dict[str, Tensor] = {}
    for path in sorted({one.path for one in stored.values()}):
        with _open(path) as file:
            tensors |= {key: file.get_tensor(key) for key, one in stored.items() if one.path == path}
    return tensors


def stored_tensors(folder: str | Path, name: str = "model") -> dict[str, StoredTensor]:
    """The tensors of `<name>.safetensors`, or of the shards in `<name>.safetensors.index.json`; no value is read.

    Raises:
        ValueError: a file is missing, truncated or damaged, or the index and the shards disagree.
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
            raise ValueError(f"{index} names the file {file_name!r}, which is not one of its own folder")
        if not (folder / file_name).is_file():
            first = min(key for key, file in weight_map.items() if file == file_name)
            raise ValueError(f"{folder / file_name} does not exist, but {index.name} puts the weight {first!r} into it")
        files[file_name] = stored_in_file(folder / file_name)
    for key, file_name in weight_map.items():
        if key not in files[file_name]:
            raise ValueError(f"{folder / file_name} lacks the weight {key!r} that {index.name} puts there")
    found = [stored for tensors in files.values() for stored in tensors.values()]
    for stored in found:
        if weight_map.get(stored.key) != stored.path.name:
            raise ValueError(f"{stored.path} holds the weight {stored.key!r}, which {index.name} does not put there")
    return {stored.key: stored for stored in found}


def stored_in_file(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes; no value is read.

    Raises:
        ValueError: the file is missing, truncated or damaged.
    """
    path = Path(path)
    found = {}
    with _open(path) as file:
        for key in file.offset_keys():
            part = file.get_slice(key)
            found[key] = StoredTensor(path, key, str(part.get_dtype()), tuple(part.get_shape()))
    return found


def file_hash(folder: str | Path) -> str:
    """SHA-256 (hex) over names and contents of all .json and .safetensors files of a folder and those inside it.

    The identity of a component: corpora and sibling models record it, and refuse another.

    Raises:
        ValueError: no such folder, or nothing in it.
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
    """Keys of the state dict whose memory another key stands for already (tied weights), with that key."""
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
