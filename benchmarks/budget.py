"""Parameters, bytes and operations per second of speech of the model that a folder of recipes makes, part by part.

    python benchmarks/budget.py [--recipes recipes/pocket] [--json]

Operations are multiply-adds of matrix products and convolutions, counted by torch while ten seconds pass through
modules of the recipes' sizes; their weights are random and do not matter.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from duologue import rates
from duologue.config import load_config
from duologue.conversation.chatbot import model_folder
from duologue.decoder.flow import Flow, max_state_bytes
from duologue.decoder.vocoder import Vocoder
from duologue.interleave import INTERLEAVED
from duologue.language.backbone import new_glm
from duologue.layers import Padded
from duologue.models import open_folder
from duologue.training.flow import FlowRecipe
from duologue.training.pretrain import PretrainRecipe
from duologue.training.vocoder import VocoderRecipe

SECONDS = 10


def measure(recipes: Path) -> list[dict[str, float | str]]:
    """One row a part: name, parameters, bytes in half precision, multiply-adds for a second of speech."""
    shipped = open_folder(model_folder("pocket"))  # the sizes of the tokenizer are Whisper's, not its recipe's
    tokenizer, recognizer = shipped.load_tokenizer(), shipped.load_recognizer()
    sizes = load_config(recipes / "flow.yaml", FlowRecipe).flow
    encoder = replace(sizes.encoder, codebook_size=shipped.vocabulary.codebook_size)  # as the training does
    flow = Flow(replace(sizes, encoder=encoder)).eval()
    vocoder = Vocoder(load_config(recipes / "vocoder.yaml", VocoderRecipe).vocoder).eval()
    vocabulary = shipped.vocabulary
    language = new_glm(vocabulary, load_config(recipes / "pretrain.yaml", PretrainRecipe).language)
    wav = Padded.full(torch.randn(1, SECONDS * rates.LISTEN_SAMPLE_RATE) * 0.1)
    num_tokens = int(SECONDS * rates.TOKEN_RATE)
    codes = Padded.full(torch.randint(vocabulary.codebook_size, (1, num_tokens)))
    # Every run of speech comes with a run of text before it.
    ids_per_s = rates.TOKEN_RATE * (1 + INTERLEAVED.text_run / INTERLEAVED.speech_run)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    unguided = flow.init_state(1, guidance_scale=0.0)
    with torch.inference_mode():
        mel = flow(codes, unguided)
    return [
        _row("tokenizer", tokenizer, lambda: tokenizer(wav), 1 / SECONDS),
        *([] if recognizer is None else [_row("recognizer (training, evaluation)", recognizer, lambda: None, 0.0)]),
        _row("language model", language, lambda: language(ids), ids_per_s),
        _row("flow, guided", flow, lambda: flow(codes), 1 / SECONDS),
        _row("flow, not guided", flow, lambda: flow(codes, flow.init_state(1, guidance_scale=0.0)), 1 / SECONDS),
        _row("vocoder", vocoder, lambda: vocoder(mel), 1 / SECONDS),
        {"part": "flow's state for one reply", "bytes": float(max_state_bytes(flow.config) or 0)},
    ]


def _row(name: str, module: nn.Module, work: Callable[[], object], per_second: float) -> dict[str, float | str]:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        work()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    operations = counter.get_total_flops() / 2 * per_second
    return {"part": name, "parameters": parameters, "bytes": 2 * parameters, "multiply_adds_per_s": operations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", type=Path, default=Path("recipes/pocket"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = measure(args.recipes)
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{'part':36}{'M parameters':>14}{'MB':>8}{'M multiply-adds/s':>20}")
    for row in rows:
        print(
            f"{row['part']:36}{float(row.get('parameters', 0)) / 1e6:14.2f}{float(row['bytes']) / 2**20:8.1f}"
            f"{float(row.get('multiply_adds_per_s', 0)) / 1e6:20,.0f}"
        )


if __name__ == "__main__":
    main()
