"""Freezes the speech tokenizer: everything behind it is trained on its codes, so it changes never again.

    python -m recipes.pocket.freeze --run runs/pocket/tokenizer --out runs/pocket/frozen

The weights are rounded to half precision here, before any code is made, so that what ships gives the same codes.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from duologue.checkpoint import load_component, save_component
from duologue.tokenizer.recognizer import Recognizer, RecognizerConfig
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from duologue.training.curves import read_log

MAX_WER = 0.25
MIN_USAGE = 0.6


def freeze(run: Path, out: Path, max_wer: float = MAX_WER, min_usage: float = MIN_USAGE) -> None:
    """Writes `out/tokenizer` and `out/recognizer` of a finished run that passes the gate.

    Raises:
        ValueError: the word error rate of validation speech or the use of the codebook is not good enough.
    """
    curves = read_log(run)
    wer, usage = (curves[f"valid/{name}"][-1][1] for name in ("wer", "codebook_usage_ema"))
    if wer > max_wer or usage < min_usage:
        raise ValueError(
            f"{run} does not pass the gate: word error rate {wer:.3f} (at most {max_wer}), codebook usage {usage:.2f} "
            f"(at least {min_usage}); train longer"
        )
    shutil.rmtree(out, ignore_errors=True)
    tokenizer = load_component(run / "final" / "tokenizer", SpeechTokenizer, SpeechTokenizerConfig)
    save_component(out / "tokenizer", tokenizer, tokenizer.config, dtype=torch.float16)
    recognizer = load_component(run / "final" / "recognizer", Recognizer, RecognizerConfig)
    save_component(out / "recognizer", recognizer, recognizer.config, dtype=torch.float16)
    print(f"frozen: word error rate {wer:.3f}, codebook usage {usage:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/pocket/tokenizer"))
    parser.add_argument("--out", type=Path, default=Path("runs/pocket/frozen"))
    parser.add_argument("--max-wer", type=float, default=MAX_WER)
    parser.add_argument("--min-usage", type=float, default=MIN_USAGE)
    args = parser.parse_args()
    freeze(args.run, args.out, args.max_wer, args.min_usage)


if __name__ == "__main__":
    main()
