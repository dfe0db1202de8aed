"""Models: the parts of one chatbot as they lie in a model folder, loaded and checked against each other.

duologue.json  vocabulary/  tokenizer/  language/  decoder/flow/  decoder/vocoder/
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from duologue.checkpoint import file_hash, load_component
from duologue.config import parse_config, read_json, to_mapping, write_json
from duologue.decoder.decoder import SpeechDecoder
from duologue.decoder.flow import Flow, FlowConfig
from duologue.decoder.vocoder import Vocoder, VocoderConfig
from duologue.language.backbone import Siblings, load_language, load_siblings
from duologue.language.engine import PlainEngine
from duologue.language.sampling import Sampling
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from duologue.vocabulary import Vocabulary

CARD_FILE = "duologue.json"
CARD_VERSION = 1


@dataclass(frozen=True)
class Card:
    """What stands on a model folder (`duologue.json`).

    Attributes:
        trained: false for random weights, which are for load tests and say nothing.
        voices: names that a reply's voice can have; the first is the default.
        sampling: how replies are sampled unless told otherwise.
        num_steps, guidance_scale: of the flow's solver; None takes those of its config.
    """

    name: str
    trained: bool
    languages: tuple[str, ...] = ("en",)
    voices: tuple[str, ...] = ("default",)
    sampling: Sampling = field(default_factory=Sampling)
    num_steps: int | None = None
    guidance_scale: float | None = None

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / CARD_FILE, {"kind": "Chatbot", "version": CARD_VERSION, **to_mapping(self)})

    @classmethod
    def load(cls, folder: str | Path) -> Card:
        """Raises ValueError when the folder holds no card of this version."""
        path = Path(folder) / CARD_FILE
        data = read_json(path)
        if data.pop("kind", None) != "Chatbot" or data.pop("version", None) != CARD_VERSION:
            raise ValueError(f"{path} is not the card of a chatbot in version {CARD_VERSION}")
        return parse_config(cls, data, str(path))


@dataclass(frozen=True)
class Models:
    """Weights and what belongs to them; no state of any conversation.

    Raises:
        ValueError: the parts have codebooks of unequal sizes.
    """

    tokenizer: SpeechTokenizer
    vocabulary: Vocabulary
    engine: PlainEngine
    decoder: SpeechDecoder
    card: Card

    def __post_init__(self) -> None:
        sizes = {
            "tokenizer": self.tokenizer.config.quantizer.codebook_size,
            "vocabulary": self.vocabulary.codebook_size,
            "decoder": self.decoder.flow.config.encoder.codebook_size,
        }
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the parts of {self.card.name} have codebooks of unequal sizes: {sizes}")

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> Models:
        """Reads a model folder.

        Raises:
            ValueError: one sentence: a part is missing, damaged, of other sizes or made for another tokenizer.
        """
        folder = Path(folder)
        card = Card.load(folder)
        vocabulary = Vocabulary.load(folder / "vocabulary")
        tokenizer = load_tokenizer(folder, device)  # first, so that damage is called damage and not another tokenizer
        own = Siblings(file_hash(folder / "tokenizer"), vocabulary.hash)
        load_siblings(folder / "language").check(own, f"the language model in {folder}", "the tokenizer beside it")
        decoder = load_decoder(folder, device)
        language = load_language(folder / "language").to(device)
        return cls(tokenizer, vocabulary, PlainEngine(language, vocabulary), decoder, card)


def load_tokenizer(folder: str | Path, device: str = "cpu") -> SpeechTokenizer:
    """The tokenizer of a model folder, without the rest."""
    return load_component(Path(folder) / "tokenizer", SpeechTokenizer, SpeechTokenizerConfig).to(device)


def load_decoder(folder: str | Path, device: str = "cpu") -> SpeechDecoder:
    """Flow and vocoder of a model folder, without the rest."""
    flow = load_component(Path(folder) / "decoder" / "flow", Flow, FlowConfig)
    vocoder = load_component(Path(folder) / "decoder" / "vocoder", Vocoder, VocoderConfig)
    return SpeechDecoder(flow, vocoder).to(device).eval()
