"""Rates: the figures of the paper and the arithmetic between tokens, frames and samples."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duologue import rates

counts = st.integers(min_value=0, max_value=1_000_000)


def test_the_figures_of_the_paper() -> None:
    assert rates.TOKEN_RATE == 12.5
    assert rates.SAMPLES_PER_TOKEN == 1280
    assert rates.LISTEN_FRAME_RATE == 100
    assert rates.ENCODER_FRAME_RATE == 50
    assert (rates.FRAMES_PER_TOKEN.numerator, rates.FRAMES_PER_TOKEN.denominator) == (441, 64)
    assert rates.BLOCK_S == 0.8


@pytest.mark.parametrize("num_tokens", [2240, 3392, 3648, 3776, 4160, 4416, 4480])
def test_frames_are_exact_where_floating_point_is_not(num_tokens: int) -> None:
    assert rates.frames_for_tokens(num_tokens) == 441 * num_tokens // 64


@given(counts)
def test_frame_and_token_indices_belong_together(token: int) -> None:
    first = -(-441 * token // 64)
    assert rates.token_of_frame(first) == token
    assert first == 0 or rates.token_of_frame(first - 1) == token - 1
    assert rates.frames_for_tokens(token) in (first, first - 1)


@given(counts)
def test_a_block_has_68_or_69_frames_of_its_own_tokens(block: int) -> None:
    start, stop = rates.BLOCK_TOKENS * block, rates.BLOCK_TOKENS * (block + 1)
    frames = range(rates.frames_for_tokens(start), rates.frames_for_tokens(stop))
    assert len(frames) in (68, 69)
    assert rates.token_of_frame(frames[0]) in (start - 1, start)
    assert rates.token_of_frame(frames[1]) == start
    assert rates.token_of_frame(frames[-1]) == stop - 1


@given(counts)
def test_tokens_cover_all_samples(num_samples: int) -> None:
    num_tokens = rates.tokens_for_samples(num_samples)
    assert num_tokens * rates.SAMPLES_PER_TOKEN >= num_samples
    assert num_tokens == 0 or (num_tokens - 1) * rates.SAMPLES_PER_TOKEN < num_samples


@given(st.integers(min_value=0, max_value=10_000))
def test_tokens_heard_rounds_to_the_nearest_token(num_tokens: int) -> None:
    assert rates.tokens_heard(rates.speak_samples_for_tokens(num_tokens)) == num_tokens
    assert rates.tokens_heard(num_tokens * rates.SAMPLES_PER_TOKEN, rates.LISTEN_SAMPLE_RATE) == num_tokens
    assert rates.tokens_heard(num_tokens * rates.SAMPLES_PER_TOKEN + 639, rates.LISTEN_SAMPLE_RATE) == num_tokens
    assert rates.tokens_heard(num_tokens * rates.SAMPLES_PER_TOKEN + 640, rates.LISTEN_SAMPLE_RATE) == num_tokens + 1


def test_negative_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="num_tokens must not be negative, got -1"):
        rates.frames_for_tokens(-1)
    with pytest.raises(ValueError, match="sample_rate must be positive, got 0"):
        rates.tokens_heard(5, 0)
