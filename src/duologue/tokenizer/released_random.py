"""A folder in the format of glm-4-voice-tokenizer with random weights, at any size."""

from __future__ import annotations

from pathlib import Path

import torch

from duologue import rates
from duologue.config import write_json
from duologue.random_weights import LABEL, write_random
from duologue.tokenizer.released import ReleasedSpeechTokenizer, released_shapes
from duologue.tokenizer.tokenizer import SpeechTokenizerConfig


def write_random_tokenizer(
    folder: str | Path, config: SpeechTokenizerConfig, seed: int = 0, progress: bool = False
) -> None:
    """Writes config.json, preprocessor_config.json and float32 weights (checkpoints.md 1.1 and 1.3)."""
    folder, encoder = Path(folder), config.encoder
    with torch.device("meta"):
        module = ReleasedSpeechTokenizer(config)
    write_random(folder, released_shapes(module), torch.float32, seed, progress=progress)
    features = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": encoder.num_mels,
        "sampling_rate": rates.LISTEN_SAMPLE_RATE,
        "hop_length": rates.LISTEN_HOP,
        "n_fft": module.features.n_fft,
        "chunk_length": module.piece_samples // rates.LISTEN_SAMPLE_RATE,
        "padding_side": "right",
        "padding_value": 0.0,
    }
    write_json(folder / "preprocessor_config.json", features)
    description = {
        LABEL: True,
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
    }
    write_json(folder / "config.json", description)
