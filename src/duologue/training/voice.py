"""Stage `voice`: a new voice for a trained model, from recordings of one speaker.

The flow of the model goes on training on the recordings alone, as the voice without a speaker vector. The result is the
flow and a copy of the model with it. Tokenizer, language model and vocoder stay as they are. `duologue evaluate voice`
compares the result with the recordings.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from duologue import rates
from duologue.checkpoint import save_component
from duologue.conversation.chatbot import model_folder
from duologue.decoder.flow import Flow
from duologue.models import Decoder, PocketFolder, open_folder, synthesize
from duologue.released.decoder.flow import ReleasedFlow
from duologue.sound_files import save_audio
from duologue.tokenizer.tokenizer import SpeechTokenizer
from duologue.training.codes import CodeStore
from duologue.training.export import export_flow
from duologue.training.flow import FlowRecipe, FlowStage, TrainingUtterance

NUM_SAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class VoiceRecipe(FlowRecipe):
    """Recipe of the stage `voice`: keys of `FlowRecipe`, without those that name parts or sizes.

    Attributes:
        model: preset or model folder that gets the voice: of our own format, or a released set.
        voice: name of the voice.
    """

    model: str = "pocket"
    voice: str = "default"
    tokenizer: str = ""
    max_tokens: int = 30
    prefix_probability: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer or self.start_from or self.vocoder or self.released is not None:
            raise ValueError("tokenizer, flow and vocoder of a voice are those of `model`: leave the other keys out")


class VoiceStage(FlowStage):
    """Training of a model's flow on one speaker."""

    def __init__(self, recipe: VoiceRecipe) -> None:
        self._voice = recipe.voice
        self._model = open_folder(model_folder(recipe.model))
        self._model.check()
        self._decoder: Decoder = self._model.load_decoder().requires_grad_(False)
        of_flow = {key.name: getattr(recipe, key.name) for key in dataclasses.fields(FlowRecipe)}
        super().__init__(FlowRecipe(**{**of_flow, "tokenizer": str(self._model.tokenizer_path)}))

    @torch.inference_mode()
    def sample(self, folder: Path) -> None:
        """Writes pictures of mels, and the words of three validation clips in the voice."""
        super().sample(folder)
        self._decoder.vocoder.to(next(self.flow.parameters()).device)
        for number, one in enumerate(self.valid[:NUM_SAMPLES]):
            codes = self.whole([one])[0].rows()[0].tolist()
            wav = synthesize(codes, self._decoder, self._model.card)
            save_audio(folder / f"{number}.wav", wav, rates.SPEAK_SAMPLE_RATE)

    def save(self, folder: Path) -> None:
        """Writes `flow` and `model`, a copy of the model with it; of a released set only its decoder."""
        super().save(folder)
        out = folder / "model"
        if not isinstance(self._model, PocketFolder):
            export_flow(folder / "flow", self._model.path / "decoder", out / "decoder")
            return
        shutil.copytree(self._model.path, out, dirs_exist_ok=True)
        extra = {"tokenizer": self.tokenizer_hash}
        save_component(out / "decoder" / "flow", self.flow, self.flow.config, extra=extra, dtype=torch.float16)
        card = self._model.card
        dataclasses.replace(card, name=f"{card.name}-{self._voice}", voices=(self._voice,)).save(out)

    def load_tokenizer(self) -> SpeechTokenizer:
        """Loads the tokenizer of the model."""
        return self._model.load_tokenizer()

    def _open_corpora(self) -> tuple[list[CodeStore], list[TrainingUtterance]]:
        """All clips become those of the reply voice, which has no speaker vector."""
        stores, utterances = super()._open_corpora()
        speakers = sorted({one.clip.voice for one in utterances})
        if len(speakers) > 1:
            raise ValueError(f"a voice is one speaker; the corpora have {len(speakers)}: {', '.join(speakers[:5])}")
        return stores, [
            dataclasses.replace(one, clip=dataclasses.replace(one.clip, role="reply")) for one in utterances
        ]

    def _make_flow(self) -> Flow | ReleasedFlow:
        flow: Flow | ReleasedFlow = self._decoder.flow
        return flow.requires_grad_(True)
