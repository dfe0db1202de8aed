"""Makes `tests/fixtures/parity` from the full parity fixtures: `python -m tests.parity_subset`.

The subset fits into the repository, so parity tests run without the full fixtures (see tests/parity.py). It holds the
reference's weights and outputs, trimmed to a few cases. Floating point tensors are stored as 16-bit integers with one
scale for each row, which keeps an error of about 3e-5 of the row's largest value. Tests allow for that rounding.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.parity import PARITY, RELEASED, SUBSET

POSITIONS = 100  # of the tokenizer: 2 s
TOKENIZER_CASES = ("tiny", "one_second")
MEL_STRIDE = 5
STREAM, NUM_BLOCKS = "stream_block10", 2
DECODER_CASES = ("prompted", "melspec")
DECODER_TENSORS = (
    "oneshot.token",
    "oneshot.encoder_proj_out",
    "oneshot.mu",
    "prompted.token",
    "prompted.prompt_token",
    "prompted.prompt_feat",
    "prompted.embedding",
    "prompted.mel",
    *(f"{STREAM}.{k}.{name}" for k in range(NUM_BLOCKS) for name in ("token", "raw_mel", "returned_mel", "wave")),
)


def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floating point tensors of more than 64 values as int16 and the scales of their rows; others as they are."""
    out = {}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.numel() <= 64:
            out[key] = tensor.contiguous()
            continue
        rows = tensor.reshape(tensor.shape[0] if tensor.shape[0] > 1 else tensor.shape[:2].numel(), -1)
        scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 32767
        out[key] = (rows / scale).round().to(torch.int16).reshape(tensor.shape)
        out[f"{key}:scale"] = scale.reshape([*tensor.shape[: 1 if tensor.shape[0] > 1 else 2], *[1] * (tensor.dim() - (1 if tensor.shape[0] > 1 else 2))])
    return out


