"""The released speech tokenizer (glm-4-voice-tokenizer) as a SpeechTokenizer, and its batching.

    config.json                  a Whisper config with `quantize_*` and `pooling_*` keys (docs/checkpoints.md 1.1)
    model.safetensors            keys as they are, or with the prefix `model.encoder.` (docs/checkpoints.md 1.3)
    preprocessor_config.json     a WhisperFeatureExtractor

Shapes: B pieces of at most 30 s, S samples, T tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from duologue import rates
from duologue.audio import LogMel, LogMelConfig, resample
from duologue.checkpoint import StoredTensor, save_tensors, stored_tensors
from duologue.config import read_json, write_json
from duologue.layers import Padded
from duologue.released.weights import check_plain, check_stored
from duologue.tokenizer.encoder import EncoderConfig
from duologue.tokenizer.quantizer import Quantized, QuantizerConfig
from duologue.tokenizer.speech_recognizer import SpeechRecognizer
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig

Resampler = Literal["soxr", "released"]

PREFIX = "model.encoder."
# Options of the released code that the checkpoint does not use; other values are refused.
_FIXED: dict[str, tuple[object, object]] = {  # key: (value of the checkpoint, the class's default)
    "activation_function": ("gelu", "gelu"),
    "encoder_causal_convolution": (True, False),
    "encoder_causal_attention": (False, False),
    "quantize_causal_encoder": (False, False),
    "pooling_type": ("avg", "max"),
    "pooling_kernel_size": (rates.POOL, None),
    "scale_embedding": (False, False),
}
_FEATURES = {"sampling_rate": rates.LISTEN_SAMPLE_RATE, "hop_length": rates.LISTEN_HOP, "n_fft": LogMel.n_fft}
_EMA = ("ema_count", "ema_weight")  # training buffers


@dataclass(frozen=True)
class Pieces:
    """Results for a batch of pieces.

    Attributes:
        log_mel: (B, F, M), padding included.
        hidden: (B, T, D) float32 before the quantizer, padding included.
        quantized: codes with the row lengths ceil(S / 1280), vectors and margins.
    """

    log_mel: Tensor
    hidden: Tensor
    quantized: Quantized


class ReleasedSpeechTokenizer(SpeechTokenizer):
    """SpeechTokenizer with the released checkpoint's positions after the quantizer, unused for codes.

    As a streaming stage it equals the released model on a single utterance, except that the clip level knows only the
    maximum so far, see `LogMelConfig.floor`.
    """

    def __init__(self, config: SpeechTokenizerConfig) -> None:
        super().__init__(config)
        self.embed_positions2 = nn.Embedding(-(-config.encoder.max_positions // rates.POOL), config.encoder.width)

    def encode_pieces(self, pieces: Sequence[Tensor]) -> Pieces:
        """Encodes pieces (S,) at 16 kHz of at most 30 s as one batch, as the released code (docs/checkpoints.md 1.4).

        All are zero-padded to the longest in whole tokens before feature extraction. The last mel frame of a piece of
        whole tokens therefore differs from a single run.
        """
        lengths = torch.tensor([len(piece) for piece in pieces], device=self.device)
        if not len(pieces) or not 1 <= int(lengths.min()) <= int(lengths.max()) <= self.piece_samples:
            raise ValueError(f"pieces must hold 1 to {self.piece_samples} samples each, got {lengths.tolist()}")
        wav = nn.utils.rnn.pad_sequence([piece.to(self.device).float() for piece in pieces], batch_first=True)
        wav = functional.pad(wav, (0, -wav.shape[1] % rates.SAMPLES_PER_TOKEN))
        mel: Padded = self.features(Padded.full(wav))
        num_valid = -(-lengths // rates.LISTEN_HOP)
        hidden = self.encoder.encode(mel, self.encoder.init_state(len(pieces)), num_valid)
        num_tokens = -(-lengths // rates.SAMPLES_PER_TOKEN)
        return Pieces(mel.values, hidden.values, self.quantizer(Padded(hidden.values, num_tokens)))

    @torch.inference_mode()
    def tokenize(
        self,
        wavs: Sequence[NDArray[np.float32]],
        sample_rates: Sequence[int],
        resampler: Resampler = "soxr",
        batch_size: int = 128,
    ) -> list[Tensor]:
        """Tokenizes whole utterances, with all pieces of 30 s in common batches.

        Args:
            wavs: each (S,), or (C, S) of which channel 0 is used.
            resampler: "released" is torchaudio's windowed sinc, for equality with the released code.
            batch_size: pieces per batch (released: 128).

        Returns:
            one int64 tensor (T,) per utterance.
        """
        pieces, owners = [], []
        for owner, (wav, sample_rate) in enumerate(zip(wavs, sample_rates, strict=True)):
            channel = np.ascontiguousarray(wav[0] if wav.ndim == 2 else wav, dtype=np.float32)
            if resampler == "released":
                heard = resample_released(torch.from_numpy(channel), sample_rate, rates.LISTEN_SAMPLE_RATE)
            else:
                heard = torch.from_numpy(resample(channel, sample_rate, rates.LISTEN_SAMPLE_RATE))
            cut = heard.split(self.piece_samples)
            pieces += [piece for piece in cut if len(piece)]
            owners += [owner] * sum(len(piece) > 0 for piece in cut)
        codes: list[list[Tensor]] = [[] for _ in wavs]
        for start in range(0, len(pieces), batch_size):
            rows = self.encode_pieces(pieces[start : start + batch_size]).quantized.codes.rows()
            for owner, row in zip(owners[start : start + batch_size], rows, strict=True):
                codes[owner].append(row)
        return [torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64) for parts in codes]

    @property
    def device(self) -> torch.device:
        return self.quantizer.codebook.weight.device


@dataclass(frozen=True)
class TokenizerFiles:
    """A checked tokenizer folder, known from its headers.

    Attributes:
        stored: tensors by key of `ReleasedSpeechTokenizer`.
    """

    config: SpeechTokenizerConfig
    stored: dict[str, StoredTensor]

    def load(self) -> ReleasedSpeechTokenizer:
        """Loads the tokenizer, float32 on the CPU, in evaluation mode. Raises ValueError for values that are not
        finite."""
        with torch.device("meta"):
            module = ReleasedSpeechTokenizer(self.config)
        weights = {key: entry.read(torch.float32) for key, entry in self.stored.items()}
        weights.setdefault("quantizer.ema_count", torch.zeros(self.config.quantizer.codebook_size))
        weights.setdefault("quantizer.ema_weight", weights["quantizer.codebook.weight"].clone())
        module.load_state_dict(weights, assign=True)
        module.features = LogMel(self.config.features)
        return module.eval()


def read_released_tokenizer(folder: str | Path) -> TokenizerFiles:
    """Reads config and headers of a released folder and checks them against each other.

    Raises:
        ValueError: names file and key: a part is missing or truncated, another architecture, a quantized checkpoint, or
            a weight that is missing, unexpected or of another shape.
    """
    config = read_released_config(folder)
    with torch.device("meta"):
        return TokenizerFiles(config, _stored_weights(Path(folder), ReleasedSpeechTokenizer(config)))


def load_released_tokenizer(folder: str | Path) -> ReleasedSpeechTokenizer:
    """Loads a released folder. Raises ValueError as `read_released_tokenizer` and `TokenizerFiles.load`."""
    return read_released_tokenizer(folder).load()


def read_released_config(folder: str | Path) -> SpeechTokenizerConfig:
    """Reads sizes from `config.json` and `preprocessor_config.json`. Raises ValueError as `read_released_tokenizer`."""
    folder = Path(folder)
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type", "whisper") != "whisper" or "quantize_vocab_size" not in config:
        raise ValueError(
            f"{path} (model_type {config.get('model_type')!r}) is no speech tokenizer: it must be of model_type "
            "'whisper' with the key 'quantize_vocab_size'"
        )
    check_plain(config, path)
    for key, (wanted, default) in _FIXED.items():
        if config.get(key, default) != wanted:
            raise ValueError(f"{path}: {key} is {config.get(key, default)!r}; only {wanted!r} can be run")
    position = _whole(config, "quantize_position", path)
    if _whole(config, "pooling_position", path) != position:
        raise ValueError(f"{path}: pooling_position must equal quantize_position, {position}")
    if position > _whole(config, "encoder_layers", path):
        raise ValueError(f"{path}: quantize_position is {position}, but encoder_layers is {config['encoder_layers']}")
    num_mels, max_positions = _whole(config, "num_mel_bins", path), _whole(config, "max_source_positions", path)
    _check_features(folder / "preprocessor_config.json", num_mels, max_positions)
    return SpeechTokenizerConfig(
        LogMelConfig(num_mels, floor="utterance"),
        EncoderConfig(
            num_mels=num_mels,
            width=_whole(config, "d_model", path),
            num_heads=_whole(config, "encoder_attention_heads", path),
            ffn_dim=_whole(config, "encoder_ffn_dim", path),
            num_layers=position,
            block_frames=_whole(config, "quantize_causal_block_size", path),
            max_positions=max_positions,
        ),
        QuantizerConfig(_whole(config, "quantize_vocab_size", path)),
    )


def _stored_weights(folder: Path, module: ReleasedSpeechTokenizer) -> dict[str, StoredTensor]:
    """Returns the stored tensor of each of the module's weights."""
    num_layers = module.config.encoder.num_layers
    found = {}
    for key, stored in stored_tensors(folder).items():
        bare = key.removeprefix(PREFIX)
        parts = bare.split(".")
        behind = parts[0] == "layers" and parts[1].isdigit() and int(parts[1]) >= num_layers
        if behind or parts[0] == "layer_norm" or bare.startswith(("model.decoder.", "proj_out.")):
            continue  # training parts: layers after the quantizer, recognition head
        if bare in found:
            raise ValueError(f"{stored.path} holds the weight {bare!r} twice, with and without the prefix {PREFIX!r}")
        found[bare] = stored
    shapes, ours = released_shapes(module), {_released_key(key): key for key in module.state_dict()}
    check_stored(found, {key: shape for key, shape in shapes.items() if key in found or key not in _EMA}, folder)
    return {ours[key]: stored for key, stored in found.items()}


