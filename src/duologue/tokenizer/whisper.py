"""A new speech tokenizer that starts from a whole Whisper folder in transformers' format (arXiv 2412.02612, 2.1).

The encoder is cut in two: the first layers become the tokenizer's, the others follow the quantizer in the recognizer,
which keeps Whisper's text decoder. Convolutions keep their weights and become causal, attention becomes block-causal;
training heals what that breaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from duologue import rates
from duologue.audio import LogMel, LogMelConfig
from duologue.checkpoint import load_tensors
from duologue.config import read_json
from duologue.layers import Padded, attention_mask
from duologue.tokenizer.encoder import EncoderConfig, EncoderLayer, pool
from duologue.tokenizer.quantizer import QuantizerConfig
from duologue.tokenizer.speech_recognizer import (
    TEXT_FILE,
    SpeechRecognizer,
    SpeechRecognizerConfig,
    WhisperText,
)
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig


@dataclass(frozen=True)
class WhisperFolder:
    """A Whisper checkpoint: the parsed `config.json` and all weights, keys without the prefix `model.`."""

    path: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]

    @staticmethod
    def open(path: str | Path) -> WhisperFolder:
        """Reads a folder with `config.json` and safetensors.

        Raises:
            ValueError: one sentence, when it holds no Whisper checkpoint that can be used.
        """
        path = Path(path)
        config = read_json(path / "config.json")
        if config.get("model_type") != "whisper":
            raise ValueError(f"{path} holds a {config.get('model_type')!r} model, not a Whisper checkpoint")
        if config.get("activation_function", "gelu") != "gelu":
            raise ValueError(f"{path} has the activation {config['activation_function']!r}; only gelu is known")
        weights = {key.removeprefix("model."): value.float() for key, value in load_tensors(path).items()}
        return WhisperFolder(path, config, weights)

    def size(self, key: str) -> int:
        """A whole number of the config."""
        value = self.config.get(key)
        if type(value) is not int or value < 1:
            raise ValueError(f"{self.path / 'config.json'}: {key} must be a whole number of at least 1, got {value!r}")
        return value

    def weight(self, key: str, shape: torch.Size) -> Tensor:
        """One weight of a known shape."""
        if key not in self.weights:
            raise ValueError(f"{self.path} has no weight {key!r}")
        found = self.weights[key]
        if found.shape != shape:
            raise ValueError(f"{self.path}: weight {key!r} has shape {tuple(found.shape)}, expected {tuple(shape)}")
        return found

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Copies all weights of a module from the keys that begin with `prefix`."""
        with torch.no_grad():
            for key, parameter in module.state_dict().items():
                parameter.copy_(self.weight(prefix + key, parameter.shape))

    def text(self) -> WhisperText:
        """The folder's byte-level BPE."""
        return WhisperText(self.path / TEXT_FILE, self.size("vocab_size"))


def from_whisper(
    folder: WhisperFolder,
    num_layers: int,
    block_frames: int = 200,
    quantizer: QuantizerConfig | None = None,
    features: LogMelConfig | None = None,
    num_end: int = 0,
) -> tuple[SpeechTokenizer, SpeechRecognizer]:
    """Cuts the encoder of a Whisper folder after `num_layers` layers.

    The codebook, the prosody probe and the end vectors are new. The feature floor is Whisper's own by default, the
    maximum of the utterance minus 8; the number of mels is always the folder's.

    Args:
        num_end: see `SpeechRecognizerConfig`.

    Raises:
        ValueError: a cut outside of its layers, a missing weight or one of another shape.
    """
    total = folder.size("encoder_layers")
    if not 0 < num_layers < total:
        raise ValueError(
            f"num_layers is {num_layers}; the encoder in {folder.path} can be cut after 1 to {total - 1} layers"
        )
    width, heads, ffn = (folder.size(key) for key in ("d_model", "encoder_attention_heads", "encoder_ffn_dim"))
    mels, positions = folder.size("num_mel_bins"), folder.size("max_source_positions")
    quantizer = quantizer or QuantizerConfig()
    features = features or LogMelConfig(mels, "utterance")
    tokenizer = SpeechTokenizer(
        SpeechTokenizerConfig(
            features=LogMelConfig(mels, features.floor, features.log_floor),
            encoder=EncoderConfig(mels, width, heads, ffn, num_layers, block_frames, positions),
            quantizer=quantizer,
        )
    )
    recognizer = SpeechRecognizer(
        SpeechRecognizerConfig(
            width,
            heads,
            ffn,
            total - num_layers,
            folder.size("decoder_layers"),
            folder.size("decoder_attention_heads"),
            folder.size("decoder_ffn_dim"),
            folder.size("vocab_size"),
            -(-positions // rates.POOL),
            folder.size("max_target_positions"),
            rescale=quantizer.normalize,
            num_end=num_end,
        )
    )
    recognizer.text = folder.text()
    folder.fill(tokenizer.encoder, "encoder.")
    for number, layer in enumerate(recognizer.layers):
        folder.fill(layer, f"encoder.layers.{number + num_layers}.")
    folder.fill(recognizer.layer_norm, "encoder.layer_norm.")
    folder.fill(recognizer.decoder, "decoder.")
    with torch.no_grad():
        # The second positions begin as the first rows of the first ones (arXiv 2411.17607).
        table = recognizer.embed_positions2.weight
        table.copy_(tokenizer.encoder.embed_positions.weight[: len(table)])
    return tokenizer, recognizer


class WhisperTeacher(nn.Module):
    """The untouched Whisper encoder, at the token rate: what the recognizer's memory should be without a quantizer.

    It hears a clip alone, without the padding to 30 s that Whisper adds, and normalizes levels as Whisper does.
    """

    def __init__(self, folder: WhisperFolder) -> None:
        super().__init__()
        width, mels = folder.size("d_model"), folder.size("num_mel_bins")
        self.features = LogMel(LogMelConfig(mels, "utterance"))
        self.conv1 = nn.Conv1d(mels, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(folder.size("max_source_positions"), width)
        heads, ffn = folder.size("encoder_attention_heads"), folder.size("encoder_ffn_dim")
        self.layers = nn.ModuleList(EncoderLayer(width, heads, ffn) for _ in range(folder.size("encoder_layers")))
        self.layer_norm = nn.LayerNorm(width)
        folder.fill(self, "encoder.")
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, wav: Padded) -> Padded:
        """(B, S) 16 kHz -> (B, T, D), the encoder's output averaged over every token's 4 frames."""
        mel: Padded = self.features(wav)
        x = functional.gelu(self.conv1(mel.zeroed().values.transpose(1, 2)))
        x = functional.gelu(self.conv2(x)).transpose(1, 2)
        frames = Padded(x + self.embed_positions.weight[: x.shape[1]], mel.lengths // rates.ENCODER_STRIDE)
        mask = attention_mask(torch.zeros_like(frames.lengths), frames, 0, torch.zeros_like)
        for layer in self.layers:
            frames = layer.step(frames, layer.init_cache(len(frames.lengths)), mask)  # type: ignore[operator]
        return Padded(pool(self.layer_norm(frames.values)), frames.lengths // rates.POOL)
