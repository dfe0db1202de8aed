"""The recognition side of the tokenizer's training: Whisper's upper encoder layers and its text decoder, on the codes.

The tokenizer learns its codes by speech recognition through the quantizer (arXiv 2412.02612, section 2.1): the encoder
layers after the quantizer and the text decoder are Whisper's own. A linear probe for level and pitch keeps prosody in
the codes, which recognition alone would discard. Parameter names of the decoder are those of transformers' Whisper.

Shapes: B batch, T speech tokens, N text ids, D width, H heads, V text vocabulary.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional

from duologue.checkpoint import load_component, save_component
from duologue.config import read_json, write_json
from duologue.layers import Padded, attention_mask, sinusoids, weigh
from duologue.tokenizer.encoder import EncoderLayer, attention_weights
from duologue.tokenizer.recognizer import HeardToken, joined

TEXT_FILE = "tokenizer.json"
KEPT_FILE = "text_ids.json"
_EMBEDDINGS = "decoder.embed_tokens.weight"
_PROMPT_ID = re.compile(r"<\|[^\d|]+\|>$")  # no time stamps
_MULTILINGUAL_VOCAB = 51865  # OpenAI's rule: a smaller vocabulary belongs to an English-only model


@dataclass(frozen=True)
class SpeechRecognizerConfig:
    """Sizes of the recognition side.

    Attributes:
        num_layers: encoder layers after the quantizer (released: 16).
        num_decoder_layers: layers of the text decoder.
        vocab_size: text ids, special ids included.
        max_tokens: speech tokens of one 30 s piece.
        max_text: text ids of one piece, the prompt included.
        rescale: one scale and offset per channel before the first layer, for a quantizer that normalizes its input.
        num_end: learned vectors that the text decoder reads after the last speech token. They stand for the silence
            with which Whisper pads every clip to 30 s; without it the decoder repeats itself at the end of a clip.
        ids_per_token: maximum text ids for each speech token, beside eight for the clip. A decoder that repeats itself
            is stopped there. Fast English has less than 2/3; scripts that are written in single bytes need up to 2.
    """

    width: int
    num_heads: int
    ffn_dim: int
    num_layers: int
    num_decoder_layers: int
    decoder_heads: int
    decoder_ffn_dim: int
    vocab_size: int
    max_tokens: int = 375
    max_text: int = 448
    rescale: bool = False
    num_end: int = 0
    ids_per_token: float = 2 / 3


class TextDecoderLayer(nn.Module):
    """Whisper's pre-norm decoder layer: causal self-attention, attention over the sound, feed-forward."""

    def __init__(self, width: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.self_attn = attention_weights(width)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.encoder_attn = attention_weights(width)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def sound(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> keys and values of the attention over the sound, each (B, H, T, D / H)."""
        return self._heads(self.encoder_attn["k_proj"](memory)), self._heads(self.encoder_attn["v_proj"](memory))

    def forward(
        self,
        x: Tensor,
        sound: tuple[Tensor, Tensor],
        audible: Tensor,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Args:
            x: (B, N, D) new positions.
            sound: from `sound`.
            audible: (B, 1, 1, T) bool, speech tokens that count.
            past: keys and values of earlier positions.

        Returns:
            (B, N, D) and the keys and values of all positions so far.
        """
        h = self.self_attn_layer_norm(x)
        query, key, value = (self._heads(self.self_attn[name](h)) for name in ("q_proj", "k_proj", "v_proj"))
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        num_new, num_known = x.shape[1], key.shape[2]
        causal = torch.ones(num_new, num_known, dtype=torch.bool, device=x.device).tril(num_known - num_new)
        x = x + self.self_attn["out_proj"](_joined(weigh(query, key, value, causal)))
        query = self._heads(self.encoder_attn["q_proj"](self.encoder_attn_layer_norm(x)))
        x = x + self.encoder_attn["out_proj"](_joined(weigh(query, *sound, audible)))
        return x + self.fc2(functional.gelu(self.fc1(self.final_layer_norm(x)))), (key, value)

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1))  # (B, N, H, D / H)
        return heads.transpose(1, 2)