def released_shapes(module: ReleasedSpeechTokenizer) -> dict[str, tuple[int, ...]]:
    """Returns shapes by released key, training buffers included; the module may be on the meta device."""
    return {_released_key(key): tuple(value.shape) for key, value in module.state_dict().items()}


def save_released_tokenizer(folder: str | Path, tokenizer: SpeechTokenizer, recognizer: SpeechRecognizer) -> None:
    """Writes a tokenizer that was trained here in the released layout (docs/checkpoints.md 1.1 and 1.3).

    The encoder layers after the quantizer are stored too, as in the released checkpoint; the text decoder is not.

    Raises:
        ValueError: the quantizer normalizes its input, or the feature floor is not that of the utterance; the released
            format has neither.
    """
    config = tokenizer.config
    if config.quantizer.normalize or config.features.floor != "utterance":
        raise ValueError(
            "the released format has no normalization before the quantizer, and a feature floor of each utterance: "
            "train with quantizer.normalize=false and features.floor=utterance"
        )
    tensors = {_released_key(key): value for key, value in tokenizer.state_dict().items()}
    tensors["embed_positions2.weight"] = recognizer.embed_positions2.weight
    for key, value in recognizer.layers.state_dict().items():
        number, _, rest = key.partition(".")
        tensors[f"layers.{int(number) + config.encoder.num_layers}.{rest}"] = value
    tensors |= {f"layer_norm.{key}": value for key, value in recognizer.layer_norm.state_dict().items()}
    save_tensors(folder, {PREFIX + key: value.detach().contiguous() for key, value in tensors.items()})
    write_tokenizer_configs(folder, config, {"encoder_layers": config.encoder.num_layers + len(recognizer.layers)})


