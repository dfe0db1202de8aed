"""The block policy: which speech tokens of a reply are decoded together, and when.

The first block is the smallest, 10 tokens, for a short time to first audio. Later blocks wait as long as playback
allows, because a few large blocks cost less than many small ones. All times are seconds of an injected clock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from duologue import rates

MAX_BLOCK_TOKENS = 40
"""Maximum tokens of a block, 3.2 s of audio: decoded audio cannot be revoked at barge-in."""


ACK_TOLERANCE_S = 0.05
"""Audio at the end of a reply that a client need not acknowledge."""


@dataclass
class PlaybackClock:
    """The playback position: an estimate, or what the client acknowledges.

    In the estimate, each chunk plays on arrival, or after the previous one.

    Attributes:
        sent_s: duration of all chunks.
        ends_at: time at which playback ends; None before the first chunk.
        underruns: number of chunks that arrived after playback had ended.
        acked_s: the acknowledged position; None means the estimate counts.
        stopped: whether playback was stopped; later acknowledgments are late.
    """

    sent_s: float = 0.0
    ends_at: float | None = None
    underruns: int = 0
    acked_s: float | None = None
    stopped: bool = False

    def sent(self, duration_s: float, now: float) -> None:
        """Records a new chunk."""
        ends_at = now if self.ends_at is None else self.ends_at
        self.underruns += now > ends_at and duration_s > 0
        self.ends_at = max(now, ends_at) + duration_s
        self.sent_s += duration_s

    def played_s(self, now: float) -> float:
        """Returns the seconds of audio played so far."""
        if self.ends_at is None:
            return 0.0
        if self.acked_s is not None:
            return self.acked_s
        return max(0.0, self.sent_s - max(0.0, self.ends_at - now))

    def stop(self, played_s: float) -> None:
        """Ends playback at `played_s`."""
        self.sent_s, self.ends_at = played_s, None if self.ends_at is None else 0.0
        self.acked_s, self.stopped = None, True

    def ack(self, played_s: float) -> None:
        """Records the client's report that it has played `played_s`. The position never moves back."""
        if not self.stopped:
            self.acked_s = max(self.acked_s or 0.0, min(played_s, self.sent_s))

    def is_over(self, now: float) -> bool:
        """Returns whether all audio was played."""
        if self.ends_at is None or self.acked_s is None:
            return self.ends_at is None or now >= self.ends_at
        return self.acked_s >= self.sent_s - ACK_TOLERANCE_S


class BlockPolicy:
    """The block policy of one reply.

    A block is decoded when waiting for ten more tokens would leave less than `margin_s` before playback underruns. The
    estimate multiplies recent durations of ids and decoding by `safety`, because sessions share the device. A block
    takes all waiting tens of tokens that can be decoded in time, between 10 and `max_tokens`.

    Args:
        clock: the clock of the worker's deadlines.
        max_tokens: a multiple of 10.
        max_ahead_s: seconds of a reply that may exist beyond what was played; None for no limit.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        max_tokens: int = MAX_BLOCK_TOKENS,
        safety: float = 2.0,
        margin_s: float = 0.1,
        max_ahead_s: float | None = None,
    ) -> None:
        if max_tokens < rates.BLOCK_TOKENS or max_tokens % rates.BLOCK_TOKENS:
            raise ValueError(f"max_tokens must be a multiple of {rates.BLOCK_TOKENS}, got {max_tokens}")
        if safety < 1 or margin_s < 0:
            raise ValueError(f"safety must be at least 1 and margin_s not negative, got {safety} and {margin_s}")
        self._clock, self._max_tokens, self._safety, self._margin_s = clock, max_tokens, safety, margin_s
        self._max_ahead_s = max_ahead_s
        self._ids_at: deque[float] = deque(maxlen=32)
        self._decoded: deque[tuple[int, float]] = deque(maxlen=4)  # tokens and seconds of the last blocks
        self._given = rates.BLOCK_TOKENS, 0.0
        self._playback = PlaybackClock()

    @property
    def runs_dry_at(self) -> float | None:
        """Time at which playback underruns; None before the first audio."""
        return self._playback.ends_at

    def hold_s(self, num_waiting: int) -> float:
        """Returns for how many seconds no further id is wanted, because the reply is far ahead of its playback.

        Ids that a listener interrupts unheard cost as much as others; the engine pauses a reply whose ids wait.

        Args:
            num_waiting: speech tokens not yet given to the decoder.
        """
        if self._max_ahead_s is None or self.runs_dry_at is None:
            return 0.0
        ahead_s = self.runs_dry_at - self._clock() + num_waiting / rates.TOKEN_RATE
        return max(ahead_s - self._max_ahead_s, 0.0)

    def took_id(self) -> None:
        """Records that the language model produced an id."""
        self._ids_at.append(self._clock())

    def gave_block(self, num_tokens: int) -> None:
        """Records that a block of `num_tokens` was given to the decoder."""
        self._given = max(num_tokens, rates.BLOCK_TOKENS), self._clock()

    def took_sound(self, audio_s: float) -> None:
        """Records that the block in progress became audio of this duration."""
        num_tokens, begun = self._given
        now = self._clock()
        self._decoded.append((num_tokens, now - begun))
        self._playback.sent(audio_s, now)

    def block_size(self, num_waiting: int, num_ids_to_next: int | None) -> int:
        """Returns the number of tokens to decode now; 0 means wait.

        Args:
            num_waiting: speech tokens not yet given to the decoder.
            num_ids_to_next: ids, text included, until ten more tokens exist; None at the end of the reply.
        """
        whole = min(num_waiting // rates.BLOCK_TOKENS * rates.BLOCK_TOKENS, self._max_tokens)
        if not self._decoded:
            return min(num_waiting, rates.BLOCK_TOKENS) if num_ids_to_next is None else min(whole, rates.BLOCK_TOKENS)
        if num_ids_to_next is None and num_waiting <= self._max_tokens and self._spare_s(num_waiting) >= 0:
            return num_waiting
        while whole > rates.BLOCK_TOKENS and self._spare_s(whole) < 0:
            whole -= rates.BLOCK_TOKENS
        if num_ids_to_next is None:
            return whole or num_waiting
        return 0 if whole < self._max_tokens and self.wait_s(num_waiting, num_ids_to_next) > 0 else whole

    def wait_s(self, num_waiting: int, num_ids_to_next: int) -> float:
        """Returns for how many seconds the waiting block may be postponed; 0 or less means not at all."""
        if not self._decoded or num_waiting < rates.BLOCK_TOKENS:
            return 0.0
        more = num_waiting // rates.BLOCK_TOKENS * rates.BLOCK_TOKENS + rates.BLOCK_TOKENS
        return self._spare_s(min(more, self._max_tokens)) - self._safety * num_ids_to_next * self._id_s()

    def _spare_s(self, num_tokens: int) -> float:
        """Returns the seconds between the completion of a block started now and the underrun."""
        assert self.runs_dry_at is not None
        # A larger block is assumed to take proportionally longer, a smaller one equally long.
        decode_s = max(seconds * max(1.0, num_tokens / known) for known, seconds in self._decoded)
        return self.runs_dry_at - self._clock() - self._safety * decode_s - self._margin_s

    def _id_s(self) -> float:
        """Returns the recent seconds per id, including the current wait."""
        return (self._clock() - self._ids_at[0]) / len(self._ids_at) if self._ids_at else 0.0
