"""The released decoder at a size for tests, with weights that are a formula, not a draw."""

import torch
from torch import Tensor, nn

from duologue.released.decoder.blocks import Streaming
from duologue.released.decoder.conformer import ConformerConfig
from duologue.released.decoder.decoder import ReleasedDecoder, build_released_decoder
from duologue.released.decoder.flow import ReleasedFlowConfig
from duologue.released.decoder.hift import HiFTConfig, PitchConfig
from duologue.released.decoder.unet import UNetConfig

VOCAB = 32
FLOW = ReleasedFlowConfig(
    input_size=16,
    spk_embed_dim=12,
    vocab_size=VOCAB,
    encoder=ConformerConfig(input_size=16, output_size=16, attention_heads=2, linear_units=24, num_blocks=2),
    estimator=UNetConfig(channels=(16, 16), attention_head_dim=6, n_blocks=1, num_mid_blocks=2, num_heads=2),
)
HIFT = HiFTConfig(base_channels=16, f0_predictor=PitchConfig(cond_channels=8))


def formula(shape: torch.Size, salt: int) -> Tensor:
    """Numbers in -1..1 that look random and are the same everywhere: the high bits of a 32-bit integer product."""
    count = torch.arange(1, shape.numel() + 1, dtype=torch.int64) + 1000003 * (salt + 1)
    mixed = (count * 2654435761) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) & 0xFFFFFFFF
    return ((mixed >> 8).double() / 2**23 - 1).float().reshape(shape)


def fill(module: nn.Module) -> None:
    """Weights of about unit gain; norms near one; a voice of some hundred Hz."""
    for salt, (name, parameter) in enumerate(sorted(module.named_parameters())):
        noise = formula(parameter.shape, salt)
        if name.endswith(("weight_g", "alpha")) or (parameter.dim() == 1 and name.endswith("weight")):
            value = 1 + 0.2 * noise
        elif parameter.dim() == 1:
            value = 0.1 * noise
        else:
            value = 1.7 * noise / parameter[0].numel() ** 0.5
        parameter.data = value.to(parameter.dtype)
        if name.endswith("classifier.bias"):
            parameter.data += 120.0
        if name.endswith("classifier.weight"):
            parameter.data *= 60.0


def small_decoder(streaming: Streaming | None = None, hift: HiFTConfig = HIFT) -> ReleasedDecoder:
    decoder = build_released_decoder(FLOW, hift, streaming)
    fill(decoder)
    return decoder.eval().requires_grad_(False)


def small_tokens(length: int, salt: int = 0) -> Tensor:
    """(N,) int64."""
    return ((formula(torch.Size([length]), 77 + salt) + 1) / 2 * VOCAB).long().clamp(max=VOCAB - 1)