def write_tokenizer_configs(
    folder: str | Path, config: SpeechTokenizerConfig, more: Mapping[str, object] | None = None
) -> None:
    """Writes `config.json` and `preprocessor_config.json` of a released tokenizer; `more` goes into the former."""
    folder, encoder = Path(folder), config.encoder
    features = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": encoder.num_mels,
        "sampling_rate": rates.LISTEN_SAMPLE_RATE,
        "hop_length": rates.LISTEN_HOP,
        "n_fft": LogMel.n_fft,
        "chunk_length": _chunk_length(encoder.max_positions),
        "padding_side": "right",
        "padding_value": 0.0,
    }
    write_json(folder / "preprocessor_config.json", features)
    description = {
        "architectures": ["WhisperVQEncoder"],
        "model_type": "whisper",
        "torch_dtype": "float32",
        "d_model": encoder.width,
        "encoder_layers": encoder.num_layers,
        "encoder_attention_heads": encoder.num_heads,
        "encoder_ffn_dim": encoder.ffn_dim,
        "num_mel_bins": encoder.num_mels,
        "max_source_positions": encoder.max_positions,
        "activation_function": "gelu",
        "scale_embedding": False,
        "encoder_causal_convolution": True,
        "encoder_causal_attention": False,
        "quantize_causal_encoder": False,
        "quantize_causal_block_size": encoder.block_frames,
        "quantize_position": encoder.num_layers,
        "quantize_vocab_size": config.quantizer.codebook_size,
        "quantize_encoder_only": True,
        "quantize_ema_decay": config.quantizer.ema_decay,
        "pooling_kernel_size": rates.POOL,
        "pooling_type": "avg",
        "pooling_position": encoder.num_layers,
        **(more or {}),
    }
    write_json(folder / "config.json", description)


