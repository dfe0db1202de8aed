"""A conversation on disk, only when asked for: one folder a session with the sound of both sides and what was said.

    FOLDER/20261122T214310Z_sess_.../
        conversation.wav     left the user, right the answers as far as they were heard, one clock
        conversation.json    the turns as ids, `Conversation.load` reads it
        session.json         when, which model, how long, and what the caller adds (such as the items with their text)

While the session lasts, everything lies in a hidden folder beside; it gets its name when it is whole.
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
MAX_DRIFT_S = 0.3  # sound that comes so much later than the sound before it ended was spoken after a pause
_SECONDS_AT_ONCE = 60


class _Side:
    """16-bit samples of one side in a file, at the times when they sounded."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._rate = 0
        self._resampler = StreamingResampler(SAMPLE_RATE, SAMPLE_RATE)
        self.num_samples = 0
        self.start = 0  # of the stretch under way

    def add(self, wav: NDArray[np.float32], sample_rate: int, earliest: int) -> None:
        """Adds sound that cannot have begun before the sample `earliest`; a pause before it is silence."""
        if sample_rate != self._rate:
            self._rate, self._resampler = sample_rate, StreamingResampler(sample_rate, SAMPLE_RATE)
        if earliest - self.num_samples > MAX_DRIFT_S * SAMPLE_RATE:
            self._write(np.zeros(earliest - self.num_samples, "<i2"))
        self._write_wav(self._resampler.step(wav))

    def end(self) -> None:
        """The stretch is over: writes what the resampler holds back."""
        if self._rate:
            self._write_wav(self._resampler.step(np.zeros(0, np.float32), last=True))
        self._rate = 0

    def cut(self, num_samples: int) -> None:
        """Takes away what comes after `num_samples` of the stretch under way, which ends it."""
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
    """Takes the sound of one session as it comes and goes. Writes go to the system's cache: they do not wait.

    Args:
        folder: where recordings lie; made when it is not there.
        clock: seconds.
    """

    def __init__(self, folder: Path, session_id: str, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._began = datetime.now(UTC)
        self._name = f"{self._began:%Y%m%dT%H%M%SZ}_{session_id}"
        self._folder, self._clock, self._start = folder, clock, clock()
        self._about = {"session_id": session_id, "model": model, "began": self._began.isoformat()}
        self._partial = folder / f".{self._name}.partial"
        self._partial.mkdir(0o700, parents=True)
        self._files = [(self._partial / name).open("w+b") for name in ("user.pcm", "assistant.pcm")]
        self._user, self._assistant = map(_Side, self._files)
        self._begins = True

    def heard(self, wav: NDArray[np.float32], sample_rate: int) -> None:
        """Sound of the user, wav (S,), that ends now."""
        self._user.add(wav, sample_rate, self._now() - int(len(wav) * SAMPLE_RATE / sample_rate))

    def begin_reply(self) -> None:
        """A reply begins: `cut` counts from its first sound."""
        self._assistant.end()
        self._begins = True

    def spoke(self, wav: NDArray[np.float32], sample_rate: int) -> None:
        """Sound of the reply, wav (S,), that is played now or when what is before it has been played."""
        side = self._assistant
        if self._begins:
            side.start, self._begins = max(side.num_samples, self._now()), False
        side.add(wav, sample_rate, side.start)

    def cut(self, played_ms: float) -> None:
        """The user interrupted the reply after so much of it: the rest was not heard."""
        self._assistant.cut(int(played_ms * SAMPLE_RATE / 1000))

    def finish(self, conversation: Conversation, about: dict[str, Any] | None = None) -> Path:
        """Writes everything and gives the recording its name. Takes a while: call it in a thread.

        Args:
            about: JSON values for `session.json`.
        Returns:
            the recording's folder.
        """
        for side in (self._user, self._assistant):
            side.end()
        seconds = max(self._user.num_samples, self._assistant.num_samples) / SAMPLE_RATE
        ended = datetime.now(UTC).isoformat()
        told = {**self._about, "ended": ended, "audio_s": seconds, "sample_rate": SAMPLE_RATE, **(about or {})}
        self._join(self._partial / "conversation.wav")
        for file in self._files:
            file.close()
            Path(file.name).unlink()
        conversation.save(self._partial / "conversation.json")
        text = json.dumps(told, indent=1, ensure_ascii=False)
        (self._partial / "session.json").write_text(text, encoding="utf-8")
        final = self._folder / self._name
        self._partial.rename(final)
        return final

    def discard(self) -> None:
        """Leaves nothing behind."""
        for file in self._files:
            file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _join(self, path: Path) -> None:
        for file in self._files:
            file.seek(0)
        with soundfile.SoundFile(path, "w", SAMPLE_RATE, 2, "PCM_16") as wav:
            while any(rows := [file.read(2 * SAMPLE_RATE * _SECONDS_AT_ONCE) for file in self._files]):
                sides = [np.frombuffer(row, "<i2") for row in rows]
                both = np.zeros((max(map(len, sides)), 2), np.int16)
                for column, side in enumerate(sides):
                    both[: len(side), column] = side
                wav.write(both)

    def _now(self) -> int:
        return int((self._clock() - self._start) * SAMPLE_RATE)


def remove_leftovers(folder: Path) -> int:
    """Removes what a server left behind that was killed while it recorded; returns how many sessions that were."""
    leftovers = list(folder.glob(".*_sess_*.partial"))
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return len(leftovers)
