"""Rates, hop lengths and conversions between samples, frames and tokens.

    16 kHz samples -160-> log-mel 100/s -2-> encoder frames 50/s -4-> speech tokens 12.5/s
    speech tokens 12.5/s -441/64-> mel frames 86.13/s -256-> 22.05 kHz samples

One speech token is 1280 input samples and 6.890625 = 441/64 output mel frames. The arithmetic is exact: floating
point is off by one at some lengths, for example at 2240 tokens.
"""

from __future__ import annotations

from fractions import Fraction

# Listening.
LISTEN_SAMPLE_RATE = 16_000
LISTEN_HOP = 160
ENCODER_STRIDE = 2  # the second convolution
POOL = 4  # average pooling before the quantizer

MEL_FRAMES_PER_TOKEN = ENCODER_STRIDE * POOL
SAMPLES_PER_TOKEN = LISTEN_HOP * MEL_FRAMES_PER_TOKEN
LISTEN_FRAME_RATE = LISTEN_SAMPLE_RATE / LISTEN_HOP
ENCODER_FRAME_RATE = LISTEN_FRAME_RATE / ENCODER_STRIDE
TOKEN_RATE = ENCODER_FRAME_RATE / POOL

# Speaking.
SPEAK_SAMPLE_RATE = 22_050
SPEAK_HOP = 256
SPEAK_FRAME_RATE = SPEAK_SAMPLE_RATE / SPEAK_HOP
FRAMES_PER_TOKEN = Fraction(SPEAK_SAMPLE_RATE * SAMPLES_PER_TOKEN, SPEAK_HOP * LISTEN_SAMPLE_RATE)
BLOCK_TOKENS = 10  # the grid of the decoder: nothing smaller is spoken, larger steps are whole multiples
BLOCK_S = BLOCK_TOKENS / TOKEN_RATE


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _not_negative(name: str, value: int) -> int:
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value


def tokens_for_samples(num_samples: int) -> int:
    """Returns the number of speech tokens of `num_samples` at 16 kHz; the last token may contain padding."""
    return _ceil_div(_not_negative("num_samples", num_samples), SAMPLES_PER_TOKEN)


def frames_for_tokens(num_tokens: int) -> int:
    """Returns the number of mel frames that `num_tokens` tokens determine: floor(441 n / 64), as in the released
    decoder.

    The next frame also depends on the next token. A block of 10 tokens gives 68 or 69 frames.
    """
    return _not_negative("num_tokens", num_tokens) * FRAMES_PER_TOKEN.numerator // FRAMES_PER_TOKEN.denominator


def token_of_frame(frame: int) -> int:
    """Returns the token that contains the mel frame with this absolute index: 64 i // 441."""
    return _not_negative("frame", frame) * FRAMES_PER_TOKEN.denominator // FRAMES_PER_TOKEN.numerator


def speak_samples_for_tokens(num_tokens: int) -> int:
    """Returns the number of 22.05 kHz samples of the frames that `num_tokens` tokens determine."""
    return frames_for_tokens(num_tokens) * SPEAK_HOP


def tokens_heard(num_samples: int, sample_rate: int = SPEAK_SAMPLE_RATE) -> int:
    """Returns how many speech tokens were at least half played after `num_samples` samples of a reply."""
    if sample_rate <= 0:
        raise ValueError(f"sample_rate must be positive, got {sample_rate}")
    listened = _not_negative("num_samples", num_samples) * LISTEN_SAMPLE_RATE
    return (2 * listened + SAMPLES_PER_TOKEN * sample_rate) // (2 * SAMPLES_PER_TOKEN * sample_rate)
