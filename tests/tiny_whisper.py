"""A Whisper folder in transformers' format with random weights and a small byte-level BPE."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import WhisperConfig, WhisperForConditionalGeneration

SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|transcribe|>", "<|notimestamps|>")
TEXTS = ["What is seven plus five?", "The capital of France is Paris.", "it is three", "你好"]


def write_tiny_whisper(folder: Path, num_layers: int = 3) -> Path:
    """Writes `config.json`, `model.safetensors` and `tokenizer.json` of an English-only model of width 32."""
    torch.manual_seed(0)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    bpe.add_special_tokens(list(SPECIAL))
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
