"""The Chatbot, the public entry point of the package. It owns weights and no conversation.

bot = duologue.load("pocket")
reply = bot.chat("question.wav")          # stateless
session = bot.session()                   # many turns
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType

import numpy as np

from duologue import rates
from duologue.audio import check_wav
from duologue.checkpoint import Dtype, file_hash
from duologue.config import check_type
from duologue.conversation.answer import Reply, answer
from duologue.conversation.events import Event
from duologue.conversation.session import Session
from duologue.conversation.worker import Worker
from duologue.cuda import check_device
from duologue.language.backbone import Provenance, load_language, load_provenance
from duologue.language.engine import PlainEngine
from duologue.language.sampling import Sampling
from duologue.language.talker import ReadingTalker, Talker, TalkerEngine, TextToTokenTalker
from duologue.language.text_models import TextModel, open_text_model
from duologue.layers import num_step_threads
from duologue.models import DecoderDtype, EngineName, Models, open_folder
from duologue.pcm import Pcm
from duologue.quantization import Scheme
from duologue.sound_files import load_audio

__all__ = ["Chatbot", "Reply", "Session", "load"]

PRESETS = ("pocket",)  # folders of the package
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.pt", "*.yaml", "*.model"]


class Chatbot:
    """One spoken chatbot on one device, usable by any number of sessions at once."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.device = next(models.decoder.parameters()).device
        self.worker = Worker(num_threads=num_step_threads(models.tokenizer), device=self.device)

    def __repr__(self) -> str:
        card = self.models.card
        return f"Chatbot({card.name}{'' if card.trained else ', not trained'}, {self.device})"

    def with_text_model(self, text_model: TextModel, talker: Talker | None = None) -> Chatbot:
        """Returns a chatbot in which the text model answers and the talker reads its text aloud (docs/talker.md).

        Args:
            talker: by default the spoken language model of this chatbot.

        Raises:
            ValueError: this chatbot has no recognizer, or a text model already.
        """
        own = self.models
        if own.recognizer is None:
            raise ValueError(f"{own.card.name} has no recognizer: a text model needs one to be shown what was said")
        if isinstance(own.engine, TalkerEngine):
            raise ValueError(f"{own.card.name} has a text model already")

        async def recognize(codes: Sequence[int]) -> str:
            text, _ = await self.worker.submit(lambda: own.transcribe(codes))
            return text

        engine = TalkerEngine(
            own.engine,
            talker or ReadingTalker(own.engine, own.vocabulary),
            own.vocabulary,
            text_model,
            recognize,
            english=own.card.languages == ("en",),
        )
        card = dataclasses.replace(own.card, follows_instructions=True)
        bot = Chatbot(dataclasses.replace(own, engine=engine, card=card))
        bot.worker = self.worker
        return bot

    @property
    def sample_rate(self) -> int:
        """Sample rate of `Reply.audio`, in Hz."""
        return rates.SPEAK_SAMPLE_RATE

    def session(self, *, language: str = "", voice: str = "", sampling: Sampling | None = None) -> Session:
        """Starts a new conversation."""
        return Session(self.models, self.worker, language=language, voice=voice, sampling=sampling)

    def load_session(self, path: str | Path) -> Session:
        """Continues a conversation saved by `Session.save`."""
        return Session.load(self.models, self.worker, path)

    def chat(
        self,
        audio: str | Path | Pcm | None = None,
        sample_rate: int | None = None,
        *,
        text: str | None = None,
        text_only: bool = False,
        voice: str = "",
        sampling: Sampling | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> Reply:
        """Answers one question without keeping a conversation.

        Args:
            audio: an audio file, or samples (S,) as float32 in [-1, 1], int16 or bytes of little-endian int16.
            sample_rate: required with samples.
            text: the written question, instead of audio.
            text_only: requests a written reply.
            on_event: called with every event. Without it the reply takes the straight path (`answer.py`), whose timings
                lack the time to first audio.

        Raises:
            ValueError: no question or two, unreadable or unusable audio, or an unknown voice.
            TypeError: an argument of another type.
        """
        check_type("audio", audio, str, Path, np.ndarray, bytes, bytearray, memoryview, NoneType)
        check_type("text", text, str, NoneType)
        if (audio is None) == (text is None):
            raise ValueError("give a question either as audio or as text")
        session = self.session(voice=voice, sampling=sampling)
        wav = None
        if isinstance(audio, str | Path):
            wav, sample_rate = load_audio(audio)
        elif audio is not None:
            if sample_rate is None:
                raise ValueError("samples without a file need their sample_rate")
            wav = check_wav(audio, sample_rate)
        if on_event is None and isinstance(self.models.engine, PlainEngine):
            return answer(self.models, wav, sample_rate or 0, text=text or "", text_only=text_only, sampling=sampling)
        if wav is not None and sample_rate is not None:
            session.feed(wav, sample_rate)
        session.write(text or "")
        return session.reply_now(text_only=text_only, on_event=on_event)


def model_folder(name: str | Path = "pocket") -> Path:
    """Returns the folder of a preset, a local model, or a downloaded model of the hub.

    Raises:
        ValueError: names the request and the choices.
        TypeError: the name is neither str nor Path.
    """
    check_type("name", name, str, Path)
    folder = Path(__file__).parent.parent / str(name) if name in PRESETS else Path(name)
    if folder.is_dir():
        return folder
    if isinstance(name, str) and HUB_ID.fullmatch(name):
        return _from_hub(name)
    presets = ", ".join(PRESETS)
    raise ValueError(
        f"there is no model {str(name)!r}: give one of the presets ({presets}), a folder, or an OWNER/NAME of the hub"
    )


def _from_hub(name: str) -> Path:
    """Downloads or updates a repository; weights and data only, no code."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"there is no folder {name!r} here, and the hub did not give a model of that name ({reason})"
        ) from None


def load(
    name: str | Path = "pocket",
    device: str = "cpu",
    dtype: Dtype | None = None,
    quantization: Scheme | None = None,
    engine: EngineName = "plain",
    decoder_dtype: DecoderDtype | None = None,
    max_sessions: int | None = None,
    max_cached_tokens: int | None = None,
    engine_url: str | None = None,
    gguf: str | Path | None = None,
    text_model: str | None = None,
    text_model_name: str = "",
    talker: str | Path | None = None,
) -> Chatbot:
    """Loads a chatbot by preset ("pocket"), model folder, released set, or OWNER/NAME on the model hub.

    Args:
        dtype, quantization, engine, max_sessions, max_cached_tokens, engine_url, gguf: of the language model,
            see `Models.load`.
        text_model: URL of a chat endpoint, transformers folder or GGUF file that answers instead of the language model,
            which then reads the answers aloud; see `open_text_model`, also for `text_model_name`.
        talker: finished run of `duologue train text-to-token` that reads the text model's answers aloud instead.
        decoder_dtype: of a released decoder's U-Net, by default bfloat16 on CUDA and float32 elsewhere.

    Raises:
        ValueError: names the request and the choices, the device that is missing, or the fault of the model.
        TypeError: an argument of another type.
    """
    check_device(device)
    rest = engine, decoder_dtype, max_sessions, max_cached_tokens, engine_url, gguf
    thinker = None if text_model is None else open_text_model(text_model, text_model_name, device)
    bot = Chatbot(Models.load(model_folder(name), device, dtype, quantization, *rest))
    if thinker is None:
        return bot
    return bot.with_text_model(thinker, None if talker is None else load_talker(talker, model_folder(name), device))


def load_talker(run: str | Path, model: Path, device: str = "cpu") -> TextToTokenTalker:
    """Loads the text-to-token model of a finished run as talker for a model folder.

    Raises:
        ValueError: there is none, or it was trained with another tokenizer or vocabulary.
    """
    opened, folder = open_folder(model), Path(run) / "language"
    own = Provenance(file_hash(opened.tokenizer_path), opened.vocabulary.hash)
    load_provenance(folder).check(own, f"the talker {run}", f"the model {model}")
    engine = PlainEngine(load_language(folder).to(device), opened.vocabulary)
    return TextToTokenTalker(engine, opened.vocabulary)
