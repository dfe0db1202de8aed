"""The released decoder's folder: config.yaml, flow.pt and hift.pt read as plain data.

The published config.yaml constructs objects (`!new:`), calls functions (`!apply:`), and holds names (`!name:`) and
references (`!ref`). Here tags only name the described class; nothing is imported or called. `flow` and `hift` are
parsed strictly; other top-level keys serve training and are ignored.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from duologue.checkpoint import load_tensors
from duologue.config import PlainLoader, parse_config, to_mapping
from duologue.released.decoder.flow import ReleasedFlowConfig
from duologue.released.decoder.hift import HiFTConfig

CONFIG_FILE = "config.yaml"
_TAGS = ("!new:", "!apply:", "!name:")
_REF = re.compile(r"<([A-Za-z_][\w.]*)>")

# What each tagged mapping of the decoder must be, by its path; the module path before the class is free.
_CLASSES = {
    "flow": "MaskedDiffWithXvec",
    "flow.encoder": "BlockConformerEncoder",
    "flow.length_regulator": "InterpolateRegulator",
    "flow.decoder": "ConditionalCFM",
    "flow.decoder.cfm_params": "DictConfig",
    "flow.decoder.estimator": "ConditionalDecoder",
    "hift": "HiFTGenerator",
    "hift.f0_predictor": "ConvRNNF0Predictor",
}
_MODULES = {
    "flow": "cosyvoice.flow.flow",
    "flow.encoder": "cosyvoice.transformer.encoder",
    "flow.length_regulator": "cosyvoice.flow.length_regulator",
    "flow.decoder": "cosyvoice.flow.flow_matching",
    "flow.decoder.cfm_params": "omegaconf",
    "flow.decoder.estimator": "cosyvoice.flow.decoder",
    "hift": "cosyvoice.hifigan.generator",
    "hift.f0_predictor": "cosyvoice.hifigan.f0_predictor",
}


class Tagged(dict[str, Any]):
    """A mapping with its tag, such as `!new:package.Class`."""

    tag: str


class TaggedList(list[Any]):
    """A list with its tag, such as `!apply:random.seed`."""

    tag: str


class Reference(str):
    """The text after `!ref`."""


class _Loader(PlainLoader):
    """Plain YAML whose four object tags are kept as data."""


def _construct_tagged(prefix: str) -> Any:
    def construct(loader: _Loader, suffix: str, node: yaml.Node) -> Any:
        value: Tagged | TaggedList
        if isinstance(node, yaml.MappingNode):
            value = Tagged(loader.construct_mapping(node, deep=True))
        elif isinstance(node, yaml.SequenceNode):
            value = TaggedList(loader.construct_sequence(node, deep=True))
        else:  # `!name:package.function` with nothing behind it
            value = Tagged()
        value.tag = prefix + suffix
        return value

    return construct


def _construct_reference(loader: _Loader, node: yaml.Node) -> Reference:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.constructor.ConstructorError(None, None, "!ref must precede a <key>", node.start_mark)
    return Reference(loader.construct_scalar(node))


for _prefix in _TAGS:
    _Loader.add_multi_constructor(_prefix, _construct_tagged(_prefix))
_Loader.add_constructor("!ref", _construct_reference)


def read_decoder_config(folder: str | Path) -> tuple[ReleasedFlowConfig, HiFTConfig]:
    """Reads the sizes in a folder's config.yaml.

    Raises:
        ValueError: names file and key: the file is missing or malformed, or has an unknown tag, class, reference, key
            or value.
    """
    path = Path(folder) / CONFIG_FILE
    data = _read(path)
    for key in ("flow", "hift"):
        if key not in data:
            raise ValueError(f"{path} has no key {key!r}, which describes a part of the decoder")
    plain = {key: _plain(data[key], key, data, str(path)) for key in ("flow", "hift")}
    flow = plain["flow"]
    matching = _take(flow, "decoder", "flow", path)
    flow["solver"] = _take(
        _take(matching, "cfm_params", "flow.decoder", path), "content", "flow.decoder.cfm_params", path
    )
    flow["estimator"] = _take(matching, "estimator", "flow.decoder", path)
    config = parse_config(ReleasedFlowConfig, flow, f"the part 'flow' of {path}")
    mels = config.output_size
    expected = {"in_channels": 3 * mels, "n_spks": 1, "spk_emb_dim": mels}
    for key, value in matching.items():
        if key not in expected:
            choices = ", ".join([*expected, "cfm_params", "estimator"])
            raise ValueError(f"unknown key 'flow.decoder.{key}' in {path}; the keys are {choices}")
        if value != expected[key]:
            raise ValueError(f"flow.decoder.{key} in {path} is {value!r}; the other sizes require {expected[key]}")
    vocoder = parse_config(HiFTConfig, plain["hift"], f"the part 'hift' of {path}")
    for name, size in (
        ("in_channels", vocoder.in_channels),
        ("f0_predictor.in_channels", vocoder.f0_predictor.in_channels),
    ):
        if size != mels:
            raise ValueError(f"hift.{name} in {path} is {size}, but flow.output_size is {mels}")
    return config, vocoder


def read_weights(folder: str | Path, name: str) -> tuple[dict[str, Tensor], str]:
    """Reads `<name>.safetensors` (possibly sharded) or `<name>.pt`; returns the tensors and the file's path.

    A .pt file is read with `weights_only=True`.

    Raises:
        ValueError: neither file exists, or it is truncated, damaged or holds something else.
    """
    folder = Path(folder)
    for file_name in (f"{name}.safetensors", f"{name}.safetensors.index.json"):
        if (folder / file_name).exists():
            return load_tensors(folder, name), str(folder / file_name)
    path = folder / f"{name}.pt"
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if not path.is_file():
        raise ValueError(f"{path} does not exist, and {name}.safetensors neither")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is damaged, or holds objects other than tensors, which are not loaded") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is truncated, damaged or no PyTorch file ({reason})") from None
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path} must hold named tensors, not {type(state).__name__}")
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path} must hold named tensors, but {key!r} is {type(tensor).__name__}")
    return dict(state), str(path)


def write_decoder_config(folder: str | Path, flow: ReleasedFlowConfig, hift: HiFTConfig, note: str = "") -> None:
    """Writes a config.yaml with the published object tags; a note becomes a leading comment."""
    plain = {"flow": to_mapping(flow), "hift": to_mapping(hift)}
    outer = plain["flow"]
    mels = flow.output_size
    outer["decoder"] = {
        "in_channels": 3 * mels,
        "n_spks": 1,
        "spk_emb_dim": mels,
        "cfm_params": {"content": outer.pop("solver")},
        "estimator": outer.pop("estimator"),
    }
    lines = [f"# {line}" for line in note.splitlines()]
    lines += [f"sample_rate: {hift.sampling_rate}", *_lines(plain, "", 0)]
    (Path(folder) / CONFIG_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _lines(mapping: Mapping[str, Any], where: str, depth: int) -> Iterator[str]:
    for key, value in mapping.items():
        path = f"{where}.{key}" if where else key
        indent = "    " * depth
        if isinstance(value, Mapping):
            tag = f" !new:{_MODULES[path]}.{_CLASSES[path]}" if path in _CLASSES else ""
            yield f"{indent}{key}:{tag}"
            yield from _lines(value, path, depth + 1)
        elif value is not None:
            yield f"{indent}{key}: {yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"


def _read(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is not a folder")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{path} cannot be read as text") from None
    except yaml.constructor.ConstructorError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        problem = str(error.problem)
        if "could not determine a constructor" in problem:
            tag = problem.split("'")[1] if "'" in problem else "of an unknown kind"
            raise ValueError(f"{path} has a tag {tag}{line}; only !new:, !apply:, !name: and !ref are read") from None
        raise ValueError(f"{path} is not plain YAML: {problem}{line}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ValueError(f"{path} must hold keys with values, not {type(data).__name__}")
    return data


def _take(mapping: dict[str, Any], key: str, where: str, path: Path) -> dict[str, Any]:
    value = mapping.pop(key, None)
    if not isinstance(value, dict):
        raise ValueError(f"key '{where}.{key}' in {path} is missing or holds no keys with values")
    return value


def _plain(value: Any, where: str, data: Mapping[str, Any], file: str) -> Any:
    """Checks and removes the tags within a part of the decoder, and resolves references."""
    if isinstance(value, Reference):
        return _follow(value, where, data, file)
    if isinstance(value, Mapping):
        tag = getattr(value, "tag", None)
        expected = _CLASSES.get(where)
        if tag is None and expected is not None:
            raise ValueError(f"{where} in {file} has no tag; !new:...{expected} is expected there")
        if tag is not None and (not tag.startswith("!new:") or tag.rpartition(".")[2] != expected):
            wanted = f"only !new:...{expected} is known there" if expected else "no tag is expected there"
            raise ValueError(f"{where} in {file} is tagged {tag}; {wanted}")
        return {key: _plain(item, f"{where}.{key}", data, file) for key, item in value.items()}
    if isinstance(value, list):
        if isinstance(value, TaggedList):
            raise ValueError(f"{where} in {file} is tagged {value.tag}; no tag is expected there")
        return [_plain(item, f"{where}[{i}]", data, file) for i, item in enumerate(value)]
    return value


def _follow(reference: Reference, where: str, data: Mapping[str, Any], file: str) -> Any:
    match = _REF.fullmatch(reference.strip())
    if match is None:
        raise ValueError(f"{where} in {file} refers to {str(reference)!r}; only a plain <key> is read")
    target: Any = data
    for key in match[1].split("."):
        if not isinstance(target, Mapping) or key not in target:
            raise ValueError(f"{where} in {file} refers to <{match[1]}>, which does not exist")
        target = target[key]
    if not isinstance(target, int | float | str) or isinstance(target, Reference):
        raise ValueError(f"{where} in {file} refers to <{match[1]}>, which is not a plain value")
    return target
