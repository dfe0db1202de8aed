"""Models: the parts of one chatbot as they lie in a model folder, loaded and checked against each other.

duologue.json  vocabulary/  tokenizer/  language/  decoder/flow/  decoder/vocoder/

Or a set of released parts, see `released.py`: every function here takes both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from duologue.checkpoint import file_hash, load_component, read_extra, read_kind
from duologue.config import parse_config, read_json, to_mapping, write_json
from duologue.decoder.decoder import SpeechDecoder
from duologue.decoder.flow import Flow, FlowConfig
from duologue.decoder.released import ReleasedDecoder, load_released_decoder
from duologue.decoder.vocoder import Vocoder, VocoderConfig
from duologue.language.backbone import Dtype, Siblings, load_language, load_siblings
from duologue.language.continuous import ContinuousEngine
from duologue.language.engine import Engine, PlainEngine
from duologue.language.quantization import Scheme, check_available, quantize
from duologue.language.released import is_released, load_released_language
from duologue.language.sampling import Sampling
from duologue.layers import Padded
from duologue.released import ReleasedFolders, find_released
from duologue.tokenizer.recognizer import Recognizer, RecognizerConfig
from duologue.tokenizer.released import load_released_tokenizer
from duologue.tokenizer.speech_recognizer import SpeechRecognizer, load_speech_recognizer
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from duologue.vocabulary import Vocabulary

CARD_FILE = "duologue.json"
CARD_VERSION = 1

EngineName = Literal["plain", "continuous"]
DecoderDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Card:
    """What stands on a model folder (`duologue.json`).

    Attributes:
        trained: false for random weights, which are for load tests and say nothing.
        voices: names that a reply's voice can have; the first is the default.
        sampling: how replies are sampled unless told otherwise.
        num_steps, guidance_scale: of the flow's solver; None takes those of its config.
        follows_instructions: whether it was trained with turns of the system; another one is not shown instructions.
    """

    name: str
    trained: bool
    languages: tuple[str, ...] = ("en",)
    voices: tuple[str, ...] = ("default",)
    sampling: Sampling = field(default_factory=Sampling)
    num_steps: int | None = None
    guidance_scale: float | None = None
    follows_instructions: bool = False

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / CARD_FILE, {"kind": "Chatbot", "version": CARD_VERSION, **to_mapping(self)})

    @classmethod
    def load(cls, folder: str | Path) -> Card:
        """The card in a folder; of a released set, which has none, what can be told of it.

        Raises:
            ValueError: the folder holds neither a card of this version nor a released set.
        """
        path = Path(folder) / CARD_FILE
        if (released := find_released(folder)) is not None:
            name = path.resolve().parent.name
            return cls(name, trained=not released.is_random, languages=("en", "zh"), follows_instructions=True)
        data = read_json(path)
        if data.pop("kind", None) != "Chatbot" or data.pop("version", None) != CARD_VERSION:
            raise ValueError(f"{path} is not the card of a chatbot in version {CARD_VERSION}")
        return parse_config(cls, data, str(path))


class Decoder(Protocol):
    """What pocket's decoder and the released one have in common: a streaming stage from speech tokens to sound."""

    flow: Any
    vocoder: Any

    def init_state(
        self, batch_size: int, num_steps: int | None = ..., guidance_scale: float | None = ..., seed: int = ...
    ) -> Any: ...
    def step(self, x: Padded, state: Any) -> Padded: ...
    def flush(self, state: Any, rows: Tensor | None = None) -> Padded: ...
    def __call__(self, x: Padded, state: Any = ...) -> Padded: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass(frozen=True)
