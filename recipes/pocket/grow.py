"""Makes a trained language model larger without a change of what it says, as a start for further training.

    python -m recipes.pocket.grow --model src/duologue/pocket/language --out runs/pocket/grown/language

New layers are copies of their neighbors that add nothing yet. New units of the feed-forward layers are not read yet.
Heads of keys and values are copied for the queries that share them. So every logit stays as it was, and the gradient
reaches all new weights within two steps.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GlmForCausalLM, PreTrainedModel

from duologue.language.backbone import load_language, load_provenance, save_language


@dataclass(frozen=True)
class Growth:
    """Sizes of the larger model: 12.2 million parameters from pocket's 7.6 million."""

    num_layers: int = 10
    num_kv_heads: int = 2
    ffn_dim: int = 1024


@torch.no_grad()
def grow(model: PreTrainedModel, growth: Growth, seed: int = 0) -> PreTrainedModel:
    """Returns a Glm of the larger sizes with the logits of `model`.

    Raises:
        ValueError: a size is below the present one, or the heads cannot be shared evenly.
    """
    config = copy.deepcopy(model.config)
    sizes = (config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size)
    larger = (growth.num_layers, growth.num_kv_heads, growth.ffn_dim)
    if any(new < old for new, old in zip(larger, sizes, strict=True)):
        raise ValueError(f"the model has {sizes} layers, heads of keys and feed-forward units; {larger} is not larger")
    if config.num_attention_heads % growth.num_kv_heads or growth.num_kv_heads % config.num_key_value_heads:
        raise ValueError(f"{growth.num_kv_heads} heads of keys do not divide {config.num_attention_heads} of queries")
    copies = growth.num_kv_heads // config.num_key_value_heads
    config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size = larger
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grown = GlmForCausalLM(config)
    old, new = model.state_dict(), grown.state_dict()
    for name in (key for key in new if ".layers." not in key):
        new[name].copy_(old[name])
    sources = layer_sources(sizes[0], growth.num_layers)
    for layer, source in enumerate(sources):
        is_copy = source in sources[:layer]
        for name in (key for key in new if key.startswith(f"model.layers.{layer}.")):
            weight = old[name.replace(f".layers.{layer}.", f".layers.{source}.")]
            _fill(new[name], weight, name, copies, config.head_dim)
            if is_copy and name.endswith(("o_proj.weight", "down_proj.weight")):
                new[name].zero_()
    return grown.eval()


def layer_sources(num_old: int, num_new: int) -> list[int]:
    """The old layer that each new layer is made of. The copies are spread evenly."""
    return [index * num_old // num_new for index in range(num_new)]


def _fill(new: Tensor, old: Tensor, name: str, copies: int, head_dim: int) -> None:
    """Writes `old` into `new`, which is larger or of the same shape. Random values remain where nothing is read."""
    if name.endswith("gate_up_proj.weight"):
        for into, part in zip(new.chunk(2), old.chunk(2), strict=True):
            into.mul_(part.std() / into.std())
            into[: len(part)] = part
    elif name.endswith("down_proj.weight"):
        new.zero_()
        new[:, : old.shape[1]] = old
    elif ".k_proj." in name or ".v_proj." in name:
        heads = old.unflatten(0, (-1, head_dim))
        new.copy_(heads.repeat_interleave(copies, dim=0).flatten(0, 1))
    else:
        new.copy_(old)


def main() -> None:
    growth = Growth()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the trained language model")
    parser.add_argument("--out", type=Path, required=True, help="folder of the larger one")
    parser.add_argument("--layers", type=int, default=growth.num_layers)
    parser.add_argument("--kv-heads", type=int, default=growth.num_kv_heads, help="heads of keys and values")
    parser.add_argument("--ffn-dim", type=int, default=growth.ffn_dim, help="units of each feed-forward layer")
    args = parser.parse_args()
    try:
        grown = grow(load_language(args.model), Growth(args.layers, args.kv_heads, args.ffn_dim))
        save_language(args.out, grown, load_provenance(args.model))
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    print(f"{args.out}: {grown.num_parameters() / 1e6:.1f} million parameters")


if __name__ == "__main__":
    main()
