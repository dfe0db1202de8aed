"""A set of the three released parts: found by what they hold, checked by their headers, loaded, or made at random.

any folder/  a speech tokenizer  config.json with `quantize_vocab_size`
             a language model    config.json of a ChatGLM, or the result of `duologue convert`
             a decoder           config.yaml with flow and hift weights
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from duologue.audio import LogMelConfig
from duologue.config import read_json
from duologue.decoder.conformer import ConformerConfig
from duologue.decoder.hift import HiFTConfig, PitchConfig
from duologue.decoder.released import build_released_decoder, save_released_decoder
from duologue.decoder.released_flow import ReleasedFlowConfig
from duologue.decoder.released_folder import CONFIG_FILE as DECODER_FILE
from duologue.decoder.released_folder import read_decoder_config
from duologue.decoder.unet import UNetConfig
from duologue.language.released import is_released, read_released
from duologue.language.released_random import ReleasedLanguageSizes, write_random_language
from duologue.language.released_text import load_released_vocabulary
from duologue.random_weights import LABEL
from duologue.tokenizer.encoder import EncoderConfig
from duologue.tokenizer.quantizer import QuantizerConfig
from duologue.tokenizer.released import ReleasedSpeechTokenizer, read_released_config, stored_weights
from duologue.tokenizer.released_random import write_random_tokenizer
from duologue.tokenizer.tokenizer import SpeechTokenizerConfig
from duologue.vocabulary import Vocabulary

LISTEN = LogMelConfig(128, floor="utterance")


@dataclass(frozen=True)
class ReleasedFolders:
    """Where the three parts lie."""

    tokenizer: Path
    language: Path
    decoder: Path

    @property
    def is_random(self) -> bool:
        """Whether a part was written with random weights."""
        configs = [read_json(folder / "config.json") for folder in (self.tokenizer, self.language)]
        return any(config.get(LABEL) for config in configs)

    def load_vocabulary(self) -> Vocabulary:
        """Of the language model, released or converted."""
        return load_released_vocabulary(self.language) if is_released(self.language) else Vocabulary.load(self.language)

    def check(self) -> None:
        """Compares configs, headers and codebook sizes of all parts; no weight is read.

        Raises:
            ValueError: one sentence naming file and key.
        """
        config = read_released_config(self.tokenizer)
        with torch.device("meta"):
            stored_weights(self.tokenizer, ReleasedSpeechTokenizer(config))
        flow, _ = read_decoder_config(self.decoder)
        if is_released(self.language):
            read_released(self.language)
        sizes = {
            f"quantize_vocab_size in {self.tokenizer / 'config.json'}": config.quantizer.codebook_size,
            f"speech tokens in {self.language}": self.load_vocabulary().codebook_size,
            f"flow.vocab_size in {self.decoder / DECODER_FILE}": flow.codebook_size,
        }
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} is {size}" for name, size in sizes.items())
            raise ValueError(f"the codebooks of the parts have unequal sizes: {told}")


def find_released(folder: str | Path) -> ReleasedFolders | None:
    """The released parts in the folders inside of a folder; None when there is none of them.

    Raises:
        ValueError: some parts are there and others missing, or one is there twice.
    """
    folder = Path(folder)
    if not folder.is_dir() or (folder / "duologue.json").exists():
        return None
    found: dict[str, list[Path]] = {kind: [] for kind in _KINDS}
    for inside in sorted(path for path in folder.iterdir() if path.is_dir()):
        for kind, holds in _KINDS.items():
            if holds(inside):
                found[kind].append(inside)
    if not any(found.values()):
        return None
    for kind, places in found.items():
        if not places:
            raise ValueError(f"{folder} lacks the {kind} of a released set: {_MARKS[kind]}")
        if len(places) > 1:
            raise ValueError(
                f"{folder} holds the {kind} of a released set twice: {places[0].name} and {places[1].name}"
            )
    return ReleasedFolders(*(places[0] for places in found.values()))


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


@dataclass(frozen=True)
class Preset:
    """Sizes of a whole random set."""

    tokenizer: SpeechTokenizerConfig
    language: ReleasedLanguageSizes
    flow: ReleasedFlowConfig
    vocoder: HiFTConfig


def _tiny() -> Preset:
    encoder = EncoderConfig(LISTEN.num_mels, 64, 4, 128, 2, 200, 1500)
    flow = ReleasedFlowConfig(
        input_size=48,
        vocab_size=256,
        encoder=ConformerConfig(input_size=48, output_size=32, attention_heads=4, linear_units=64, num_blocks=2),
        estimator=UNetConfig(channels=(32, 32), attention_head_dim=16, n_blocks=1, num_mid_blocks=2, num_heads=2),
    )
    return Preset(
        SpeechTokenizerConfig(LISTEN, encoder, QuantizerConfig(256)),
        ReleasedLanguageSizes(64, 3, 4, 2, 16, 96, codebook_size=256, num_ranks=448, first_speech=40),
        flow,
        HiFTConfig(base_channels=32, f0_predictor=PitchConfig(cond_channels=32)),
    )


def _published() -> Preset:
    encoder = EncoderConfig(LISTEN.num_mels, 1280, 20, 5120, 16, 200, 1500)
    listen = SpeechTokenizerConfig(LISTEN, encoder, QuantizerConfig(16384))
    return Preset(listen, ReleasedLanguageSizes(), ReleasedFlowConfig(), HiFTConfig())


PRESETS: dict[str, Callable[[], Preset]] = {"tiny": _tiny, "9b": _published}


def init_random(preset: str, folder: str | Path, seed: int = 0, progress: bool = False) -> None:
    """Writes a full set in the released formats with random weights: for load tests and speed, it says nothing.

    Raises:
        ValueError: an unknown preset, or a folder that is not empty.
    """
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; the choices are {', '.join(PRESETS)}")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder; give a new one")
    sizes = PRESETS[preset]()
    write_random_tokenizer(folder / "tokenizer", sizes.tokenizer, seed, progress)
    write_random_language(folder / "language", sizes.language, seed, progress=progress)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = build_released_decoder(sizes.flow, sizes.vocoder)
    save_released_decoder(folder / "decoder", decoder, note=f"{LABEL}: made by `duologue init-random {preset}`")
