"""A new speech tokenizer that starts from a Whisper checkpoint in transformers' format (arXiv:2412.02612).

The encoder is cut in two: the first layers become the tokenizer's, the rest the layers after the quantizer.
Convolutions keep their weights and become causal, attention becomes block-causal; training heals what that breaks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from duologue.audio import LogMelConfig
from duologue.checkpoint import load_tensors
from duologue.config import read_json
from duologue.tokenizer.encoder import EncoderConfig
from duologue.tokenizer.quantizer import QuantizerConfig
from duologue.tokenizer.recognizer import Recognizer, RecognizerConfig
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig

_PREFIXES = ("model.encoder.", "encoder.")


def from_whisper(
    folder: str | Path, num_layers: int, block_frames: int = 200, quantizer: QuantizerConfig | None = None
) -> tuple[SpeechTokenizer, Recognizer]:
    """Cuts the encoder of a Whisper folder (config.json and safetensors) after `num_layers` layers.

    The codebook, the recognition decoder and the small heads are new and random; the feature floor is Whisper's own,
    the maximum of the utterance minus 8.

    Raises:
        ValueError: not a Whisper checkpoint, a cut outside of its layers, a missing weight or one of another shape.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "whisper":
        raise ValueError(f"{folder} holds a {config.get('model_type')!r} model, not a Whisper checkpoint")
    if config.get("activation_function", "gelu") != "gelu":
        raise ValueError(f"{folder} has the activation {config['activation_function']!r}; only gelu is known")
    total = int(config["encoder_layers"])
    if not 0 < num_layers < total:
        raise ValueError(
            f"num_layers is {num_layers}; the encoder in {folder} can be cut after 1 to {total - 1} layers"
        )
    width, heads, ffn = (int(config[key]) for key in ("d_model", "encoder_attention_heads", "encoder_ffn_dim"))
    mels, positions = int(config["num_mel_bins"]), int(config["max_source_positions"])
    tokenizer = SpeechTokenizer(
        SpeechTokenizerConfig(
            features=LogMelConfig(mels, "utterance"),
            encoder=EncoderConfig(mels, width, heads, ffn, num_layers, block_frames, positions),
            quantizer=quantizer or QuantizerConfig(),
        )
    )
    recognizer = Recognizer(RecognizerConfig(width, heads, ffn, total - num_layers))
    weights = _encoder_weights(folder)
    with torch.no_grad():
        for key, parameter in tokenizer.encoder.state_dict().items():
            parameter.copy_(_fitting(weights, key, parameter, folder))
        for key, parameter in recognizer.layers.state_dict().items():
            number, _, rest = key.partition(".")
            parameter.copy_(_fitting(weights, f"layers.{int(number) + num_layers}.{rest}", parameter, folder))
        for key, parameter in recognizer.layer_norm.state_dict().items():
            parameter.copy_(_fitting(weights, f"layer_norm.{key}", parameter, folder))
        # The second positions begin as the first rows of the first ones (arXiv 2411.17607).
        table = recognizer.embed_positions2.weight
        table.copy_(tokenizer.encoder.embed_positions.weight[: len(table)])
    return tokenizer, recognizer


def _encoder_weights(folder: Path) -> dict[str, Tensor]:
    weights = {}
    for key, value in load_tensors(folder).items():
        for prefix in _PREFIXES:
            if key.startswith(prefix):
                weights[key.removeprefix(prefix)] = value
                break
    return weights


def _fitting(weights: dict[str, Tensor], key: str, wanted: Tensor, folder: Path) -> Tensor:
    if key not in weights:
        raise ValueError(f"{folder} has no encoder weight {key!r}")
    if weights[key].shape != wanted.shape:
        raise ValueError(
            f"{folder}: encoder weight {key!r} has shape {tuple(weights[key].shape)}, expected {tuple(wanted.shape)}"
        )
    return weights[key]
