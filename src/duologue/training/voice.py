"""Stage `voice`: a new voice for a trained model, from recordings of one speaker.

The flow of the model goes on training on the recordings alone, as the voice without a speaker vector. The result is the
flow, a copy of the model with it, and a report with a page of players: recordings, vocoder alone, voice before and
after. Tokenizer, language model and vocoder stay as they are.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from duologue import machine
from duologue.checkpoint import save_component
from duologue.conversation.chatbot import model_folder
from duologue.decoder.flow import Flow
from duologue.evaluation.page import write_rows
from duologue.evaluation.report import Report, format_table
from duologue.evaluation.testset import spread
from duologue.evaluation.voices import Judges, Synthesis, VoiceClip, compare_voices, open_judges
from duologue.layers import Padded
from duologue.models import Decoder, PocketFolder, open_folder
from duologue.released.decoder.flow import ReleasedFlow
from duologue.tokenizer.tokenizer import SpeechTokenizer
from duologue.training.codes import CodeStore
from duologue.training.export import export_flow
from duologue.training.flow import FlowRecipe, FlowStage, TrainingUtterance


@dataclass(frozen=True, kw_only=True)
class VoiceRecipe(FlowRecipe):
    """Recipe of the stage `voice`: keys of `FlowRecipe`, without those that name parts or sizes.

    Attributes:
        model: preset or model folder that gets the voice: of our own format, or a released set.
        voice: name of the voice.
        recognizer: CTranslate2 folder of the Whisper that reads the report's sounds; empty for the usual places.
        speaker_model: ONNX file of a speaker embedder for the report; may be empty.
        num_compared: validation clips of the report.
    """

    model: str = "pocket"
    voice: str = "default"
    tokenizer: str = ""
    recognizer: str = ""
    speaker_model: str = ""
    num_compared: int = 20
    max_tokens: int = 30
    prefix_probability: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer or self.start_from or self.vocoder or self.released is not None:
            raise ValueError("tokenizer, flow and vocoder of a voice are those of `model`: leave the other keys out")


class VoiceStage(FlowStage):
    """Training of a model's flow on one speaker."""

    def __init__(self, recipe: VoiceRecipe) -> None:
        self._voice_recipe = recipe
        self._model = open_folder(model_folder(recipe.model))
        self._model.check()
        # Opened before any training: a report that cannot be written is known at once.
        self._judges = open_judges(recipe.recognizer, recipe.speaker_model)
        self._decoder: Decoder = self._model.load_decoder().requires_grad_(False)
        self._before: Decoder = copy.deepcopy(self._decoder)
        of_flow = {key.name: getattr(recipe, key.name) for key in dataclasses.fields(FlowRecipe)}
        super().__init__(FlowRecipe(**{**of_flow, "tokenizer": str(self._model.tokenizer_path)}))

    def sample(self, folder: Path) -> None:
        """Writes pictures of mels, and three validation clips as recorded and as spoken from their tokens."""
        super().sample(folder)
        self._compare(self._clips(3), folder, Judges(None, "of samples", None, "of samples", None))

    def save(self, folder: Path) -> None:
        """Writes `flow`, `model` and the report: report.json, report.html and its sounds."""
        super().save(folder)
        self._write_model(folder / "flow", folder / "model")
        report = self._compare(self._clips(self._voice_recipe.num_compared), folder, self._judges)
        report.save(folder, "report")
        print(format_table(report))

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

    def _clips(self, num: int) -> list[VoiceClip]:
        clips = []
        for index in spread(range(len(self.valid)), num):
            one = self.valid[index]
            wav = self.clips[one.store].wav(one.indices[0])
            clips.append(VoiceClip(one.clip.id, one.clip.text, wav, index))
        return clips

    def _compare(self, clips: list[VoiceClip], folder: Path, judges: Judges) -> Report:
        syntheses: dict[str, Synthesis] = {
            "vocoder": self._from_mel,
            "before": partial(self._from_tokens, self._before),
            "after": partial(self._from_tokens, self._decoder),
        }
        rows, shown = compare_voices(clips, syntheses, judges)
        model = {"name": self._voice_recipe.voice, "model": self._voice_recipe.model}
        report = Report("voice", model, machine.describe(), tuple(rows))
        write_rows(folder, report, shown, len(shown))
        return report

    @torch.inference_mode()
    def _from_mel(self, clip: VoiceClip) -> NDArray[np.float32]:
        mel = self._mel(self.valid[clip.index])
        vocoder = self._before.vocoder
        state = vocoder.init_state(1)
        mels = Padded.full(mel[None])
        wav = Padded.concat([vocoder.step(mels, state), vocoder.flush(state)])
        return wav.rows()[0].numpy()

    @torch.inference_mode()
    def _from_tokens(self, decoder: Decoder, clip: VoiceClip) -> NDArray[np.float32]:
        tokens, _ = self.whole([self.valid[clip.index]])
        device = next(decoder.flow.parameters()).device
        decoder.vocoder.to(device)
        card = self._model.card
        state = decoder.init_state(1, card.num_steps, card.guidance_scale)
        wav: Padded = decoder(Padded(tokens.values.to(device), tokens.lengths.to(device)), state)
        return wav.rows()[0].cpu().numpy()

    def _write_model(self, flow: Path, out: Path) -> None:
        """Copies the model with the new flow; of a released set only its decoder."""
        if not isinstance(self._model, PocketFolder):
            export_flow(flow, self._model.path / "decoder", out / "decoder")
            return
        shutil.copytree(self._model.path, out, dirs_exist_ok=True)
        extra = {"tokenizer": self.tokenizer_hash}
        save_component(out / "decoder" / "flow", self.flow, self.flow.config, extra=extra, dtype=torch.float16)
        card = self._model.card
        dataclasses.replace(
            card, name=f"{card.name}-{self._voice_recipe.voice}", voices=(self._voice_recipe.voice,)
        ).save(out)
