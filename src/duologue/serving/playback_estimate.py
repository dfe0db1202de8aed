"""How much of a reply its listener has heard by now, as far as the server can tell: sound is played from when it was
sent, one piece after the other. Time is an argument; nothing here looks at a clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Playback:
    """Attributes:
    sent_ms: sound sent so far.
    ends: when all of it has been played, seconds of the caller's clock; None while nothing was sent.
    underruns: times that a piece came after everything before it had been played.
    """

    sent_ms: float = 0.0
    ends: float | None = None
    underruns: int = 0

    def sent(self, duration_ms: float, now: float) -> None:
        """A piece of sound left the server."""
        if duration_ms <= 0:
            return
        if self.ends is not None and now > self.ends:
            self.underruns += 1
        self.ends = max(now, self.ends if self.ends is not None else now) + duration_ms / 1000
        self.sent_ms += duration_ms

    def played_ms(self, now: float) -> float:
        """What has been heard of it."""
        if self.ends is None:
            return 0.0
        return max(0.0, self.sent_ms - 1000 * max(0.0, self.ends - now))

    def stop(self, played_ms: float) -> None:
        """The listener plays no more than this."""
        self.sent_ms, self.ends = played_ms, None if self.ends is None else 0.0

    def is_over(self, now: float) -> bool:
        return self.ends is None or now >= self.ends
