"""A CTranslate2 Whisper folder (what faster-whisper reads) -> a Whisper folder in transformers' format.

`model.bin` is little endian: uint32 version, string specification, uint32 revision, uint32 number of variables. Each
variable is a string name, uint8 rank, uint32 per dimension, uint8 type, uint32 number of bytes, the bytes. A string is
a uint16 length with its closing zero byte. Aliases follow and are not needed: the output layer is tied.
"""

from __future__ import annotations

import math
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duologue.checkpoint import save_tensors
from duologue.config import write_json
from duologue.tokenizer.speech_recognizer import WhisperText

_TYPES: dict[int, Any] = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def convert_whisper_ct2(folder: str | Path, out: str | Path) -> dict[str, int]:
    """Writes `config.json`, `model.safetensors` and `tokenizer.json` to `out`; weights keep their type.

    Returns:
        the sizes that were found, as in `config.json`.

    Raises:
        ValueError: one sentence: a file is missing or truncated, not Whisper, or its weights are quantized to integers.
    """
    folder, out = Path(folder), Path(out)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder / 'tokenizer.json'} is missing; a CTranslate2 Whisper folder holds it")
    stored = read_model_bin(folder / "model.bin")
    weights = {key: value.contiguous() for key, value in _renamed(stored, folder).items()}
    sizes = _sizes(stored, weights)
    out.mkdir(parents=True, exist_ok=True)
    save_tensors(out, weights)
    shutil.copyfile(folder / "tokenizer.json", out / "tokenizer.json")
    fixed = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}
    text = WhisperText(out / "tokenizer.json", sizes["vocab_size"])
    ids = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), text.end)
    start = {"decoder_start_token_id": text.prompt()[0]}
    write_json(out / "config.json", {**fixed, **sizes, **ids, **start, "activation_function": "gelu"})
    return sizes


def read_model_bin(path: Path) -> dict[str, Tensor]:
    """All variables of a CTranslate2 `model.bin` by name. Raises ValueError for another model or a cut file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; a CTranslate2 folder holds its weights there")
    reader = _Reader(path)
    version, name, _ = reader.number("I"), reader.string(), reader.number("I")
    if version < 2 or name != "WhisperSpec":
        raise ValueError(f"{path} is no CTranslate2 Whisper model: version {version}, specification {name!r}")
    return dict(reader.variable() for _ in range(reader.number("I")))


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path, self._bytes, self._at = path, path.read_bytes(), 0

    def take(self, count: int) -> bytes:
        part = self._bytes[self._at : self._at + count]
        if len(part) < count:
            raise ValueError(f"{self._path} is cut short: {count} bytes wanted at {self._at}, {len(part)} are there")
        self._at += count
        return part

    def number(self, code: str) -> int:
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0])

    def string(self) -> str:
        return self.take(self.number("H")).rstrip(b"\0").decode("utf-8", "replace")

    def variable(self) -> tuple[str, Tensor]:
        name = self.string()
        shape = [self.number("I") for _ in range(self.number("B"))]
        kind, size = self.number("B"), self.number("I")
        if kind not in _TYPES or size != math.prod(shape) * np.dtype(_TYPES[kind]).itemsize:
            raise ValueError(f"{self._path}: variable {name!r} of type {kind}, shape {shape} has {size} bytes")
        return name, torch.from_numpy(np.frombuffer(self.take(size), _TYPES[kind]).reshape(shape).copy())


def _renamed(stored: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """CTranslate2's variables under transformers' keys, stacked projections taken apart."""
    out: dict[str, Tensor] = {}
    for name, value in stored.items():
        side, _, rest = name.partition("/")
        if value.dim() == 0 or rest in ("alignment_heads", "alignment_layer"):
            continue  # settings
        if not value.is_floating_point():
            raise ValueError(
                f"{folder}: {name} is quantized to {value.dtype}; convert the float16 or float32 model instead"
            )
        parts, prefix = rest.split("/"), f"model.{side}."
        if parts[0].startswith("layer_") and parts[0] != "layer_norm":
            prefix += f"layers.{parts[0].removeprefix('layer_')}."
            for key, part in _layer(parts[1:], value):
                out[prefix + key] = part
        elif parts[0] in ("conv1", "conv2"):
            out[f"{prefix}{parts[0]}.{parts[1]}"] = value
        elif parts[0] == "layer_norm":
            out[f"{prefix}layer_norm.{_norm(parts[1])}"] = value
        elif parts[0] == "position_encodings":
            out[prefix + "embed_positions.weight"] = value
        elif parts[0] == "embeddings":
            out[prefix + "embed_tokens.weight"] = value
        else:
            raise ValueError(f"{folder}: {name} is no variable of Whisper that is known")
    return out


_FFN = {"linear_0": "fc1", "linear_1": "fc2"}
_PROJECTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "self_attention": {"linear_0": ("q_proj", "k_proj", "v_proj"), "linear_1": ("out_proj",)},
    "attention": {"linear_0": ("q_proj",), "linear_1": ("k_proj", "v_proj"), "linear_2": ("out_proj",)},
}


def _layer(parts: list[str], value: Tensor) -> list[tuple[str, Tensor]]:
    block, inner, kind = parts
    if block == "ffn":
        return [("final_layer_norm." + _norm(kind) if inner == "layer_norm" else f"{_FFN[inner]}.{kind}", value)]
    attention = {"self_attention": "self_attn", "attention": "encoder_attn"}[block]
    if inner == "layer_norm":
        return [(f"{attention}_layer_norm.{_norm(kind)}", value)]
    names = _PROJECTIONS[block][inner]
    return [
        (f"{attention}.{name}.{kind}", part)
        for name, part in zip(names, value.chunk(len(names)), strict=True)
        if (name, kind) != ("k_proj", "bias")  # zero: Whisper has none
    ]


def _norm(kind: str) -> str:
    return {"gamma": "weight", "beta": "bias"}[kind]


def _sizes(stored: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, int]:
    def layers(side: str) -> int:
        return len({key.split(".")[3] for key in weights if key.startswith(f"model.{side}.layers.")})

    vocab, width = weights["model.decoder.embed_tokens.weight"].shape
    return {
        "d_model": width,
        "vocab_size": vocab,
        "num_mel_bins": weights["model.encoder.conv1.weight"].shape[1],
        "encoder_layers": layers("encoder"),
        "decoder_layers": layers("decoder"),
        "encoder_attention_heads": int(stored["encoder/num_heads"]),
        "decoder_attention_heads": int(stored["decoder/num_heads"]),
        "encoder_ffn_dim": weights["model.encoder.layers.0.fc1.weight"].shape[0],
        "decoder_ffn_dim": weights["model.decoder.layers.0.fc1.weight"].shape[0],
        "max_source_positions": weights["model.encoder.embed_positions.weight"].shape[0],
        "max_target_positions": weights["model.decoder.embed_positions.weight"].shape[0],
    }
