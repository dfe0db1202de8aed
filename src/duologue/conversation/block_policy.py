"""Which speech tokens of a reply are decoded together, and when: the block policy.

The first block is the smallest there is, 10 tokens, so that sound begins early. From then on sound is played while more
is made, and a block waits for more tokens as long as the sound that is ready allows: few large blocks cost less than
many small ones. In short: never run dry, and with that the fewest blocks.

Time is that of a clock that is given, in seconds.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from duologue import rates

MAX_BLOCK_TOKENS = 40
"""Tokens of a block at most, 3.2 s of sound: what is decoded cannot be taken back when the user interrupts."""


@dataclass
class PlaybackClock:
    """How much of some sound has been played, when each piece is played from its arrival or behind the one before.

    Time is an argument, in seconds of the caller's clock.

    Attributes:
        sent_s: sound so far.
        ends_at: when all of it has been played; None while there was none.
        underruns: times that a piece came after everything before it had been played.
    """

    sent_s: float = 0.0
    ends_at: float | None = None
    underruns: int = 0

    def sent(self, duration_s: float, now: float) -> None:
        """A piece of sound is there."""
        ends_at = now if self.ends_at is None else self.ends_at
        self.underruns += now > ends_at and duration_s > 0
        self.ends_at = max(now, ends_at) + duration_s
        self.sent_s += duration_s

    def played_s(self, now: float) -> float:
        """Seconds of it that have been heard."""
        if self.ends_at is None:
            return 0.0
        return max(0.0, self.sent_s - max(0.0, self.ends_at - now))

    def stop(self, played_s: float) -> None:
        """The listener plays no more than this."""
        self.sent_s, self.ends_at = played_s, None if self.ends_at is None else 0.0

    def is_over(self, now: float) -> bool:
        """Has all of it been played?"""
        return self.ends_at is None or now >= self.ends_at


class BlockPolicy:
    """The policy for one reply.

    A block is decoded when waiting for ten more tokens would be too late: when they, at the pace of the last ids, and
    the decoding after them would be ready less than `margin_s` before playback runs dry. Both are taken `safety` times
    as long as they lately took, since other sessions use the same device. A block takes all whole tens of tokens that
    wait and can be decoded in time, at least ten and at most `max_tokens`.

    Args:
        clock: seconds, by any origin; that of the worker's deadlines.
        max_tokens: a multiple of 10.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        max_tokens: int = MAX_BLOCK_TOKENS,
        safety: float = 2.0,
        margin_s: float = 0.1,
    ) -> None:
        if max_tokens < rates.BLOCK_TOKENS or max_tokens % rates.BLOCK_TOKENS:
            raise ValueError(f"max_tokens must be a multiple of {rates.BLOCK_TOKENS}, got {max_tokens}")
        if safety < 1 or margin_s < 0:
            raise ValueError(f"safety must be at least 1 and margin_s not negative, got {safety} and {margin_s}")
        self._clock, self._max_tokens, self._safety, self._margin_s = clock, max_tokens, safety, margin_s
        self._ids_at: deque[float] = deque(maxlen=32)
        self._decoded: deque[tuple[int, float]] = deque(maxlen=4)  # tokens and seconds of the last blocks
        self._given = rates.BLOCK_TOKENS, 0.0
        self._playback = PlaybackClock()

    @property
    def runs_dry_at(self) -> float | None:
        """When playback has used up all sound so far; None before the first sound."""
        return self._playback.ends_at

    def took_id(self) -> None:
        """The language model gave one more id, text or speech."""
        self._ids_at.append(self._clock())

    def gave_block(self, num_tokens: int) -> None:
        """So many tokens have been given to the decoder, the only ones that it has now."""
        self._given = max(num_tokens, rates.BLOCK_TOKENS), self._clock()

    def took_sound(self, audio_s: float) -> None:
        """The block that was given has become sound of this length, which is played behind what there was."""
        num_tokens, begun = self._given
        now = self._clock()
        self._decoded.append((num_tokens, now - begun))
        self._playback.sent(audio_s, now)

    def block_size(self, num_waiting: int, num_ids_to_next: int | None) -> int:
        """Tokens to decode now, 0 to wait.

        Args:
            num_waiting: speech tokens that are not decoded.
            num_ids_to_next: ids, text among them, until there are ten more of them; None when no more will come.
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
        """How long a block of the tens that wait may be put off; not above 0: no longer."""
        if not self._decoded or num_waiting < rates.BLOCK_TOKENS:
            return 0.0
        more = num_waiting // rates.BLOCK_TOKENS * rates.BLOCK_TOKENS + rates.BLOCK_TOKENS
        return self._spare_s(min(more, self._max_tokens)) - self._safety * num_ids_to_next * self._id_s()

    def _spare_s(self, num_tokens: int) -> float:
        """Seconds by which a block that is begun now would be ready too early."""
        assert self.runs_dry_at is not None
        # A larger block is taken to last longer in proportion, a smaller one as long as the larger.
        decode_s = max(seconds * max(1.0, num_tokens / known) for known, seconds in self._decoded)
        return self.runs_dry_at - self._clock() - self._safety * decode_s - self._margin_s

    def _id_s(self) -> float:
        """Seconds between ids lately, the one that is being waited for included."""
        return (self._clock() - self._ids_at[0]) / len(self._ids_at) if self._ids_at else 0.0
