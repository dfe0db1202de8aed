"""The straight path: one question, one answer, in one function.

    wav -> speech tokens -> prompt -> reply ids -> text | speech tokens -> wav

It uses no thread, event loop or cache. It is the reference for sessions: their greedy ids are equal, and their audio
differs by at most 1e-4.
"""

from __future__ import annotations

import base64
import html
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from duologue import rates
from duologue.audio import StreamingResampler, check_wav
from duologue.conversation.events import EndReason, Timings
from duologue.conversation.history import reply_prompt, turn_of
from duologue.interleave import INTERLEAVED, TEXT_ONLY, Schedule, split
from duologue.language.drawing import DrawMasks, DrawState, draw_exactly, rows_of
from duologue.language.engine import PlainEngine
from duologue.language.sampling import Sampling
from duologue.layers import Padded, step_threads
from duologue.models import Models, synthesize
from duologue.pcm import Pcm
from duologue.sound_files import wav_bytes
from duologue.text import shortened
from duologue.turns import Conversation, Modality, Role
from duologue.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Reply:
    """A complete reply.

    A notebook shows it with a player.

    Attributes:
        audio: float32 (S,) in [-1, 1]; empty for a written reply.
        speech_tokens: codes in [0, codebook_size).
        recognize: returns what the recognizer reads in the question; None without a recognizer or a spoken question.
    """

    text: str
    audio: NDArray[np.float32]
    sample_rate: int
    speech_tokens: tuple[int, ...]
    reason: EndReason
    timings: Timings
    recognize: Callable[[], str] | None = None

    @cached_property
    def heard(self) -> str | None:
        """What the model heard in the question, read by its recognizer on first use; None as `recognize`."""
        return None if self.recognize is None else self.recognize()

    def __repr__(self) -> str:
        spoken = f"{len(self.audio) / self.sample_rate:.1f} s of speech" if self.audio.size else "no speech"
        return f"Reply({shortened(self.text)!r}, {spoken}, {self.reason})"

    def _repr_html_(self) -> str:
        """Returns the text and a player for notebooks."""
        text = f"<p>{html.escape(self.text)}</p>"
        if not self.audio.size:
            return text
        sound = base64.b64encode(wav_bytes(self.audio, self.sample_rate)).decode()
        return f'{text}<audio controls src="data:audio/wav;base64,{sound}"></audio>'


@torch.inference_mode()
def answer(
    models: Models,
    pcm: Pcm | None = None,
    sample_rate: int = rates.LISTEN_SAMPLE_RATE,
    *,
    text: str = "",
    text_only: bool = False,
    sampling: Sampling | None = None,
) -> Reply:
    """Answers one question.

    Args:
        pcm: the spoken question (S,), float32 in [-1, 1], int16 or bytes of little-endian int16.
        text: the written question, after the spoken part.
        text_only: requests a written reply.

    Returns:
        the reply; its timings cover whole stages only.

    Raises:
        ValueError: the question is empty or too long, or the engine is not the plain one.
    """
    vocabulary, language = models.vocabulary, language_of(models)
    schedule, modality = (TEXT_ONLY, Modality.TEXT) if text_only else (INTERLEAVED, Modality.INTERLEAVED)
    times = [time.perf_counter()]

    with step_threads(models.tokenizer):
        heard = [] if pcm is None else tokenize(models, check_wav(pcm, sample_rate), sample_rate)
    times.append(time.perf_counter())

    question = turn_of(Role.USER, [*vocabulary.speech_ids(heard), *vocabulary.encode_text(text)], vocabulary)
    if not question.ids:
        raise ValueError("nothing was said: give speech or text before asking for a reply")
    conversation = Conversation((question,), vocabulary.hash)
    prompt, sampling = reply_prompt(models, conversation, modality, sampling or models.card.sampling)

    with step_threads(language):
        ids = list(generate(language, vocabulary, prompt, sampling, schedule))
    said = split(ids, vocabulary.kind, schedule)
    codes = vocabulary.speech_codes(said.speech)
    times.append(time.perf_counter())

    with step_threads(models.decoder.flow, models.decoder.vocoder):
        audio = decode(models, codes, sampling.seed, vocabulary.style(said.text))
    times.append(time.perf_counter())

    seconds = [end - start for start, end in pairwise(times)]
    timings = Timings(
        tokenize_s=seconds[0],
        total_s=times[-1] - times[0],
        audio_s=len(audio) / rates.SPEAK_SAMPLE_RATE,
        num_text_tokens=len(said.text),
        num_speech_tokens=len(codes),
        stages=dict(zip(("tokenizer", "language", "decoder"), seconds, strict=True)),
    )
    reason = EndReason.END if said.state.ended else EndReason.LENGTH
    spoken = vocabulary.decode_text(said.text).lstrip()
    recognize = recognition(models, heard)
    return Reply(spoken, audio, rates.SPEAK_SAMPLE_RATE, tuple(codes), reason, timings, recognize)


def recognition(models: Models, codes: Sequence[int]) -> Callable[[], str] | None:
    """Returns what reads these speech tokens; None without a recognizer or tokens."""
    return partial(models.transcribe, tuple(codes)) if codes and models.recognizer is not None else None


def tokenize(models: Models, wav: NDArray[np.float32], sample_rate: int) -> list[int]:
    """Returns the speech tokens of wav (S,), in [0, codebook_size)."""
    wav = StreamingResampler(sample_rate, rates.LISTEN_SAMPLE_RATE).step(wav, last=True)
    device = models.tokenizer.quantizer.codebook.weight.device
    codes: list[int] = models.tokenizer(Padded.full(torch.from_numpy(wav)[None].to(device))).rows()[0].tolist()
    return codes


def language_of(models: Models) -> PreTrainedModel:
    """Returns the language model of the plain engine. Raises ValueError for other engines."""
    if isinstance(models.engine, PlainEngine) and models.engine.language is not None:
        return models.engine.language
    raise ValueError("the straight path needs the plain engine and a model of transformers")


def generate(
    model: PreTrainedModel, vocabulary: Vocabulary, prompt: list[int], sampling: Sampling, schedule: Schedule
) -> Iterator[int]:
    """Generates the ids of a reply, including the end id, with the forward pass of transformers."""
    from transformers import DynamicCache

    masks = DrawMasks(vocabulary, model.get_output_embeddings().weight.shape[0], model.device)
    state, past, ids = DrawState(sampling, schedule), DynamicCache(), prompt
    while not state.ended:
        new = torch.tensor([ids], device=model.device)
        scores = model(input_ids=new, past_key_values=past, use_cache=True, logits_to_keep=1).logits[0, -1:].float()
        ids = draw_exactly(scores, masks.table, rows_of([state.row(masks)], scores.device))
        state.advance(vocabulary.kind(ids[0]))
        yield ids[0]


@torch.inference_mode()
def decode(models: Models, codes: Sequence[int], seed: int = 0, style: str = "") -> NDArray[np.float32]:
    """Decodes speech tokens to audio (S,) float32 in [-1, 1] at 22.05 kHz."""
    return synthesize(codes, models.decoder, models.card, seed, style)
