"""Puts the trained parts of pocket into one model folder, in half precision: what ships in the package.

python -m recipes.pocket.assemble --runs runs/pocket --out src/duologue/pocket
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from duologue.checkpoint import load_component, read_extra, save_component
from duologue.decoder.flow import Flow, FlowConfig
from duologue.decoder.vocoder import Vocoder, VocoderConfig
from duologue.language.backbone import load_language, load_siblings, save_language
from duologue.language.sampling import Sampling
from duologue.models import Card
from duologue.vocabulary import Vocabulary

MAX_BYTES = 40 * 2**20


def assemble(runs: Path, out: Path) -> int:
    """Writes the model folder and returns its size in bytes. Recorded questions that lie in `out` stay.

    Raises:
        ValueError: a part is missing or damaged, or all together weigh more than 40 MB.
    """
    for part in ("tokenizer", "recognizer"):  # as they were frozen, byte for byte: the siblings know their hash
        shutil.rmtree(out / part, ignore_errors=True)
        shutil.copytree(runs / "frozen" / part, out / part)
    Vocabulary.load(runs / "vocabulary").save(out / "vocabulary")
    trained = runs / "flow-voice" / "final" / "flow"
    flow = load_component(trained, Flow, FlowConfig)
    save_component(out / "decoder" / "flow", flow, flow.config, extra=read_extra(trained), dtype=torch.float16)
    vocoder = load_component(runs / "vocoder" / "final" / "vocoder", Vocoder, VocoderConfig)
    save_component(out / "decoder" / "vocoder", vocoder, vocoder.config, dtype=torch.float16)
    language = runs / "chat" / "final" / "language"
    save_language(out / "language", load_language(language), load_siblings(language), dtype="float16")
    Card("pocket", trained=True, sampling=Sampling(temperature=0.0, max_tokens=600)).save(out)
    size = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    if size > MAX_BYTES:
        raise ValueError(
            f"the weights in {out} are {size / 2**20:.1f} MB, over the {MAX_BYTES // 2**20} MB that may ship"
        )
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/pocket"))
    parser.add_argument("--out", type=Path, default=Path("src/duologue/pocket"))
    args = parser.parse_args()
    print(f"{args.out}: {assemble(args.runs, args.out) / 2**20:.1f} MB of weights")


if __name__ == "__main__":
    main()
