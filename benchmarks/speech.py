"""What the benches listen to: the recorded questions of the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from duologue import rates
from duologue.conversation.chatbot import model_folder
from duologue.sound_files import load_audio


def questions(folder: Path | None = None) -> list[NDArray[np.float32]]:
    """All recorded questions of the package, or the recordings in a folder, each wav (S,) at 16 kHz.

    Raises:
        ValueError: the folder has no recordings (.wav, .flac), or one cannot be read.
    """
    if folder is None:
        package = model_folder()
        paths = [package / "question.wav", *sorted((package / "questions").glob("*.flac"))]
    else:
        paths = sorted(path for path in folder.glob("*") if path.suffix in (".wav", ".flac"))
    if not paths:
        raise ValueError(f"{folder} has no recordings, which are files .wav or .flac")
    return [load_audio(path, rates.LISTEN_SAMPLE_RATE)[0] for path in paths]


def speech_of(seconds: float) -> NDArray[np.float32]:
    """Wav (S,) at 16 kHz of exactly that length: the questions one after the other, from the first again at the end."""
    num_samples = round(seconds * rates.LISTEN_SAMPLE_RATE)
    said = np.concatenate(questions())
    return np.tile(said, -(-num_samples // len(said)))[:num_samples]


def chunks(wav: NDArray[np.float32], chunk_ms: float) -> list[NDArray[np.float32]]:
    """A wav at 16 kHz as a microphone gives it; the last chunk may be shorter."""
    size = round(chunk_ms * rates.LISTEN_SAMPLE_RATE / 1000)
    return [wav[at : at + size] for at in range(0, len(wav), size)]