class TextDecoder(nn.Module):
    """Whisper's text decoder: ids (B, N) and sound (B, T, D) -> hidden states (B, N, D); the output layer is tied."""

    def __init__(self, config: SpeechRecognizerConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.embed_positions = nn.Embedding(config.max_text, config.width)
        self.layers = nn.ModuleList(
            TextDecoderLayer(config.width, config.decoder_heads, config.decoder_ffn_dim)
            for _ in range(config.num_decoder_layers)
        )
        self.layer_norm = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor, memory: Padded) -> Tensor:
        """Teacher forcing: hidden states from which `logits` predicts the id after each position."""
        x = self.embed_tokens(ids) + self.embed_positions.weight[: ids.shape[1]]
        audible = _audible(memory)
        for layer in self.layers:
            x, _ = layer(x, layer.sound(memory.values), audible)  # type: ignore[operator]
        hidden: Tensor = self.layer_norm(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32."""
        return functional.linear(hidden, self.embed_tokens.weight).float()

    @torch.inference_mode()
    def greedy(
        self, prompt: Tensor, memory: Padded, end: int, suppressed: Tensor, limits: Tensor
    ) -> list[list[tuple[int, float]]]:
        """Most likely ids and their log probabilities after a prompt (N,) for every row, without the end.

        Args:
            suppressed: (S,) ids that are never chosen.
            limits: (B,) most ids of each row.
        """
        batch, audible = len(memory.lengths), _audible(memory)
        sounds = [layer.sound(memory.values) for layer in self.layers]  # type: ignore[operator]
        past: list[tuple[Tensor, Tensor] | None] = [None] * len(self.layers)
        ids, position = prompt.expand(batch, -1), 0
        done = limits <= 0
        chosen: list[Tensor] = []
        scored: list[Tensor] = []
        room = min(len(self.embed_positions.weight) - len(prompt), int(limits.max()))
        while len(chosen) < room and not bool(done.all()):
            x = self.embed_tokens(ids) + self.embed_positions.weight[position : position + ids.shape[1]]
            position += ids.shape[1]
            for index, layer in enumerate(self.layers):
                x, past[index] = layer(x, sounds[index], audible, past[index])
            scores = self.logits(self.layer_norm(x[:, -1]))
            scores[:, suppressed] = -torch.inf
            score, likely = scores.log_softmax(-1).max(-1)
            best = torch.where(done | (limits <= len(chosen)), end, likely)
            done = done | (best == end)
            chosen.append(best)
            scored.append(score)
            ids = best[:, None]
        if not chosen:
            return [[] for _ in range(batch)]
        rows = zip(torch.stack(chosen, 1).tolist(), torch.stack(scored, 1).tolist(), strict=True)
        return [list(takewhile(lambda pair: pair[0] != end, zip(*row, strict=True))) for row in rows]


@dataclass(frozen=True)
class RecognitionLosses:
    """Losses of the recognition side.

    Attributes:
        asr: mean cross-entropy of the text ids, with the end.
        prosody: mean squared error of level, pitch and voicing.
    """

    asr: Tensor
    prosody: Tensor


class SpeechRecognizer(nn.Module):
    """Quantized vectors (B, T, D) -> text.

    Attributes:
        text: the BPE of its text ids; `transcribe` needs it. `load_speech_recognizer` sets it.
    """

    text: WhisperText

    def __init__(self, config: SpeechRecognizerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        if config.rescale:
            self.scale = nn.Parameter(torch.ones(width))
            self.offset = nn.Parameter(torch.zeros(width))
        self.embed_positions2 = nn.Embedding(config.max_tokens, width)
        self.embed_positions2.weight.requires_grad_(False).copy_(sinusoids(config.max_tokens, width))
        self.layers = nn.ModuleList(
            EncoderLayer(width, config.num_heads, config.ffn_dim) for _ in range(config.num_layers)
        )
        self.layer_norm = nn.LayerNorm(width)
        self.end = nn.Parameter(torch.zeros(config.num_end, width))
        self.decoder = TextDecoder(config)
        self.prosody = nn.Linear(width, 3)

    def memory(self, values: Padded) -> Padded:
        """Quantized vectors (B, T, D), T at most `max_tokens` -> output of the encoder's upper layers (B, T, D)."""
        x = values.values
        if self.config.rescale:
            x = x * self.scale + self.offset
        padded = Padded(x + self.embed_positions2.weight[: x.shape[1]], values.lengths)
        mask = attention_mask(torch.zeros_like(padded.lengths), padded, 0, torch.zeros_like)
        for layer in self.layers:
            padded = layer.step(padded, layer.init_cache(len(padded.lengths)), mask)  # type: ignore[operator]
        return Padded(self.layer_norm(padded.values), padded.lengths)

    def readable(self, memory: Padded) -> Padded:
        """Output of `memory` (B, T, D) with the learned end after each row's last vector: what the decoder reads."""
        if not self.config.num_end:
            return memory
        end = self.end.to(memory.values.dtype).expand(len(memory.lengths), -1, -1)
        return Padded.concat([memory, Padded.full(end)])

    def losses(
        self, values: Padded, memory: Padded, text: Padded, num_prompt: Tensor, prosody: Tensor
    ) -> RecognitionLosses:
        """Args:
        values: quantized vectors (B, T, D).
        memory: `memory(values)`.
        text: ids (B, N) from `WhisperText.encode`.
        num_prompt: (B,) ids of the prompt, which are not trained.
        prosody: (B, T, 3) level in bels, log2 of F0 over 100 Hz, and voicing (0 or 1; F0 counts where it is 1).
        """
        asr = functional.cross_entropy(*self.text_logits(memory, text, num_prompt))
        error = (self.prosody(values.values).float() - prosody).square()
        error = torch.stack([error[..., 0], error[..., 1] * prosody[..., 2], error[..., 2]], -1)
        return RecognitionLosses(asr, error[values.mask].mean())

    def text_logits(self, memory: Padded, text: Padded, num_prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, V) float32 of all text ids behind the prompts, the end included, and these ids (N,).

        The arguments are those of `losses`.
        """
        hidden = self.decoder(text.values[:, :-1], self.readable(memory))
        place = torch.arange(text.values.shape[1] - 1, device=hidden.device)
        trained = (place >= num_prompt[:, None] - 1) & (place < text.lengths[:, None] - 1)
        return self.decoder.logits(hidden[trained]), text.values[:, 1:][trained]

    @torch.inference_mode()
    def transcribe(self, values: Padded, language: str = "en") -> list[str]:
        """Greedy text of quantized vectors (B, T, D)."""
        return [joined(tokens) for tokens in self.transcribe_tokens(values, language)]

    @torch.inference_mode()
    def transcribe_tokens(self, values: Padded, language: str = "en") -> list[list[HeardToken]]:
        """Greedy pieces of text of quantized vectors (B, T, D) with their log probabilities."""
        memory, text = self.memory(values), self.text
        limits = torch.where(values.lengths > 0, 8 + (values.lengths * self.config.ids_per_token).long(), 0)
        prompt, suppressed = (torch.tensor(ids, device=limits.device) for ids in (text.prompt(language), text.special))
        rows = self.decoder.greedy(prompt, self.readable(memory), text.end, suppressed[suppressed != text.end], limits)
        return [text.pieces(row) for row in rows]


def save_speech_recognizer(folder: Path, recognizer: SpeechRecognizer, dtype: torch.dtype | None = None) -> None:
    """Writes a component's folder with `tokenizer.json` in it; arguments as those of `save_component`."""
    save_component(folder, recognizer, recognizer.config, dtype=dtype)
    recognizer.text.save(folder)


def load_speech_recognizer(folder: str | Path) -> SpeechRecognizer:
    """Reads what `save_speech_recognizer` wrote. Raises ValueError as `load_component`."""
    recognizer = load_component(folder, SpeechRecognizer, SpeechRecognizerConfig)
    recognizer.text = WhisperText.open(folder, recognizer.config.vocab_size)
    return recognizer


def prune_text(recognizer: SpeechRecognizer, texts: Iterable[str], most: int | None = None) -> SpeechRecognizer:
    """Returns a recognizer with the text ids of these texts, of single bytes and of the prompts alone.

    More than half of a small Whisper are embeddings of text ids. Words of other ids can only be written in the pieces
    that are left.

    Args:
        most: maximum number of ids of the texts; the most frequent are kept.
    """
    text = recognizer.text.pruned(texts, most)
    config = replace(recognizer.config, vocab_size=len(text.kept))
    small = SpeechRecognizer(config)
    weights = recognizer.state_dict()
    weights[_EMBEDDINGS] = weights[_EMBEDDINGS][torch.tensor(text.kept)]
    small.load_state_dict(weights)
    small.text = text
    return small.eval()


class WhisperText:
    """Whisper's byte-level BPE with its prompts, from the `tokenizer.json` of a Whisper folder.

    Args:
        vocab_size: text ids of the whole Whisper, which tell an English-only model from a multilingual one.
        kept: ids of Whisper that the model has, in their order; None for all. Its own ids count these.

    Attributes:
        kept: id of Whisper for each own id.
    """

    def __init__(self, path: str | Path, vocab_size: int, kept: Sequence[int] | None = None) -> None:
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path} is missing; a Whisper folder holds its text tokenizer there")
        self._path, self._bpe, self._vocab_size = path, Tokenizer.from_file(str(path)), vocab_size
        self.kept = list(range(vocab_size) if kept is None else kept)
        self._own = {whole: own for own, whole in enumerate(self.kept)}
        self.multilingual = vocab_size >= _MULTILINGUAL_VOCAB
        self.end = self._id("<|endoftext|>")
        self.special = [own for own, whole in enumerate(self.kept) if whole >= self.kept[self.end]]

    @staticmethod
    def open(folder: str | Path, vocab_size: int) -> WhisperText:
        """Reads what `save` wrote; `vocab_size` is that of the model.

        Raises:
            ValueError: a file is missing or damaged, or the ids are not those of the model.
        """
        kept_file = Path(folder) / KEPT_FILE
        if not kept_file.exists():
            return WhisperText(Path(folder) / TEXT_FILE, vocab_size)
        data = read_json(kept_file)
        kept, whole = data.get("kept"), data.get("vocab_size")
        if not (
            isinstance(whole, int)
            and isinstance(kept, list)
            and len(kept) == vocab_size
            and all(isinstance(one, int) and 0 <= one < whole for one in kept)
        ):
            raise ValueError(f"{kept_file} does not hold the {vocab_size} text ids of the model beside it")
        return WhisperText(Path(folder) / TEXT_FILE, whole, kept)

    def pruned(self, texts: Iterable[str], most: int | None = None) -> WhisperText:
        """Returns the tokenizer of the most frequent ids of these texts, of single bytes and of all prompts."""
        counts = Counter(
            self._own[whole]
            for text in texts
            for whole in self._bpe.encode(" " + text.strip(), add_special_tokens=False).ids
        )
        used = {own for own, _ in counts.most_common(most)}
        bytes_ = {self._bpe.token_to_id(char) for char in pre_tokenizers.ByteLevel.alphabet()}
        names = {self._bpe.token_to_id(name) for name in self._bpe.get_vocab() if _PROMPT_ID.match(name)}
        used |= {own for own, whole in enumerate(self.kept) if whole in bytes_ | names}
        return WhisperText(self._path, self._vocab_size, sorted(self.kept[own] for own in used))

    def prompt(self, language: str = "en") -> list[int]:
        """Ids before the text of a transcript without time stamps. Raises ValueError for an unknown language."""
        task = [self._id(f"<|{language}|>"), self._id("<|transcribe|>")] if self.multilingual else []
        return [self._id("<|startoftranscript|>"), *task, self._id("<|notimestamps|>")]

    def encode(self, text: str, language: str = "en") -> list[int]:
        """Prompt, text and end; Whisper's texts begin with a space."""
        ids = self._bpe.encode(" " + text.strip(), add_special_tokens=False).ids
        if lost := [whole for whole in ids if whole not in self._own]:
            raise ValueError(f"the model has no text id for {self._bpe.decode(lost[:1])!r} of {text!r}: it was pruned")
        return [*self.prompt(language), *(self._own[whole] for whole in ids), self.end]

    def decode(self, ids: list[int]) -> str:
        text: str = self._bpe.decode([self.kept[own] for own in ids], skip_special_tokens=True)
        return text.strip()

    def pieces(self, ids: Sequence[tuple[int, float]]) -> list[HeardToken]:
        """Returns the text of ids with log probabilities. Ids that end within a character count to the next one."""
        found: list[HeardToken] = []
        done, logprob = "", 0.0
        for count in range(1, len(ids) + 1):
            whole = self._bpe.decode([self.kept[own] for own, _ in ids[:count]], skip_special_tokens=True)
            logprob += ids[count - 1][1]
            if whole.endswith("\N{REPLACEMENT CHARACTER}") and count < len(ids):
                continue
            if whole != done:
                found.append(HeardToken(whole[len(done) :], logprob))
                done, logprob = whole, 0.0
        return found

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` into a folder, and `text_ids.json` where ids were pruned."""
        (folder / KEPT_FILE).unlink(missing_ok=True)
        if len(self.kept) == self._vocab_size:
            self._bpe.save(str(folder / TEXT_FILE))
        else:
            (folder / TEXT_FILE).write_text(_with_ids(self._bpe, self.kept), encoding="utf-8")
            write_json(folder / KEPT_FILE, {"vocab_size": self._vocab_size, "kept": self.kept}, compact=True)

    def _id(self, name: str) -> int:
        found = self._bpe.token_to_id(name)
        if found is None:
            raise ValueError(f"{self._path} has no id for {name!r}, which Whisper's prompts need")
        return self._own[int(found)]


def _with_ids(bpe: Tokenizer, kept: Sequence[int]) -> str:
    """Returns the JSON of a byte-level BPE with these ids alone, and the ids that they are merged from.

    A text of these ids is encoded as before, because each of its merges is kept.
    """
    data = json.loads(bpe.to_str())
    model, ids = data["model"], set(kept)
    parts = {first + second: (first, second) for first, second in model["merges"]}
    needed = [token for token, one in model["vocab"].items() if one in ids]
    known = set(needed)
    for token in needed:
        new = [part for part in parts.get(token, ()) if part not in known]
        needed += new
        known.update(new)
    model["vocab"] = {token: one for token, one in model["vocab"].items() if token in known}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in known]
    data["added_tokens"] = [one for one in data["added_tokens"] if one["id"] in ids]
    # The library numbers added tokens anew unless the model has them.
    model["vocab"] |= {one["content"]: one["id"] for one in data["added_tokens"]}
    return json.dumps(data, ensure_ascii=False)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _audible(memory: Padded) -> Tensor:
    """bool (B, 1, 1, T). A row without sound attends to its first position, so that no softmax is empty."""
    first = torch.arange(memory.values.shape[1], device=memory.values.device) == 0
    return (memory.mask | first)[:, None, None]
