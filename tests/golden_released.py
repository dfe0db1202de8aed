"""Numbers of the released formats kept in `tests/golden/released_tokens.safetensors`, where there are no fixtures.

They were written by our own code when it agreed with every fixture; `python -m tests.golden_released` writes them anew,
and must be run only while the parity tests pass with the fixtures. Weights are a formula: only outputs are kept.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GlmConfig, GlmForCausalLM

from duologue.audio import LogMelConfig
from duologue.released.tokenizer import ReleasedSpeechTokenizer, resample_released
from duologue.tokenizer.encoder import EncoderConfig
from duologue.tokenizer.quantizer import QuantizerConfig
from duologue.tokenizer.tokenizer import SpeechTokenizerConfig

FILE = Path(__file__).parent / "golden" / "released_tokens.safetensors"
LISTEN = LogMelConfig(128, floor="utterance")


def formula(shape: tuple[int, ...], salt: int) -> Tensor:
    """Numbers in -1..1 without a pattern, the same everywhere: the high bits of 32-bit integer products."""
    count = torch.arange(1, int(np.prod(shape)) + 1, dtype=torch.int64) + 1000003 * (salt + 1)
    mixed = (count * 2654435761) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) & 0xFFFFFFFF
    return ((mixed >> 8).double() / 2**23 - 1).float().reshape(shape)


def fill(module: nn.Module) -> None:
    """Norms near one, biases small, tables of unit size, matrices of about unit gain."""
    for salt, (name, parameter) in enumerate(sorted(module.named_parameters())):
        noise = formula(tuple(parameter.shape), salt)
        if parameter.dim() == 1:
            value = 1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.1 * noise
        elif "embed" in name or "codebook" in name:
            value = noise
        else:
            value = 1.7 * noise / parameter[0].numel() ** 0.5
        parameter.data.copy_(value)


def wavs() -> list[Tensor]:
    """Three utterances of unequal lengths, the last one over 30 s."""
    waves = []
    for salt, length in enumerate((1500, 20_000, 500_000)):
        time = torch.arange(length, dtype=torch.float64) / 16_000
        swell = torch.sin(2 * torch.pi * (1 + salt) * time).abs()
        waves.append((0.2 * swell * formula((length,), salt)).float())
    return waves


@torch.inference_mode()
def compute() -> dict[str, Tensor]:
    """Every number that is kept."""
    encoder = EncoderConfig(128, 32, 2, 64, 3, 40, 1500)
    tokenizer = ReleasedSpeechTokenizer(SpeechTokenizerConfig(LISTEN, encoder, QuantizerConfig(128))).eval()
    fill(tokenizer)
    pieces = [piece for wav in wavs() for piece in wav.split(tokenizer.piece_samples)]
    heard = tokenizer.encode_pieces(pieces)
    kept = {"tokenizer.hidden": heard.hidden[:, ::5].contiguous(), "tokenizer.margin": heard.quantized.margin}
    kept["tokenizer.codes"] = heard.quantized.codes.values.to(torch.int16)
    kept["resampled"] = resample_released(wavs()[1], 44_100, 16_000)
    config = GlmConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=3.90625e-08,
        max_position_embeddings=64,
        pad_token_id=None,
        eos_token_id=199,
    )
    model = GlmForCausalLM(config).eval()
    fill(model)
    kept["language.logits"] = model(input_ids=(torch.arange(24) * 37 % 200)[None]).logits
    return kept


if __name__ == "__main__":
    save_file(compute(), FILE)
    print(f"{FILE.stat().st_size} bytes -> {FILE}")
