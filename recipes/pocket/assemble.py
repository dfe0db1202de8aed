"""Puts the trained parts of pocket into one model folder, which ships in the package.

All parts are stored in int8.

    python -m recipes.pocket.assemble --runs runs/pocket --out src/duologue/pocket
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from duologue.checkpoint import file_hash, load_component, read_extra, save_component
from duologue.decoder.encoder import TokenEncoderConfig
from duologue.decoder.flow import Flow, FlowConfig
from duologue.decoder.transformer import EstimatorConfig
from duologue.decoder.vocoder import Vocoder, VocoderConfig
from duologue.language.backbone import (
    LanguageConfig,
    Provenance,
    load_language,
    load_provenance,
    new_glm,
    save_language,
)
from duologue.language.sampling import Sampling
from duologue.models import Card
from duologue.tokenizer.speech_recognizer import load_speech_recognizer, save_speech_recognizer
from duologue.vocabulary import Vocabulary

QUESTIONS = (
    "What is the capital of France?",
    "What is eight plus six?",
    "What is the opposite of big?",
    "What day comes after Thursday?",
    "Who are you?",
)
MAX_BYTES = 42_000_000


def assemble(runs: Path, out: Path, untrained: bool = False, max_tokens: int = 600) -> int:
    """Writes the model folder and returns its size in bytes. Recorded questions in `out` are kept.

    Args:
        untrained: flow and language model may be missing; small random ones take their place, and the card says so.
        max_tokens: default maximum tokens of a reply.

    Raises:
        ValueError: a part is missing or damaged, or their total size exceeds 42 MB.
    """
    for part in ("tokenizer", "recognizer"):
        shutil.rmtree(out / part, ignore_errors=True)
    # As it was frozen, byte for byte: the provenance of the other parts has its hash.
    shutil.copytree(runs / "frozen" / "tokenizer", out / "tokenizer")
    distilled = runs / "recognizer" / "final" / "recognizer"
    recognizer = load_speech_recognizer(distilled if distilled.is_dir() else runs / "frozen" / "recognizer")
    save_speech_recognizer(out / "recognizer", recognizer, torch.int8)
    vocabulary = Vocabulary.load(runs / "vocabulary")
    vocabulary.save(out / "vocabulary")
    provenance = Provenance(file_hash(out / "tokenizer"), vocabulary.hash)
    vocoder = load_component(runs / "vocoder" / "final" / "vocoder", Vocoder, VocoderConfig)
    save_component(out / "decoder" / "vocoder", vocoder, vocoder.config, dtype=torch.int8)
    missing = []
    trained = runs / "flow-voice" / "final" / "flow"
    if untrained and not trained.exists():
        missing.append("flow")
        flow, extra = _random_flow(vocabulary.codebook_size), {"tokenizer": provenance.tokenizer}
    else:
        flow, extra = load_component(trained, Flow, FlowConfig), read_extra(trained)
    save_component(out / "decoder" / "flow", flow, flow.config, extra=extra, dtype=torch.int8)
    language = runs / "chat" / "final" / "language"
    if untrained and not language.exists():
        missing.append("language")
        model = new_glm(vocabulary, LanguageConfig(64, 2, 2, 1, 32, 128))
    else:
        model, provenance = load_language(language), load_provenance(language)
    save_language(out / "language", model, provenance, dtype="int8")
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens)
    Card("pocket", trained=not missing, sampling=sampling, questions=QUESTIONS).save(out)
    size = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    if size > MAX_BYTES:
        raise ValueError(
            f"the weights in {out} are {size / 1e6:.1f} MB, over the {MAX_BYTES // 10**6} MB that may ship"
        )
    return size


def _random_flow(codebook_size: int) -> Flow:
    encoder = TokenEncoderConfig(codebook_size=codebook_size, width=32, num_heads=2, ffn_dim=64, num_layers=1)
    estimator = EstimatorConfig(width=32, num_heads=2, ffn_dim=64, num_layers=1)
    return Flow(FlowConfig(encoder=encoder, estimator=estimator))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/pocket"))
    parser.add_argument("--out", type=Path, default=Path("src/duologue/pocket"))
    parser.add_argument("--untrained", action="store_true", help="put random parts where none is trained yet")
    parser.add_argument("--max-tokens", type=int, default=600, help="of a reply (default: 600)")
    args = parser.parse_args()
    size = assemble(args.runs, args.out, args.untrained, args.max_tokens)
    print(f"{args.out}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
