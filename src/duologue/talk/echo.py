"""Echo cancellation of `duologue talk`: the answer that the loudspeaker plays is taken out of the microphone.

Without it, the server takes the answer for a question and interrupts it. Browsers have an echo canceller of their own.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from duologue.client.connection import WIRE_RATE

FRAME = WIRE_RATE // 100  # samples: WebRTC's canceller takes 10 ms


class EchoCanceller:
    """The echo canceller of WebRTC (package `livekit`); it finds the delay of the echo itself.

    The devices' threads and the event loop may call it at the same time.

    Raises:
        ImportError: livekit is not installed.
    """

    def __init__(self) -> None:
        from livekit.rtc import AudioFrame
        from livekit.rtc.apm import AudioProcessingModule

        self._frame = AudioFrame
        self._canceller = AudioProcessingModule(echo_cancellation=True, high_pass_filter=True)
        self._lock = threading.Lock()
        self._played = np.zeros(0, np.int16)  # less than a frame each
        self._recorded = np.zeros(0, np.int16)

    def play(self, pcm: NDArray[np.int16]) -> None:
        """Takes what the loudspeaker gets next: (S,) at `WIRE_RATE`, silence too."""
        with self._lock:
            frames, self._played = _frames(self._played, pcm)
            for frame in frames:
                self._canceller.process_reverse_stream(self._frame(frame.tobytes(), WIRE_RATE, 1, FRAME))

    def clean(self, pcm: NDArray[np.int16]) -> NDArray[np.int16]:
        """Returns recorded samples (S,) at `WIRE_RATE` without the echo, in whole frames; the rest comes with the next
        call."""
        with self._lock:
            frames, self._recorded = _frames(self._recorded, pcm)
            cleaned = []
            for frame in frames:
                recorded = self._frame(frame.tobytes(), WIRE_RATE, 1, FRAME)
                self._canceller.process_stream(recorded)
                cleaned.append(np.frombuffer(bytes(recorded.data), np.int16))
        return np.concatenate(cleaned) if cleaned else np.zeros(0, np.int16)


def open_echo_canceller() -> EchoCanceller | None:
    """Returns a canceller, or None if livekit is not installed or has no library for this machine."""
    try:
        return EchoCanceller()
    except (ImportError, OSError):
        return None


def _frames(rest: NDArray[np.int16], pcm: NDArray[np.int16]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Whole frames (N, FRAME) of the samples so far, and the rest."""
    joined = np.concatenate([rest, pcm])
    whole = len(joined) // FRAME * FRAME
    return joined[:whole].reshape(-1, FRAME), joined[whole:]