class Models:
    """Weights and what belongs to them; no state of any conversation.

    Attributes:
        recognizer: reads speech tokens, where the model folder has one: a conversation does without it.

    Raises:
        ValueError: the parts have codebooks of unequal sizes.
    """

    tokenizer: SpeechTokenizer
    vocabulary: Vocabulary
    engine: Engine
    decoder: Decoder
    card: Card
    recognizer: Recognizer | SpeechRecognizer | None = None

    def __post_init__(self) -> None:
        sizes = {
            "tokenizer": self.tokenizer.config.quantizer.codebook_size,
            "vocabulary": self.vocabulary.codebook_size,
            "decoder": codebook_size(self.decoder),
        }
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the parts of {self.card.name} have codebooks of unequal sizes: {sizes}")

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str = "cpu",
        dtype: Dtype | None = None,
        quantization: Scheme | None = None,
        engine: EngineName = "plain",
        decoder_dtype: DecoderDtype | None = None,
    ) -> Models:
        """Reads a model folder.

        Args:
            dtype: of the language model; bfloat16 for released ones and float32 for ours by default.
            quantization: "int8" or "int4" for the matrices of the language model's layers.
            engine: what runs the language model, "plain" or "continuous": see docs/engines.md.
            decoder_dtype: as of `load_decoder`.
        Raises:
            ValueError: one sentence: a part is missing, damaged, of other sizes or made for another tokenizer; no
                library for the quantization; a type that the decoder has not.
        """
        folder = Path(folder)
        card = Card.load(folder)
        if engine not in _ENGINES:
            raise ValueError(f"unknown engine {engine!r}; the choices are {', '.join(_ENGINES)}")
        if quantization is not None:
            check_available(quantization, torch.device(device))
        if (released := find_released(folder)) is not None:
            return cls._load_released(released, card, device, dtype or "bfloat16", quantization, engine, decoder_dtype)
        vocabulary = Vocabulary.load(folder / "vocabulary")
        tokenizer = load_tokenizer(folder, device)  # first, so that damage is called damage and not another tokenizer
        own = Siblings(file_hash(folder / "tokenizer"), vocabulary.hash)
        load_siblings(folder / "language").check(own, f"the language model in {folder}", "the tokenizer beside it")
        made_with = read_extra(folder / "decoder" / "flow").get("tokenizer", own.tokenizer)
        Siblings(made_with, own.vocabulary).check(own, f"the flow in {folder}", "the tokenizer beside it")
        decoder = load_decoder(folder, device, decoder_dtype)
        language = load_language(folder / "language", dtype or "float32").to(device)
        if quantization is not None:
            quantize(language.model, quantization)
        return cls(
            tokenizer,
            vocabulary,
            _ENGINES[engine](language, vocabulary),
            decoder,
            card,
            load_recognizer(folder, device),
        )

    @torch.inference_mode()
    def transcribe(self, codes: Sequence[int]) -> str:
        """What the recognizer reads in the speech tokens of one utterance; the worker's work, in pieces of 30 s.

        Raises:
            ValueError: the model has no recognizer, or a code lies outside of the codebook.
        """
        if self.recognizer is None:
            raise ValueError(f"{self.card.name} has no recognizer: it cannot write down what it hears")
        table, size = self.tokenizer.quantizer.codebook.weight, self.recognizer.config.max_tokens
        if codes and not 0 <= min(codes) <= max(codes) < len(table):
            raise ValueError(f"speech tokens go from 0 to {len(table) - 1}, got {min(codes)} to {max(codes)}")
        texts = []
        for at in range(0, len(codes), size):
            piece = torch.tensor([codes[at : at + size]], device=table.device)
            texts += self.recognizer.transcribe(Padded.full(functional.embedding(piece, table)))
        return " ".join(text for text in texts if text)

    @classmethod
    def _load_released(
        cls,
        folders: ReleasedFolders,
        card: Card,
        device: str,
        dtype: Dtype,
        quantization: Scheme | None,
        engine: EngineName,
        decoder_dtype: DecoderDtype | None,
    ) -> Models:
        folders.check()  # all headers before any weight
        vocabulary = folders.load_vocabulary()
        tokenizer: SpeechTokenizer = load_released_tokenizer(folders.tokenizer).to(device)
        decoder = _released_decoder(folders, decoder_dtype).to(device)
        if is_released(folders.language):
            language = load_released_language(folders.language, dtype, device, quantization)
        else:
            language = load_language(folders.language, dtype).to(device)
            if quantization is not None:
                quantize(language.model, quantization)
        return cls(tokenizer, vocabulary, _ENGINES[engine](language, vocabulary), decoder, card)


_ENGINES: dict[str, Callable[[PreTrainedModel, Vocabulary], Engine]] = {
    "plain": PlainEngine,
    "continuous": ContinuousEngine,
}


def tokenizer_folder(folder: str | Path) -> Path:
    """Where the tokenizer of a model folder lies."""
    released = find_released(folder)
    return Path(folder) / "tokenizer" if released is None else released.tokenizer


def load_tokenizer(folder: str | Path, device: str = "cpu") -> SpeechTokenizer:
    """The tokenizer of a model folder, without the rest."""
    place: Path = tokenizer_folder(folder)
    if find_released(folder) is not None:
        return load_released_tokenizer(place).to(device)
    return load_component(place, SpeechTokenizer, SpeechTokenizerConfig).to(device)


def load_recognizer(folder: str | Path, device: str = "cpu") -> Recognizer | SpeechRecognizer | None:
    """The recognizer of a model folder, None where it has none."""
    place = Path(folder) / "recognizer"
    return read_recognizer(place).to(device).eval() if place.is_dir() else None


def read_recognizer(place: str | Path) -> Recognizer | SpeechRecognizer:
    """The recognizer in its own folder, of either kind. Raises ValueError as `load_component`."""
    if read_kind(place) == SpeechRecognizer.__name__:
        return load_speech_recognizer(place)
    return load_component(place, Recognizer, RecognizerConfig)


def load_decoder(folder: str | Path, device: str = "cpu", dtype: DecoderDtype | None = None) -> Decoder:
    """Flow and vocoder of a model folder, without the rest.

    Args:
        dtype: of a released decoder's U-Net, "float32" (the default) or "bfloat16"; pocket's has float32 alone.
    Raises:
        ValueError: a part is missing or damaged, or there is no such type.
    """
    decoder: nn.Module
    if (released := find_released(folder)) is not None:
        decoder = _released_decoder(released, dtype)
    elif dtype not in (None, "float32"):
        raise ValueError(f"the decoder in {folder} computes in float32; only a released one can do so in {dtype}")
    else:
        flow = load_component(Path(folder) / "decoder" / "flow", Flow, FlowConfig)
        vocoder = load_component(Path(folder) / "decoder" / "vocoder", Vocoder, VocoderConfig)
        decoder = SpeechDecoder(flow, vocoder)
    ready: Any = decoder.to(device).eval()
    return ready  # type: ignore[no-any-return]


def _released_decoder(folders: ReleasedFolders, dtype: DecoderDtype | None) -> ReleasedDecoder:
    if dtype not in (None, *get_args(DecoderDtype)):
        raise ValueError(f"unknown decoder_dtype {dtype!r}; the choices are {', '.join(get_args(DecoderDtype))}")
    return load_released_decoder(folders.decoder, dtype=getattr(torch, dtype or "float32"))


def codebook_size(decoder: Decoder) -> int:
    """Speech tokens that a decoder knows are below it."""
    if isinstance(decoder, ReleasedDecoder):
        return decoder.flow.config.codebook_size
    return int(decoder.flow.config.encoder.codebook_size)
