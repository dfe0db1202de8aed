"""Model folders and their loaded parts.

    duologue.json  vocabulary/  tokenizer/  recognizer/  language/  decoder/flow/  decoder/vocoder/

`open_folder` distinguishes this format from a set of released parts (`released/folder.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from duologue.checkpoint import DTYPES, Dtype, file_hash, load_component, read_extra, read_kind
from duologue.config import parse_config, read_json, to_mapping, write_json
from duologue.cuda import set_float32_precision
from duologue.decoder.decoder import SpeechDecoder
from duologue.decoder.flow import Flow, FlowConfig
from duologue.decoder.vocoder import Vocoder, VocoderConfig
from duologue.language import llama
from duologue.language.backbone import Provenance, load_language, load_provenance
from duologue.language.engine import MAX_CACHED_TOKENS, MAX_SESSIONS, Engine, PlainEngine, check_engine
from duologue.language.graphs import GraphStepper
from duologue.language.sampling import Sampling
from duologue.language.talker import TalkerEngine
from duologue.language.tools import ToolUse
from duologue.language.vllm import VllmEngine
from duologue.layers import Padded
from duologue.quantization import Scheme, check_available, quantize
from duologue.released.folder import ReleasedFolder
from duologue.released.language import load_released_language
from duologue.tokenizer.recognizer import HeardToken, Recognizer, RecognizerConfig, joined
from duologue.tokenizer.speech_recognizer import SpeechRecognizer, load_speech_recognizer
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from duologue.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD_FILE = "duologue.json"
CARD_VERSION = 1

CACHED_PER_SESSION = 2048
"""Ids of a conversation and its reply, by which the cache grows with the sessions."""

EngineName = Literal["plain", "graphs", "vllm"]
DecoderDtype = Literal["float32", "bfloat16"]
Decoder: TypeAlias = SpeechDecoder[Any, Any]


@dataclass(frozen=True)
class Card:
    """The description of a model (`duologue.json`).

    Attributes:
        trained: false for random weights, which produce noise.
        voices: names of the reply voices; the first is the default.
        sampling: default sampling of replies.
        num_steps, guidance_scale: solver settings of the flow; None for those of its config.
        follows_instructions: the model was trained with system turns; other models get no instructions.
        questions: what people may ask; the web page offers it.
    """

    name: str
    trained: bool
    languages: tuple[str, ...] = ("en",)
    voices: tuple[str, ...] = ("default",)
    sampling: Sampling = field(default_factory=Sampling)
    num_steps: int | None = None
    guidance_scale: float | None = None
    follows_instructions: bool = False
    questions: tuple[str, ...] = ()

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / CARD_FILE, {"kind": "Chatbot", "version": CARD_VERSION, **to_mapping(self)})

    @classmethod
    def load(cls, folder: str | Path) -> Card:
        """Reads a folder's card. Raises ValueError if there is none of this version."""
        path = Path(folder) / CARD_FILE
        data = read_json(path)
        if data.pop("kind", None) != "Chatbot" or data.pop("version", None) != CARD_VERSION:
            raise ValueError(f"{path} is not the card of a chatbot in version {CARD_VERSION}")
        return parse_config(cls, data, str(path))


class ModelFolder(Protocol):
    """A model on disk, in our format (`PocketFolder`) or as a released set.

    Attributes:
        tokenizer_path: folder of the speech tokenizer; its hash identifies the codebook.
    """

    @property
    def path(self) -> Path: ...
    @property
    def tokenizer_path(self) -> Path: ...
    @property
    def card(self) -> Card: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    def check(self) -> None:
        """Raises ValueError if parts are damaged or incompatible."""

    def load_tokenizer(self, device: str = ...) -> SpeechTokenizer: ...
    def load_recognizer(self, device: str = ...) -> Recognizer | SpeechRecognizer | None: ...
    def load_language(
        self, device: str = ..., dtype: Dtype | None = ..., quantization: Scheme | None = ...
    ) -> PreTrainedModel: ...
    def load_decoder(self, device: str = ..., dtype: DecoderDtype | None = ...) -> Decoder: ...


def open_folder(path: str | Path) -> ModelFolder:
    """Returns the model in a folder of either format; parts are read on demand.

    Raises:
        ValueError: an incomplete released set.
    """
    path = Path(path)
    released = None if (path / CARD_FILE).exists() else _ReleasedFolder.find(path)
    return PocketFolder(path) if released is None else released


