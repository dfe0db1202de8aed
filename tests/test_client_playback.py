"""The client's playback queue: playback position, underruns, cuts."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duologue.client.playback import Playback, PlaybackPosition
from tests.clock import Clock

RATE = 1000  # one sample is one millisecond


def sound(first: int, num: int) -> np.ndarray:
    return np.arange(first, first + num, dtype=np.int16) + 1


def test_plays_what_was_added_in_order_and_silence_after_it() -> None:
    playback = Playback(RATE, ahead_ms=0)
    playback.add("a", sound(0, 5))
    playback.add("a", sound(5, 5))
    playback.end("a")
    playback.add("b", sound(100, 4))
    playback.end("b")
    assert playback.take(8).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert playback.take(8).tolist() == [9, 10, 101, 102, 103, 104, 0, 0]
    assert playback.num_gaps == 0
    assert playback.gap_ms == 0


def test_an_item_starts_once_enough_of_it_waits_or_all_of_it_has_come() -> None:
    playback = Playback(RATE, ahead_ms=60)
    playback.add("a", sound(0, 59))
    assert not playback.take(10).any()
    playback.add("a", sound(59, 1))
    assert playback.take(10).tolist() == sound(0, 10).tolist()
    playback.cut()
    playback.add("b", sound(0, 3))
    assert not playback.take(10).any()
    playback.end("b")
    assert playback.take(4).tolist() == [1, 2, 3, 0]
    assert playback.num_gaps == 0  # waiting to start is no gap


def test_running_dry_in_the_middle_is_a_gap_and_at_the_end_it_is_not() -> None:
    playback = Playback(RATE, ahead_ms=0)
    playback.add("a", sound(0, 10))
    assert playback.take(15).tolist() == [*range(1, 11), 0, 0, 0, 0, 0]
    playback.take(20)
    assert playback.num_gaps == 0  # only later audio makes it a gap
    playback.add("a", sound(10, 5))
    assert (playback.num_gaps, playback.gap_ms) == (1, 25.0)
    playback.take(30)
    playback.end("a")
    assert (playback.num_gaps, playback.gap_ms) == (1, 25.0)
    assert not playback.take(5).any()


def test_a_cut_says_what_was_heard_and_not_what_was_given_to_the_device() -> None:
    clock = Clock(100.0)
    playback = Playback(RATE, ahead_ms=0, clock=clock)
    playback.add("a", sound(0, 1000))
    playback.take(100, delay_s=0.05)  # heard from 50 ms from now on, until 150 ms
    clock.now += 0.02
    playback.take(100, delay_s=0.13)  # until 230 ms from here
    clock.now += 0.1  # 130 ms in the device still, 70 were heard
    assert playback.active
    assert playback.cut() == [PlaybackPosition("a", 70)]
    assert not playback.active
    playback.add("a", sound(0, 10))  # on the way when the cut came
    assert not playback.take(10).any()


def test_an_item_in_the_device_counts_as_unheard_though_nothing_of_it_waits() -> None:
    clock = Clock(100.0)
    playback = Playback(RATE, ahead_ms=0, clock=clock)
    playback.add("a", sound(0, 100))
    playback.end("a")
    playback.add("b", sound(0, 100))
    playback.end("b")
    playback.take(200)
    clock.now += 0.04
    assert playback.cut() == [PlaybackPosition("a", 40), PlaybackPosition("b", 0)]


def test_nothing_is_cut_when_everything_was_heard() -> None:
    clock = Clock(100.0)
    playback = Playback(RATE, ahead_ms=0, clock=clock)
    playback.add("a", sound(0, 100))
    playback.end("a")
    playback.take(100)
    clock.now += 0.1
    assert not playback.active
    assert playback.cut() == []


def test_more_than_the_stated_most_is_refused() -> None:
    playback = Playback(RATE, max_s=1.0)
    playback.add("a", sound(0, 900))
    with pytest.raises(ValueError, match="more than 1 s of audio ahead"):
        playback.add("a", sound(0, 101))


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=8),
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.integers(0, 30),
)
def test_whatever_the_chunks_every_sample_is_played_once_and_a_cut_is_exact(
    added: list[int], taken: list[int], cut_after: int
) -> None:
    clock = Clock(100.0)
    playback = Playback(RATE, ahead_ms=0, clock=clock)
    total = sum(added)
    first = 0
    for num in added:
        playback.add("a", sound(first, num))
        first += num
    played = []
    for num in taken[:cut_after]:
        played += playback.take(num).tolist()
        clock.now += num / RATE
    heard = min(len(played), total)
    assert played[:heard] == sound(0, heard).tolist()
    assert not any(played[heard:])
    assert playback.cut() == [PlaybackPosition("a", heard)]


def test_two_threads_lose_nothing() -> None:
    playback = Playback(RATE, ahead_ms=0)
    total, played = 30_000, []

    def receive() -> None:
        for first in range(0, total, 100):
            playback.add("a", sound(first, 100))
        playback.end("a")

    thread = threading.Thread(target=receive)
    thread.start()
    while thread.is_alive() or playback.num_waiting:
        played += playback.take(37).tolist()
    thread.join()
    played += playback.take(37).tolist()
    assert [sample for sample in played if sample] == sound(0, total).tolist()


def test_what_the_device_has_played_is_known() -> None:
    clock = Clock()
    playback = Playback(RATE, ahead_ms=0, clock=clock)
    assert playback.heard is None
    playback.add("a", sound(0, 50))
    playback.end("a")
    playback.add("b", sound(0, 50))
    playback.take(80, delay_s=0.02)
    assert playback.heard is None  # still inside the device
    clock.now += 0.05
    assert playback.heard == PlaybackPosition("a", 30)
    clock.now += 0.03
    assert playback.heard == PlaybackPosition("b", 10)
    clock.now += 1.0
    assert playback.heard == PlaybackPosition("b", 30)
