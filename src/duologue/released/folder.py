"""A set of the three released parts, identified by content and checked by headers.

any folder/  a speech tokenizer  config.json with `quantize_vocab_size`
             a language model    config.json of a ChatGLM, or the result of `duologue convert`
             a decoder           config.yaml with flow and hift weights
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import torch

from duologue.config import read_json
from duologue.released.decoder.decoder import ReleasedDecoder, load_released_decoder
from duologue.released.decoder.flow import ReleasedFlowConfig
from duologue.released.decoder.folder import CONFIG_FILE as DECODER_FILE
from duologue.released.decoder.folder import read_decoder_config
from duologue.released.decoder.hift import HiFTConfig
from duologue.released.language import ReleasedWeights, is_released, read_released
from duologue.released.text import load_released_vocabulary
from duologue.released.tokenizer import ReleasedSpeechTokenizer, TokenizerFiles, read_released_tokenizer
from duologue.released.weights import LABEL
from duologue.vocabulary import Vocabulary

DECODER_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class ReleasedFolder:
    """A folder with the three released parts. Configs and headers are read once, on demand."""

    path: Path
    tokenizer_path: Path
    language_path: Path
    decoder_path: Path

    @classmethod
    def find(cls, path: str | Path) -> Self | None:
        """Finds the released parts in the subfolders of a folder; returns None if there are none.

        Raises:
            ValueError: a part is missing or ambiguous.
        """
        path = Path(path)
        if not path.is_dir():
            return None
        found: dict[str, list[Path]] = {kind: [] for kind in _KINDS}
        for inside in sorted(inner for inner in path.iterdir() if inner.is_dir()):
            for kind, holds in _KINDS.items():
                if holds(inside):
                    found[kind].append(inside)
        if not any(found.values()):
            return None
        for kind, places in found.items():
            if not places:
                raise ValueError(f"{path} lacks the {kind} of a released set: {_MARKS[kind]}")
            if len(places) > 1:
                raise ValueError(
                    f"{path} holds the {kind} of a released set twice: {places[0].name} and {places[1].name}"
                )
        return cls(path, *(places[0] for places in found.values()))

    @property
    def is_random(self) -> bool:
        """Whether a part has random weights."""
        configs = [read_json(folder / "config.json") for folder in (self.tokenizer_path, self.language_path)]
        return any(config.get(LABEL) for config in configs)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The joint vocabulary of the language model, released or converted."""
        if self.weights is None:
            return Vocabulary.load(self.language_path)
        return load_released_vocabulary(self.language_path)

    def check(self) -> None:
        """Compares configs, headers and codebook sizes without reading weights.

        Raises:
            ValueError: names file and key.
        """
        config, (flow, _) = self._tokenizer.config, self._decoder
        sizes = {
            f"quantize_vocab_size in {self.tokenizer_path / 'config.json'}": config.quantizer.codebook_size,
            f"speech tokens in {self.language_path}": self.vocabulary.codebook_size,
            f"flow.vocab_size in {self.decoder_path / DECODER_FILE}": flow.vocab_size,
        }
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} is {size}" for name, size in sizes.items())
            raise ValueError(f"the codebooks of the parts have unequal sizes: {listed}")

    def load_tokenizer(self, device: str = "cpu") -> ReleasedSpeechTokenizer:
        """Loads the speech tokenizer, float32. Raises ValueError as `released.tokenizer.load_released_tokenizer`."""
        return self._tokenizer.load().to(device)

    def load_decoder(self, device: str = "cpu", dtype: str | None = None) -> ReleasedDecoder:
        """Loads flow and vocoder in evaluation mode.

        Args:
            dtype: of the U-Net, "float32" or "bfloat16"; by default bfloat16 on CUDA, else float32.

        Raises:
            ValueError: as `released.decoder.decoder.load_released_decoder`; an unknown dtype.
        """
        if dtype not in (None, *DECODER_DTYPES):
            raise ValueError(f"unknown decoder_dtype {dtype!r}; the choices are {', '.join(DECODER_DTYPES)}")
        number = getattr(torch, dtype or ("bfloat16" if torch.device(device).type == "cuda" else "float32"))
        return load_released_decoder(self.decoder_path, dtype=number, configs=self._decoder).to(device)

    def load_recognizer(self, device: str = "cpu") -> None:
        """Returns None: the released parts have no recognizer."""

    @cached_property
    def _tokenizer(self) -> TokenizerFiles:
        return read_released_tokenizer(self.tokenizer_path)

    @cached_property
    def weights(self) -> ReleasedWeights | None:
        """ChatGLM weights of the language model; None for a converted model."""
        return read_released(self.language_path) if is_released(self.language_path) else None

    @cached_property
    def _decoder(self) -> tuple[ReleasedFlowConfig, HiFTConfig]:
        return read_decoder_config(self.decoder_path)


def _holds_tokenizer(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and "quantize_vocab_size" in read_json(path)


def _holds_language(folder: Path) -> bool:
    return is_released(folder) or ((folder / "vocabulary.json").is_file() and (folder / "config.json").is_file())


_KINDS: dict[str, Callable[[Path], bool]] = {
    "speech tokenizer": _holds_tokenizer,
    "language model": _holds_language,
    "decoder": lambda folder: (folder / DECODER_FILE).is_file(),
}
_MARKS = {
    "speech tokenizer": "a folder whose config.json has the key 'quantize_vocab_size'",
    "language model": "a folder whose config.json has model_type 'chatglm', or what `duologue convert` wrote",
    "decoder": f"a folder with {DECODER_FILE}",
}