def _chunk_length(max_positions: int) -> int:
    """Returns the seconds of a piece."""
    return max_positions * rates.ENCODER_STRIDE * rates.LISTEN_HOP // rates.LISTEN_SAMPLE_RATE


def resample_released(wav: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Resamples as torchaudio's default: windowed sinc, six zero crossings, roll-off 0.99, Hann window.

    Args:
        wav: (..., S) float32.

    Returns:
        (..., ceil(S * to_rate / from_rate)) float32.
    """
    if from_rate == to_rate:
        return wav
    common = math.gcd(from_rate, to_rate)
    old, new = from_rate // common, to_rate // common
    crossings, base = 6, min(old, new) * 0.99
    width = math.ceil(crossings * old / base)
    offsets = torch.arange(-width, width + old, dtype=torch.float64) / old
    # torchaudio computes the phases in float32 and adds them in float64.
    phases = torch.arange(0, -new, -1)[:, None] / new
    time = ((phases + offsets) * base).clamp(-crossings, crossings)  # (new, 2 * width + old)
    window = torch.cos(time * math.pi / crossings / 2) ** 2
    angle = time * math.pi
    kernel = torch.where(angle == 0, torch.ones_like(angle), angle.sin() / angle) * window * (base / old)
    flat = functional.pad(wav.reshape(-1, 1, wav.shape[-1]), (width, width + old))
    out = functional.conv1d(flat, kernel.to(wav.dtype)[:, None], stride=old)  # (..., new, S / old)
    out = out.transpose(1, 2).reshape(len(flat), -1)[:, : math.ceil(new * wav.shape[-1] / old)]
    return out.reshape(*wav.shape[:-1], -1)


def _released_key(key: str) -> str:
    return key.removeprefix("encoder.").removeprefix("quantizer.")


def _whole(config: Mapping[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ValueError(f"{path}: {key} must be a whole number of at least 1, got {value!r}")
    return value


def _check_features(path: Path, num_mels: int, max_positions: int) -> None:
    config = read_json(path)
    wanted = {
        **_FEATURES,
        "feature_size": num_mels,
        "chunk_length": _chunk_length(max_positions),
    }
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {config[key]!r}, but the model needs {value!r}")
