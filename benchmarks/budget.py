"""Parameters, bytes and operations per second of speech of a chatbot, part by part.

    python benchmarks/budget.py [--model pocket] [--json]

Operations are multiply-adds of matrix products and convolutions, counted by torch while ten seconds pass through.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from duologue import rates
from duologue.chatbot import model_folder
from duologue.interleave import INTERLEAVED
from duologue.layers import Padded
from duologue.models import Models

SECONDS = 10


def measure(folder: Path) -> list[dict[str, float | str]]:
    """One row a part: name, parameters, bytes on disk, multiply-adds for a second of speech."""
    models = Models.load(folder)
    num_tokens = int(SECONDS * rates.TOKEN_RATE)
    wav = Padded.full(torch.randn(1, SECONDS * rates.LISTEN_SAMPLE_RATE) * 0.1)
    codes = Padded.full(torch.randint(models.tokenizer.config.quantizer.codebook_size, (1, num_tokens)))
    flow, vocoder = models.decoder.flow, models.decoder.vocoder
    with torch.inference_mode():
        mel = flow(codes)
    # Every run of speech comes with a run of text before it.
    ids_per_s = rates.TOKEN_RATE * (1 + INTERLEAVED.text_run / INTERLEAVED.speech_run)
    language = models.engine.model
    ids = torch.zeros(1, 1, dtype=torch.int64)
    decoder, each = folder / "decoder", 1 / SECONDS
    return [
        _row(
            "tokenizer (listening)", models.tokenizer, folder / "tokenizer", lambda: models.tokenizer(wav), 1 / SECONDS
        ),
        _row("language (one reply)", language, folder / "language", lambda: language(ids), ids_per_s),
        _row("flow (one reply)", flow, decoder / "flow", lambda: flow(codes), each),
        _row("vocoder (one reply)", vocoder, decoder / "vocoder", lambda: vocoder(mel), each),
    ]


def _row(
    name: str, module: nn.Module, folder: Path, work: Callable[[], object], per_second: float
) -> dict[str, float | str]:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        work()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    operations = counter.get_total_flops() / 2 * per_second
    return {"part": name, "parameters": parameters, "bytes": size, "multiply_adds_per_s": operations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = measure(model_folder(args.model))
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{'part':24}{'parameters':>14}{'MB on disk':>12}{'M multiply-adds/s':>20}")
    for row in rows:
        print(
            f"{row['part']:24}{row['parameters']:14,}{float(row['bytes']) / 2**20:12.1f}"
            f"{float(row['multiply_adds_per_s']) / 1e6:20,.0f}"
        )


if __name__ == "__main__":
    main()
