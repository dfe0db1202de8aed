"""The recognizer: training losses that keep text, loudness and pitch in the codes, and transcription.

It holds transformer layers after the quantizer and a speech-recognition decoder (arXiv:2412.02612). Two auxiliary CTC
heads read the codes and the frames before pooling. A linear probe predicts loudness and pitch. The server also
transcribes user speech with it.

Shapes: B batch, T speech tokens, N characters, D width, V characters of the alphabet plus one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from duologue.layers import Padded, attention_mask, sinusoids
from duologue.tokenizer.encoder import EncoderLayer

ALPHABET = " 'abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class HeardToken:
    """A piece of a transcript.

    Attributes:
        text: characters, blanks included; the texts of all tokens in a row are the transcript.
        logprob: log probability of the token after those before it.
    """

    text: str
    logprob: float


def joined(tokens: Iterable[HeardToken]) -> str:
    """Returns the transcript of tokens, with single blanks between words."""
    return " ".join("".join(token.text for token in tokens).split())


@dataclass(frozen=True)
class RecognizerConfig:
    """Sizes and alphabet of the recognizer.

    Attributes:
        num_layers: layers after the quantizer (released: 16), over the whole utterance.
        num_decoder_layers: layers of the autoregressive decoder.
        chars_per_token: CTC frames per speech token, enough for fast speech at 12.5 tokens/s.
        alphabet: characters; index 0 is CTC's blank and the decoder's start and end.
        phones: symbols of the head on frames before pooling; empty for the alphabet.
    """

    width: int = 256
    num_heads: int = 4
    ffn_dim: int = 1024
    num_layers: int = 2
    num_decoder_layers: int = 2
    chars_per_token: int = 3
    max_tokens: int = 375
    max_chars: int = 512
    alphabet: str = ALPHABET
    phones: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecognizerLosses:
    asr: Tensor
    ctc: Tensor
    frame_ctc: Tensor
    prosody: Tensor


class Recognizer(nn.Module):
    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__()
        self.config = config
        width, num_symbols = config.width, len(config.alphabet) + 1
        self.embed_positions2 = nn.Embedding(config.max_tokens, width)
        self.embed_positions2.weight.requires_grad_(False).copy_(sinusoids(config.max_tokens, width))
        self.layers = nn.ModuleList(
            EncoderLayer(width, config.num_heads, config.ffn_dim) for _ in range(config.num_layers)
        )
        self.layer_norm = nn.LayerNorm(width)
        self.ctc = nn.Linear(width, config.chars_per_token * num_symbols)
        self.frame_ctc = nn.Linear(width, len(config.phones or config.alphabet) + 1)
        self.embed_chars = nn.Embedding(num_symbols, width)
        self.embed_char_positions = nn.Embedding(config.max_chars, width)
        self.embed_char_positions.weight.requires_grad_(False).copy_(sinusoids(config.max_chars, width))
        decoder_layer = nn.TransformerDecoderLayer(
            width, config.num_heads, config.ffn_dim, 0.0, functional.gelu, batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(decoder_layer, config.num_decoder_layers, nn.LayerNorm(width))
        self.characters = nn.Linear(width, num_symbols)
        self.prosody = nn.Linear(width, 3)

    def encode_text(self, text: str) -> list[int]:
        """Returns characters as indices from 1; unknown ones are dropped."""
        return [self.config.alphabet.index(char) + 1 for char in text.lower() if char in self.config.alphabet]

    def decode_text(self, symbols: list[int]) -> str:
        return " ".join("".join(self.config.alphabet[symbol - 1] for symbol in symbols if symbol).split())

    def memory(self, values: Padded) -> Padded:
        """Encodes quantized vectors (B, T, D), T at most 375, for the heads."""
        positions = self.embed_positions2.weight[: values.values.shape[1]]
        x = Padded(values.values + positions, values.lengths)
        mask = attention_mask(torch.zeros_like(x.lengths), x, 0, torch.zeros_like)
        for layer in self.layers:
            x = layer.step(x, layer.init_cache(len(x.lengths)), mask)  # type: ignore[operator]
        return Padded(self.layer_norm(x.values), x.lengths)

    def losses(self, values: Padded, frames: Padded, text: Padded, sounds: Padded, prosody: Tensor) -> RecognizerLosses:
        """Returns the training losses.

        Args:
            values: quantized vectors (B, T, D).
            frames: vectors before pooling and quantization (B, 4 T, D).
            text: (B, N) characters from `encode_text`.
            sounds: (B, N) targets of the frames: phones from 1, or characters.
            prosody: (B, T, 3) level in bels, log2 of F0 / 100 Hz, and voicing (0 or 1).
        """
        memory = self.memory(values)
        ctc = _ctc_loss(self._ctc_log_probs(memory), memory.lengths * self.config.chars_per_token, text)
        frame_ctc = _ctc_loss(self.frame_ctc(frames.values).float().log_softmax(-1), frames.lengths, sounds)
        start = text.values.new_zeros(len(text.lengths), 1)
        logits = self._decode(torch.cat([start, text.values], 1), memory)
        target = torch.cat([text.zeroed().values, start], 1)
        valid = torch.arange(target.shape[1], device=target.device) <= text.lengths[:, None]
        asr = functional.cross_entropy(logits[valid], target[valid])
        predicted, mask = self.prosody(values.values).float(), values.mask
        error = (predicted - prosody).square()
        error = torch.stack([error[..., 0], error[..., 1] * prosody[..., 2], error[..., 2]], -1)
        return RecognizerLosses(asr, ctc, frame_ctc, error[mask].mean())

    @torch.inference_mode()
    def transcribe(self, values: Padded) -> list[str]:
        """Transcribes quantized vectors (B, T, D) greedily with the attention decoder."""
        return [joined(tokens) for tokens in self.transcribe_tokens(values)]

    @torch.inference_mode()
    def transcribe_tokens(self, values: Padded) -> list[list[HeardToken]]:
        """Transcribes as `transcribe` does; returns the characters with their log probabilities."""
        memory = self.memory(values)
        steps = _CachedDecoder(self, memory)
        best = torch.zeros(len(values.lengths), dtype=torch.int64, device=values.values.device)
        done = values.lengths == 0
        symbols: list[Tensor] = []
        scores: list[Tensor] = []
        limit = min(self.config.max_chars - 1, 4 + 4 * int(values.lengths.max()))
        while len(symbols) < limit and not bool(done.all()):
            score, best = steps.step(best).log_softmax(-1).max(-1)
            best = best * ~done
            done = done | (best == 0)
            symbols.append(best)
            scores.append(score)
        if not symbols:
            return [[] for _ in range(len(values.lengths))]
        rows = zip(torch.stack(symbols, 1).tolist(), torch.stack(scores, 1).tolist(), strict=True)
        alphabet = self.config.alphabet
        return [
            [HeardToken(alphabet[symbol - 1], score) for symbol, score in zip(*row, strict=True) if symbol]
            for row in rows
        ]

    def _ctc_log_probs(self, memory: Padded) -> Tensor:
        logits: Tensor = self.ctc(memory.values).float().unflatten(-1, (self.config.chars_per_token, -1))
        return logits.flatten(1, 2).log_softmax(-1)  # (B, T * chars_per_token, V)

    def _decode(self, symbols: Tensor, memory: Padded) -> Tensor:
        """Returns teacher-forced logits (B, N, V) for symbols (B, N)."""
        x = self.embed_chars(symbols) + self.embed_char_positions.weight[: symbols.shape[1]]
        future = torch.ones(symbols.shape[1], symbols.shape[1], dtype=torch.bool, device=x.device).triu(1)
        x = self.decoder(x, memory.values, tgt_mask=future, memory_key_padding_mask=~_seen(memory))
        return self.characters(x).float()  # type: ignore[no-any-return]


class _CachedDecoder:
    """The attention decoder with a KV cache, one character per step, for inference."""

    def __init__(self, recognizer: Recognizer, memory: Padded) -> None:
        self._recognizer = recognizer
        self._layers: list[Any] = list(recognizer.decoder.layers)
        self._norm: Any = recognizer.decoder.norm
        self._heads = recognizer.config.num_heads
        self._mask = _seen(memory)[:, None, None]  # (B, 1, 1, T)
        width = recognizer.config.width
        self._memory = []
        for layer in self._layers:
            weight, bias = layer.multihead_attn.in_proj_weight, layer.multihead_attn.in_proj_bias
            keys, values = functional.linear(memory.values, weight[width:], bias[width:]).chunk(2, -1)
            self._memory.append((self._split(keys), self._split(values)))
        self._past: list[tuple[Tensor, Tensor] | None] = [None] * len(self._layers)
        self._position = 0

    def step(self, symbols: Tensor) -> Tensor:
        """Returns the logits (B, V) after the last characters (B,)."""
        recognizer, width = self._recognizer, self._recognizer.config.width
        x = (recognizer.embed_chars(symbols) + recognizer.embed_char_positions.weight[self._position])[:, None]
        self._position += 1
        for index, layer in enumerate(self._layers):
            own = layer.self_attn
            projected = functional.linear(layer.norm1(x), own.in_proj_weight, own.in_proj_bias)
            query, key, value = map(self._split, projected.chunk(3, -1))
            if (past := self._past[index]) is not None:
                key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
            self._past[index] = key, value
            x = x + own.out_proj(self._join(functional.scaled_dot_product_attention(query, key, value)))
            cross = layer.multihead_attn
            query = self._split(
                functional.linear(layer.norm2(x), cross.in_proj_weight[:width], cross.in_proj_bias[:width])
            )
            seen = functional.scaled_dot_product_attention(query, *self._memory[index], attn_mask=self._mask)
            x = x + cross.out_proj(self._join(seen))
            x = x + layer.linear2(functional.gelu(layer.linear1(layer.norm3(x))))
        logits: Tensor = recognizer.characters(self._norm(x)).float()[:, 0]
        return logits

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self._heads, -1))  # (B, T, H, D / H)
        return heads.transpose(1, 2)

    def _join(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


def _seen(memory: Padded) -> Tensor:
    """Returns the decoder's memory mask, bool (B, T). Empty rows see their first position, so that softmax has no empty
    row."""
    return memory.mask | (torch.arange(memory.values.shape[1], device=memory.values.device) == 0)


def _ctc_loss(log_probs: Tensor, lengths: Tensor, text: Padded) -> Tensor:
    """Returns the CTC loss of log_probs (B, T, V); a clip too short for its text counts 0."""
    return functional.ctc_loss(log_probs.transpose(0, 1), text.values, lengths, text.lengths, zero_infinity=True)
