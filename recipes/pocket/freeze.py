"""Freezes the speech tokenizer. All later stages are trained on its codes, so it never changes again.

    python -m recipes.pocket.freeze --run runs/pocket/tokenizer --out runs/pocket/frozen

The weights are rounded to int8 here, before any code is computed, so the shipped model gives the same codes. The
recognizer keeps only the text ids of the corpora.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from duologue.checkpoint import load_component, save_component
from duologue.config import read_json
from duologue.tokenizer.speech_recognizer import load_speech_recognizer, prune_text, save_speech_recognizer
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from duologue.training.curves import read_log
from duologue.training.data import Clips

# Word error rates of the validation folders that may not be exceeded: five points above the aims of docs/pocket.md.
MAX_WER = {"valid-natural": 0.13, "valid-unseen": 0.20, "valid-warped": 0.20}
MIN_USAGE = 0.6
TEXT_IDS = 6000  # of some 15 000 in the corpora; 384 bytes of the package each


def freeze(run: Path, out: Path, max_wer: float | None = None, min_usage: float = MIN_USAGE) -> None:
    """Writes `out/tokenizer` and `out/recognizer` of a finished run that passes the gate.

    Args:
        max_wer: one bound for every validation folder, instead of `MAX_WER`.

    Raises:
        ValueError: a word error rate or the codebook usage misses the gate.
    """
    last = {name.removeprefix("valid/"): points[-1][1] for name, points in read_log(run).items() if "valid/" in name}
    rates = {name.removeprefix("wer/"): value for name, value in last.items() if name.startswith("wer/")}
    bounds = {name: MAX_WER.get(name, 1.0) if max_wer is None else max_wer for name in rates}
    usage = last["codebook_usage_ema"]
    found = ", ".join(f"word error rate {rates[name]:.3f} of {name} (at most {bounds[name]})" for name in rates)
    if any(rates[name] > bounds[name] for name in rates) or usage < min_usage:
        raise ValueError(
            f"{run} does not pass the gate: {found}, codebook usage {usage:.2f} (at least {min_usage}); train longer"
        )
    shutil.rmtree(out, ignore_errors=True)
    tokenizer = load_component(run / "final" / "tokenizer", SpeechTokenizer, SpeechTokenizerConfig)
    save_component(out / "tokenizer", tokenizer, tokenizer.config, dtype=torch.int8)
    corpora = [Clips(folder) for folder in read_json(run / "recipe.json")["corpora"]]
    texts = (clip.text for clips in corpora for clip in clips.records)
    recognizer = prune_text(load_speech_recognizer(run / "final" / "recognizer"), texts, TEXT_IDS)
    save_speech_recognizer(out / "recognizer", recognizer, torch.int8)
    print(f"frozen: {found}, codebook usage {usage:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/pocket/tokenizer"))
    parser.add_argument("--out", type=Path, default=Path("runs/pocket/frozen"))
    parser.add_argument("--max-wer", type=float, help="one bound for every validation folder")
    parser.add_argument("--min-usage", type=float, default=MIN_USAGE)
    args = parser.parse_args()
    freeze(args.run, args.out, args.max_wer, args.min_usage)


if __name__ == "__main__":
    main()