@dataclass(frozen=True)
class PocketFolder:
    """A model folder in our own format."""

    path: Path

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer"

    @cached_property
    def card(self) -> Card:
        return Card.load(self.path)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.load(self.path / "vocabulary")

    def check(self) -> None:
        """Checks that language model and flow were trained with this tokenizer and vocabulary.

        Raises:
            ValueError: names the incompatible part, or the tokenizer is damaged.
        """
        self.load_tokenizer()  # first, so that damage is reported as such
        own = Provenance(file_hash(self.tokenizer_path), self.vocabulary.hash)
        load_provenance(self.path / "language").check(own, f"the language model in {self.path}", "its tokenizer")
        made_with = read_extra(self.path / "decoder" / "flow").get("tokenizer", own.tokenizer)
        Provenance(made_with, own.vocabulary).check(own, f"the flow in {self.path}", "its tokenizer")

    def load_tokenizer(self, device: str = "cpu") -> SpeechTokenizer:
        """Loads the speech tokenizer. Raises ValueError as `checkpoint.load_component`."""
        return load_component(self.tokenizer_path, SpeechTokenizer, SpeechTokenizerConfig).to(device)

    def load_recognizer(self, device: str = "cpu") -> Recognizer | SpeechRecognizer | None:
        """Loads the recognizer of speech tokens; None if there is none."""
        place = self.path / "recognizer"
        return read_recognizer(place).to(device).eval() if place.is_dir() else None

    def load_language(
        self, device: str = "cpu", dtype: Dtype | None = None, quantization: Scheme | None = None
    ) -> PreTrainedModel:
        """Loads the language model, float32 by default. Raises ValueError as `backbone.load_language`."""
        return _load_language(self.path / "language", dtype or "float32", device, quantization)

    def load_decoder(self, device: str = "cpu", dtype: DecoderDtype | None = None) -> Decoder:
        """Loads flow and vocoder in evaluation mode. Raises ValueError for a damaged part or a dtype other than
        float32."""
        if dtype not in (None, "float32"):
            raise ValueError(
                f"the decoder in {self.path} computes in float32; only a released one can do so in {dtype}"
            )
        flow = load_component(self.path / "decoder" / "flow", Flow, FlowConfig)
        vocoder = load_component(self.path / "decoder" / "vocoder", Vocoder, VocoderConfig)
        return SpeechDecoder(flow, vocoder).to(device).eval()


class _ReleasedFolder(ReleasedFolder):
    """A released set as a model folder. Its card is inferred from its configs."""

    @cached_property
    def card(self) -> Card:
        name = self.path.resolve().name
        return Card(
            name,
            trained=not self.is_random,
            languages=("en", "zh"),
            follows_instructions=True,
            questions=("What can you do?", "Tell me a short story.", "用中文介绍一下你自己。"),
        )

    def load_language(
        self, device: str = "cpu", dtype: Dtype | None = None, quantization: Scheme | None = None
    ) -> PreTrainedModel:
        """Reads the language model, bfloat16 by default. Raises ValueError as `load_released_language`."""
        if self.weights is not None:
            return load_released_language(self.weights, dtype or "bfloat16", device, quantization)
        return _load_language(self.language_path, dtype or "bfloat16", device, quantization)


def _load_language(folder: Path, dtype: Dtype, device: str, quantization: Scheme | None) -> PreTrainedModel:
    language = load_language(folder, dtype).to(device)
    if quantization is not None:
        quantize(language.model, quantization)
    return language


