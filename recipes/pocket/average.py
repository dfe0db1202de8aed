"""Averages the weights of language models that were trained from one start ("model soup", arXiv 2203.05482).

    python -m recipes.pocket.average --out OUT FOLDER FOLDER=2 ...

The average of a start and of what trainings made of it is often better than all of them: each ends at some distance
from one minimum, and the average lies closer to it. A number behind a folder is its weight, 1 by default.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from duologue.language.backbone import load_language, load_provenance, save_language


@torch.no_grad()
def average(models: Sequence[PreTrainedModel], weights: Sequence[float]) -> PreTrainedModel:
    """Returns the first model with the weighted mean of the weights of all.

    Raises:
        ValueError: the models differ in shape, or the weights are not above 0.
    """
    if len(models) != len(weights) or min(weights, default=0.0) <= 0:
        raise ValueError(f"{len(models)} models need as many weights above 0, got {list(weights)}")
    states = [model.state_dict() for model in models]
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("the models differ in shape; recipes.pocket.grow makes the smaller ones larger")
    share = [weight / sum(weights) for weight in weights]
    mean = {
        name: torch.stack([part * state[name].double() for part, state in zip(share, states, strict=True)]).sum(0)
        for name in states[0]
    }
    models[0].load_state_dict(mean)  # not before: tied weights stand twice in a state
    return models[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the average")
    parser.add_argument("models", nargs="+", metavar="FOLDER[=WEIGHT]", help="folders of language models")
    args = parser.parse_args()
    pairs = [one.rpartition("=") if "=" in one else (one, "=", "1") for one in args.models]
    folders = [Path(folder) for folder, _, _ in pairs]
    try:
        mean = average([load_language(folder) for folder in folders], [float(weight) for _, _, weight in pairs])
        save_language(args.out, mean, load_provenance(folders[0]))
    except ValueError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
