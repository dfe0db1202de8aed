"""Optional recordings of conversations: one folder per session with the audio of both sides and the turns.

    FOLDER/20261122T214310Z_sess_.../
        conversation.wav     left the user, right the answers as far as they were heard, one clock
        conversation.json    the turns as ids, for `Conversation.load`
        session.json         time, model, duration and the caller's fields (such as the items with their text)

During the session, all files are in a hidden folder in FOLDER. It is renamed when it is complete.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
from numpy.typing import NDArray

from duologue.audio import StreamingResampler
from duologue.pcm import to_int16
from duologue.turns import Conversation

SAMPLE_RATE = 24_000
MAX_DRIFT_S = 0.3  # a longer gap between chunks is a pause in speech
_COPY_S = 60


class _Track:
    """The 16-bit samples of one side in a file, placed on the session's clock."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._rate = 0
        self._resampler = StreamingResampler(SAMPLE_RATE, SAMPLE_RATE)
        self.num_samples = 0
        self.start = 0  # first sample of the current stretch

    def add(self, wav: NDArray[np.float32], sample_rate: int, earliest: int) -> None:
        """Adds audio that cannot start before the sample `earliest`; fills a pause with silence."""
        if sample_rate != self._rate:
            self._rate, self._resampler = sample_rate, StreamingResampler(sample_rate, SAMPLE_RATE)
        if earliest - self.num_samples > MAX_DRIFT_S * SAMPLE_RATE:
            self._write(np.zeros(earliest - self.num_samples, "<i2"))
        self._write_wav(self._resampler.step(wav))

    def end(self) -> None:
        """Ends the reply or utterance; flushes the resampler."""
        if self._rate:
            self._write_wav(self._resampler.step(np.zeros(0, np.float32), last=True))
        self._rate = 0

    def cut(self, num_samples: int) -> None:
        """Truncates the current stretch to `num_samples` and ends it."""
        self._rate = 0
        keep = min(self.start + num_samples, self.num_samples)
        self._file.seek(2 * keep)
        self._file.truncate()
        self.num_samples = keep

    def _write_wav(self, wav: NDArray[np.float32]) -> None:
        self._write(to_int16(wav))

    def _write(self, samples: NDArray[np.int16]) -> None:
        self._file.write(samples.tobytes())
        self.num_samples += len(samples)


class SessionRecorder:
    """Records the audio of one session. Writes go to the page cache and do not block.

    Args:
        folder: folder of all recordings; created if missing.
        session_id: id in the recording's name.
        model: name of the model.
        clock: returns seconds.
    """

    def __init__(self, folder: Path, session_id: str, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._began = datetime.now(UTC)
        self._name = f"{self._began:%Y%m%dT%H%M%SZ}_{session_id}"
        self._folder, self._clock, self._start = folder, clock, clock()
        self._about = {"session_id": session_id, "model": model, "began": self._began.isoformat()}
        self._partial = folder / f".{self._name}.partial"
        self._partial.mkdir(0o700, parents=True)
        self._files = [(self._partial / name).open("w+b") for name in ("user.pcm", "assistant.pcm")]
        self._user, self._assistant = map(_Track, self._files)
        self._begins = True

    def heard(self, wav: NDArray[np.float32], sample_rate: int) -> None:
        """Adds user audio, wav (S,), that ends now."""
        self._user.add(wav, sample_rate, self._now() - int(len(wav) * SAMPLE_RATE / sample_rate))

    def begin_reply(self) -> None:
        """Starts a reply: `cut` counts from its first sample."""
        self._assistant.end()
        self._begins = True

    def spoke(self, wav: NDArray[np.float32], sample_rate: int) -> None:
        """Adds reply audio, wav (S,), played now or after the audio before it."""
        track = self._assistant
        if self._begins:
            track.start, self._begins = max(track.num_samples, self._now()), False
        track.add(wav, sample_rate, track.start)

    def cut(self, played_ms: float) -> None:
        """Truncates the reply after `played_ms`, where the user interrupted it."""
        self._assistant.cut(int(played_ms * SAMPLE_RATE / 1000))

    def finish(self, conversation: Conversation, about: dict[str, Any] | None = None) -> Path:
        """Writes the files and renames the folder. Slow: call it in a thread.

        Args:
            conversation: the turns.
            about: JSON values for `session.json`.

        Returns:
            the folder of the recording.
        """
        for track in (self._user, self._assistant):
            track.end()
        seconds = max(self._user.num_samples, self._assistant.num_samples) / SAMPLE_RATE
        ended = datetime.now(UTC).isoformat()
        description = {**self._about, "ended": ended, "audio_s": seconds, "sample_rate": SAMPLE_RATE, **(about or {})}
        self._join(self._partial / "conversation.wav")
        for file in self._files:
            file.close()
            Path(file.name).unlink()
        conversation.save(self._partial / "conversation.json")
        text = json.dumps(description, indent=1, ensure_ascii=False)
        (self._partial / "session.json").write_text(text, encoding="utf-8")
        final = self._folder / self._name
        self._partial.rename(final)
        return final

    def discard(self) -> None:
        """Deletes the unfinished recording."""
        for file in self._files:
            file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _join(self, path: Path) -> None:
        for file in self._files:
            file.seek(0)
        with soundfile.SoundFile(path, "w", SAMPLE_RATE, 2, "PCM_16") as wav:
            while any(rows := [file.read(2 * SAMPLE_RATE * _COPY_S) for file in self._files]):
                tracks = [np.frombuffer(row, "<i2") for row in rows]
                both = np.zeros((max(map(len, tracks)), 2), np.int16)
                for column, track in enumerate(tracks):
                    both[: len(track), column] = track
                wav.write(both)

    def _now(self) -> int:
        return int((self._clock() - self._start) * SAMPLE_RATE)


def remove_leftovers(folder: Path) -> int:
    """Deletes unfinished recordings of a killed server; returns their number."""
    leftovers = list(folder.glob(".*_sess_*.partial"))
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return len(leftovers)
