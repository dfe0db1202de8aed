"""The block policy, simulated: sound never stops before the reply does, with few blocks."""

from dataclasses import dataclass, field

import pytest

from duologue.conversation.block_policy import BlockPolicy
from duologue.interleave import INTERLEAVED
from duologue.rates import TOKEN_RATE


@dataclass
class Talk:
    """One simulated reply: ids come at a pace, decoding takes a base and a share for each token."""

    id_s: float
    base_s: float
    token_s: float
    num_speech: int = 200
    jitter: tuple[float, ...] = (1.0,)
    fixed: bool = False
    now: float = 0.0
    blocks: list[int] = field(default_factory=list)
    underruns: int = 0
    first_sound: float | None = None

    def arrivals(self) -> list[float]:
        """When each speech token comes: runs of text stand between those of speech, for half of the reply."""
        times, time = [], 0.0
        for index in range(self.num_speech):
            if index % INTERLEAVED.speech_run == 0 and index < self.num_speech / 2:
                time += INTERLEAVED.text_run * self.id_s
            time += self.id_s
            times.append(time)
        return times

    def run(self) -> "Talk":
        policy = BlockPolicy(clock=lambda: self.now)
        arrivals = self.arrivals()
        decoded, come, done_at, dry = 0, 0, None, None
        while decoded < self.num_speech or done_at is not None:
            while come < self.num_speech and arrivals[come] <= self.now:
                come += 1
                policy.took_id()
            ended = come == self.num_speech
            if done_at is not None and self.now >= done_at:
                done_at, size = None, self.blocks[-1]
                audio_s = size / TOKEN_RATE
                if dry is not None and self.now > dry:
                    self.underruns += 1
                if self.first_sound is None:
                    self.first_sound = self.now
                dry = max(dry or self.now, self.now) + audio_s
                policy.took_sound(audio_s)
                assert policy.runs_dry_at == pytest.approx(dry)
            if done_at is None and decoded < self.num_speech:
                waiting = come - decoded
                to_next = None if ended else 10 - waiting % 10 + INTERLEAVED.text_run
                size = policy.block_size(waiting, to_next)
                if self.fixed:
                    size = 10 if waiting >= 10 else waiting if ended else 0
                if size:
                    assert size <= waiting
                    assert size % 10 == 0 or (ended and size == waiting)
                    slow = self.jitter[len(self.blocks) % len(self.jitter)]
                    done_at = self.now + slow * (self.base_s + self.token_s * size)
                    policy.gave_block(size)
                    self.blocks.append(size)
                    decoded += size
            self.now += 0.005
        assert sum(self.blocks) == self.num_speech
        return self


@pytest.mark.parametrize("jitter", [(1.0,), (1.0, 1.6, 0.8, 1.3)])
@pytest.mark.parametrize("base_s", [0.01, 0.1])
@pytest.mark.parametrize("id_s", [0.002, 0.01, 0.03, 0.045])
def test_never_dry_and_fewer_blocks_than_ten_each(id_s: float, base_s: float, jitter: tuple[float, ...]) -> None:
    talk = Talk(id_s, base_s, 0.012, jitter=jitter).run()
    fixed = Talk(id_s, base_s, 0.012, jitter=jitter, fixed=True).run()
    assert talk.blocks[0] == 10
    assert talk.first_sound == fixed.first_sound
    assert talk.underruns == 0
    if id_s <= 0.01:
        assert len(talk.blocks) <= 0.5 * len(fixed.blocks)
    assert len(talk.blocks) < len(fixed.blocks)


def test_a_device_at_its_limit_gets_the_smallest_blocks_at_once() -> None:
    """Ids as fast as they are spoken and decoding as slow: nothing can be saved up, so nothing waits."""
    talk = Talk(id_s=0.07, base_s=0.0, token_s=0.06, num_speech=100).run()
    assert set(talk.blocks[:-1]) == {10}


def test_a_block_is_bounded() -> None:
    now = 0.0
    policy = BlockPolicy(clock=lambda: now, max_tokens=30)
    assert policy.block_size(9, 5) == 0
    assert policy.block_size(25, 5) == 10
    assert policy.block_size(7, None) == 7
    for _ in range(10):
        policy.took_id()
    policy.gave_block(10)
    policy.took_sound(100.0)
    assert policy.block_size(200, 5) == 30
    assert policy.block_size(200, None) == 30
    assert policy.block_size(29, 1) == 0
    now = 99.0
    assert policy.block_size(29, 100) == 20


@pytest.mark.parametrize("wrong", [{"max_tokens": 15}, {"max_tokens": 0}, {"safety": 0.5}, {"margin_s": -1.0}])
def test_bad_settings_name_the_value(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BlockPolicy(**wrong)  # type: ignore[arg-type]


def test_a_reply_far_ahead_of_its_playback_is_held() -> None:
    now = 0.0
    policy = BlockPolicy(clock=lambda: now, max_ahead_s=4.0)
    assert policy.hold_s(500) == 0.0  # nothing plays yet
    policy.gave_block(10)
    policy.took_sound(3.0)
    assert policy.hold_s(12) == 0.0  # 3 s of sound and 0.96 s of tokens
    assert policy.hold_s(25) == pytest.approx(1.0)
    now = 1.0
    assert policy.hold_s(25) == 0.0
    assert BlockPolicy(clock=lambda: now).hold_s(10**6) == 0.0