@dataclass(frozen=True)
class Models:
    """The loaded parts of one chatbot, without conversation state.

    Attributes:
        recognizer: reads text from speech tokens; None if the folder has none.

    Raises:
        ValueError: the codebook sizes of the parts differ, or a part lies on several devices.
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
            "decoder": self.decoder.codebook_size,
        }
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the parts of {self.card.name} have codebooks of unequal sizes: {sizes}")
        _check_device("tokenizer", self.tokenizer)
        _check_device("decoder", self.decoder)
        if isinstance(self.engine, PlainEngine) and self.engine.language is not None:
            _check_device("language model", self.engine.language)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str = "cpu",
        dtype: Dtype | None = None,
        quantization: Scheme | None = None,
        engine: EngineName = "plain",
        decoder_dtype: DecoderDtype | None = None,
        max_sessions: int | None = None,
        max_cached_tokens: int | None = None,
        engine_url: str | None = None,
        gguf: str | Path | None = None,
    ) -> Models:
        """Loads a model folder.

        Args:
            dtype: of the language model; by default bfloat16 for released models and float32 for ours.
            quantization: "int8" or "int4" for the language model's linear layers.
            engine: runs the language model: "plain" here, "graphs" with captured steps on CUDA, or "vllm" in the server
                at `engine_url`, see docs/engines.md.
            decoder_dtype: of a released decoder's U-Net, "float32" or "bfloat16"; by default bfloat16 on CUDA. All
                other float32 there is exact, without TF32.
            max_sessions: maximum number of running replies, and of cached conversations.
            max_cached_tokens: maximum ids in the KV caches; by default at least `CACHED_PER_SESSION` per session.
            gguf: file of the language model for llama.cpp, written by `duologue convert`; the folder gives the rest.

        Raises:
            ValueError: a part is missing, damaged or incompatible, a library is missing, a dtype is not supported, or
                no usable server answers at `engine_url`.
        """
        opened = open_folder(folder)
        card = opened.card
        check_engine(engine, engine_url)
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; the choices are {', '.join(DTYPES)}")
        if engine_url is not None and (dtype is not None or quantization is not None):
            raise ValueError("the vLLM server loads the language model: give dtype and quantization to it")
        if gguf is not None and (dtype is not None or quantization is not None or engine != "plain"):
            raise ValueError("a GGUF file has its own dtype and engine: leave dtype, quantization and engine out")
        if quantization is not None:
            check_available(quantization, torch.device(device))
        set_float32_precision(device)
        opened.check()
        tokenizer, decoder = opened.load_tokenizer(device), opened.load_decoder(device, decoder_dtype)
        made: Engine
        if engine_url is not None:
            made = VllmEngine(engine_url, opened.vocabulary, max_sessions or MAX_SESSIONS, max_cached_tokens)
        elif gguf is not None:
            made = _llama_engine(gguf, opened.vocabulary, max_sessions or MAX_SESSIONS, max_cached_tokens)
        else:
            language = opened.load_language(device, dtype, quantization)
            sizes = _engine_sizes(language, max_sessions, max_cached_tokens)
            stepper = _graph_stepper(language, opened.vocabulary, sizes) if engine == "graphs" else None
            made = PlainEngine(language, opened.vocabulary, **sizes, stepper=stepper)
        return cls(tokenizer, opened.vocabulary, made, decoder, card, opened.load_recognizer(device))

    @property
    def calls_tools(self) -> bool:
        """Whether the engine takes function tools and is shown their results."""
        return isinstance(self.engine, TalkerEngine)

    def with_tools(self, tools: ToolUse) -> Models:
        """Returns these parts for one reply with tools. Raises ValueError if the engine calls none."""
        if not isinstance(self.engine, TalkerEngine):
            raise ValueError(f"{self.card.name} calls no tools")
        return dataclasses.replace(self, engine=self.engine.with_tools(tools))

    @torch.inference_mode()
    def transcribe(self, codes: Sequence[int]) -> str:
        """Transcribes the speech tokens of one utterance in pieces of 30 s; slow, so call it on the worker.

        Raises:
            ValueError: the model has no recognizer, or a code lies outside the codebook.
        """
        if self.recognizer is None:
            raise ValueError(f"{self.card.name} has no recognizer: it cannot write down what it hears")
        return transcribe(codes, self.tokenizer, self.recognizer)

    @torch.inference_mode()
    def transcribe_tokens(self, codes: Sequence[int]) -> list[HeardToken]:
        """Transcribes as `transcribe` does; returns the tokens of the text with their log probabilities."""
        if self.recognizer is None:
            raise ValueError(f"{self.card.name} has no recognizer: it cannot write down what it hears")
        return transcribe_tokens(codes, self.tokenizer, self.recognizer)

    @cached_property
    def num_parameters(self) -> int | None:
        """Parameters of tokenizer, language model and decoder; None if another library holds the language model."""
        language = self.engine.language if isinstance(self.engine, PlainEngine) else None
        if language is None:
            return None
        parts = (self.tokenizer, language, self.decoder)
        return sum(parameter.numel() for part in parts for parameter in part.parameters())


@torch.inference_mode()
def transcribe(codes: Sequence[int], tokenizer: SpeechTokenizer, recognizer: Recognizer | SpeechRecognizer) -> str:
    """Transcribes the speech tokens of one utterance in pieces of 30 s.

    Raises:
        ValueError: a code lies outside the codebook.
    """
    return joined(transcribe_tokens(codes, tokenizer, recognizer))


@torch.inference_mode()
def synthesize(
    codes: Sequence[int] | NDArray[np.int64], decoder: Decoder, card: Card, seed: int = 0, style: str = ""
) -> NDArray[np.float32]:
    """Decodes speech tokens (T,) to audio (S,) float32 in [-1, 1] at 22.05 kHz, with the settings of a conversation."""
    if not len(codes):
        return np.zeros(0, np.float32)
    device = next(decoder.parameters()).device
    state = decoder.init_state(1, card.num_steps, card.guidance_scale, seed, style=style)
    wav = decoder(Padded.full(torch.as_tensor(codes, device=device)[None]), state).rows()[0]
    audio: NDArray[np.float32] = wav.clamp(-1.0, 1.0).float().cpu().numpy()
    return audio


@torch.inference_mode()
def transcribe_tokens(
    codes: Sequence[int], tokenizer: SpeechTokenizer, recognizer: Recognizer | SpeechRecognizer
) -> list[HeardToken]:
    """Transcribes as `transcribe` does; returns the tokens of the text with their log probabilities."""
    table, size = tokenizer.quantizer.codebook.weight, recognizer.config.max_tokens
    if codes and not 0 <= min(codes) <= max(codes) < len(table):
        raise ValueError(f"speech tokens go from 0 to {len(table) - 1}, got {min(codes)} to {max(codes)}")
    heard: list[HeardToken] = []
    for at in range(0, len(codes), size):
        piece = torch.tensor([codes[at : at + size]], device=table.device)
        [tokens] = recognizer.transcribe_tokens(Padded.full(functional.embedding(piece, table)))
        if heard and tokens:
            heard.append(HeardToken(" ", 0.0))
        heard += tokens
    return heard


def _engine_sizes(language: PreTrainedModel, max_sessions: int | None, max_cached_tokens: int | None) -> dict[str, Any]:
    """Returns the sizes of the engine that differ from its defaults."""
    sizes = {}
    if max_sessions is not None:
        sizes = {"max_sessions": max_sessions, "max_caches": max_sessions}
        positions: int = language.config.get_text_config().max_position_embeddings
        wanted = max(MAX_CACHED_TOKENS, positions, max_sessions * CACHED_PER_SESSION)
        max_cached_tokens = wanted if max_cached_tokens is None else max_cached_tokens
    return sizes if max_cached_tokens is None else {**sizes, "max_cached_tokens": max_cached_tokens}


def _graph_stepper(language: PreTrainedModel, vocabulary: Vocabulary, sizes: dict[str, Any]) -> GraphStepper:
    """Returns a stepper with captured steps, whose slots together hold the cached ids."""
    num_rows = sizes.get("max_sessions", MAX_SESSIONS)
    num_slots = num_rows + sizes.get("max_caches", MAX_SESSIONS)
    num_cells = sizes.get("max_cached_tokens", MAX_CACHED_TOKENS)
    positions: int = language.config.get_text_config().max_position_embeddings
    stepper = GraphStepper(language, vocabulary, num_slots, min(positions, max(2048, num_cells // num_slots)))
    stepper.warm_up(num_rows)
    return stepper


def _llama_engine(
    path: str | Path, vocabulary: Vocabulary, max_sessions: int, max_cached_tokens: int | None
) -> PlainEngine:
    num_cells = max_cached_tokens or llama.MAX_CACHED_TOKENS
    stepper = llama.LlamaStepper(path, vocabulary, 2 * max_sessions, num_cells)
    return PlainEngine(None, vocabulary, max_sessions, num_cells, max_sessions, stepper=stepper)


def _check_device(name: str, part: nn.Module) -> None:
    """Raises ValueError if a part lies on several devices: masks, states and generators are made on one."""
    devices = {str(parameter.device) for parameter in part.parameters()}
    if len(devices) > 1:
        raise ValueError(f"the {name} lies on {', '.join(sorted(devices))}: every part must lie on one device")


def read_recognizer(place: str | Path) -> Recognizer | SpeechRecognizer:
    """Loads a recognizer of either kind. Raises ValueError as `load_component`."""
    if read_kind(place) == SpeechRecognizer.__name__:
        return load_speech_recognizer(place)
    return load_component(place, Recognizer, RecognizerConfig)
