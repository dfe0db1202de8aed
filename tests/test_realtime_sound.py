"""Audio of the real-time server: wire formats, speed, playback clock, turn detection."""

import base64
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import duologue
from duologue.audio import resample
from duologue.conversation.block_policy import PlaybackClock
from duologue.serving.formats import WireDecoder, WireEncoder, pack, unpack
from duologue.serving.objects import Format, Pcm, Pcma, Pcmu, ProtocolError, SemanticVad, ServerVad
from duologue.serving.tempo import Tempo
from duologue.serving.turn_detection import (
    WINDOW,
    Detection,
    IdleTimedOut,
    SileroStream,
    TurnDetector,
    TurnEnded,
    TurnSettings,
    TurnStarted,
)
from duologue.sound_files import load_audio

QUESTION = Path(duologue.__file__).parent / "pocket" / "question.wav"
PCM, MU_LAW, A_LAW = Pcm(), Pcmu(type="audio/pcmu"), Pcma(type="audio/pcma")


def tone(hertz: float, seconds: float, sample_rate: int, level: float = 0.5) -> NDArray[np.float32]:
    time = np.arange(int(seconds * sample_rate)) / sample_rate
    return (level * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


# Formats.


def test_pcm_is_little_endian_16_bit() -> None:
    assert unpack(encoded(b"\x00\x80\xff\x7f\x01\x00"), PCM).tolist() == [-1.0, 32767 / 32768, 1 / 32768]
    assert pack(np.array([-2.0, 0.0, 2.0], np.float32), PCM) == b"\x00\x80\x00\x00\xff\x7f"


@pytest.mark.parametrize(
    ("wire", "code", "value"),
    [  # ITU-T G.711, tables 1 and 2, on the scale of 16 bits
        (MU_LAW, 0xFF, 0),
        (MU_LAW, 0x80, 32124),
        (MU_LAW, 0x00, -32124),
        (MU_LAW, 0xF0, 120),
        (A_LAW, 0xD5, 8),
        (A_LAW, 0x55, -8),
        (A_LAW, 0xAA, 32256),
        (A_LAW, 0x2A, -32256),
    ],
)
def test_g711_by_its_tables(wire: Format, code: int, value: int) -> None:
    assert unpack(encoded(bytes([code])), wire)[0] * 32768 == pytest.approx(value, abs=1)
    assert pack(np.array([value / 32768], np.float32), wire) == bytes([code])


@pytest.mark.parametrize("wire", [MU_LAW, A_LAW])
def test_every_g711_code_survives(wire: Format) -> None:
    codes = bytes(range(256))
    wav = unpack(encoded(codes), wire)
    assert np.array_equal(unpack(encoded(pack(wav, wire)), wire), wav)


@pytest.mark.parametrize(("audio", "said"), [("%%%", "not base64"), ("AAA", "not base64"), ("AAAA", "whole 16-bit")])
def test_invalid_audio_is_refused(audio: str, said: str) -> None:
    with pytest.raises(ProtocolError, match=said) as raised:
        unpack(audio, PCM)
    assert raised.value.param == "audio"


@pytest.mark.parametrize("wire", [PCM, MU_LAW, A_LAW])
def test_wire_decoder_output_does_not_depend_on_chunks(wire: Format) -> None:
    data = pack(tone(300.0, 1.0, wire.rate), wire)
    chunks = [data[start : start + 600] for start in range(0, len(data), 600)]
    whole, parts = WireDecoder(wire), WireDecoder(wire)
    at_once = np.concatenate([whole.step(encoded(data)), whole.end()])
    piecewise = np.concatenate([*(parts.step(encoded(chunk)) for chunk in chunks), parts.end()])
    assert np.allclose(piecewise, at_once, atol=1e-4)
    assert len(at_once) == pytest.approx(16_000, abs=2)
    middle = slice(1000, 15_000)
    assert np.abs(at_once[middle] - tone(300.0, 1.0, 16_000)[: len(at_once)][middle]).max() < 0.02


@pytest.mark.parametrize("wire", [PCM, MU_LAW, A_LAW])
@pytest.mark.parametrize("speed", [1.0, 0.5, 1.25])
def test_wire_encoder_output_length(wire: Format, speed: float) -> None:
    wav, outgoing = tone(220.0, 2.0, 22_050), WireEncoder(wire, speed)
    steps = [outgoing.step(wav[start : start + 30_000]) for start in range(0, len(wav), 30_000)]
    pieces = [*itertools.chain(*steps), *outgoing.step(wav[:0], last=True)]
    assert max(ms for _, ms in pieces) <= 500
    sent = b"".join(base64.b64decode(audio) for audio, _ in pieces)
    assert sum(ms for _, ms in pieces) == pytest.approx(2000 / speed, abs=1)
    assert len(sent) / (2 if wire == PCM else 1) / wire.rate == pytest.approx(2 / speed, abs=0.001)


# Speed.


def test_speed_one_changes_nothing() -> None:
    wav = tone(100.0, 0.1, 22_050)
    assert Tempo(1.0, 22_050).step(wav) is wav


@pytest.mark.parametrize("speed", [0.25, 0.75, 1.2, 1.5])
def test_speed_keeps_the_pitch(speed: float) -> None:
    wav = tone(200.0, 2.0, 22_050)
    made = Tempo(speed, 22_050).step(wav, last=True)
    assert len(made) == round(len(wav) / speed)
    spectrum = np.abs(np.fft.rfft(made * np.hanning(len(made))))
    assert np.argmax(spectrum) * 22_050 / len(made) == pytest.approx(200.0, abs=2.0)
    inner = made[2000:-2000]
    assert np.abs(inner).max() == pytest.approx(0.5, abs=0.05)


def test_fast_speech_has_the_loudness_of_speech() -> None:
    wav, rate = load_audio(QUESTION)
    made = Tempo(1.5, rate).step(wav, last=True)
    assert np.sqrt(np.mean(made**2)) == pytest.approx(np.sqrt(np.mean(wav**2)), rel=0.2)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 9000), max_size=6), st.sampled_from([0.25, 0.6, 1.5]))
def test_speed_is_the_same_in_any_chunks(cuts: list[int], speed: float) -> None:
    wav = np.random.default_rng(0).standard_normal(9000).astype(np.float32) * 0.1
    edges = [0, *sorted(cuts), len(wav)]
    stream = Tempo(speed, 22_050)
    pieces = [stream.step(wav[a:b]) for a, b in itertools.pairwise(edges)]
    pieces.append(stream.step(wav[:0], last=True))
    assert np.array_equal(np.concatenate(pieces), Tempo(speed, 22_050).step(wav, last=True))


# Playback.


def test_playback_clock_plays_in_order() -> None:
    playback = PlaybackClock()
    assert playback.played_s(5.0) == 0.0
    playback.sent(0.8, 10.0)
    playback.sent(0.8, 10.1)
    assert playback.played_s(10.5) == pytest.approx(0.5)
    assert playback.played_s(11.6) == pytest.approx(1.6)
    assert not playback.is_over(11.59)
    assert playback.is_over(11.61)
    assert playback.underruns == 0


def test_gaps_do_not_count_as_played() -> None:
    playback = PlaybackClock()
    playback.sent(0.1, 0.0)
    playback.sent(0.1, 5.0)
    assert playback.played_s(5.05) == pytest.approx(0.15)
    assert playback.underruns == 1


def test_a_stopped_playback_clock() -> None:
    playback = PlaybackClock()
    playback.sent(1.0, 0.0)
    playback.stop(playback.played_s(0.3))
    assert playback.played_s(9.0) == pytest.approx(0.3)
    assert playback.is_over(0.3)


# Turns.


def run(detector: TurnDetector, probabilities: list[float]) -> list[tuple[int, Detection]]:
    found = [(index, detector.step(probability)) for index, probability in enumerate(probabilities)]
    return [(index, detection) for index, detection in found if detection is not None]


def detector(idle_ms: int | None = None, max_s: float = 100.0, **vad: float) -> TurnDetector:
    wanted = ServerVad.model_validate({"type": "server_vad", "idle_timeout_ms": idle_ms, **vad})
    return TurnDetector(TurnSettings.of(wanted, max_s))


def test_a_turn_has_its_prefix_and_its_silence() -> None:
    found = run(detector(silence_duration_ms=320, prefix_padding_ms=64), [0.1] * 10 + [0.9] * 20 + [0.1] * 15)
    assert found == [(11, TurnStarted(10 * WINDOW - 64 * 16)), (39, TurnEnded(40 * WINDOW))]


def test_a_click_is_no_turn() -> None:
    assert run(detector(), [0.1, 0.9, 0.1, 0.9, 0.1] * 10) == []


def test_a_pause_shorter_than_the_silence_does_not_end_a_turn() -> None:
    found = run(detector(silence_duration_ms=320), [0.9] * 5 + [0.1] * 9 + [0.9] * 5 + [0.1] * 10)
    assert [type(detection) for _, detection in found] == [TurnStarted, TurnEnded]
    assert found[1][0] == 28


def test_speech_just_below_the_threshold_goes_on_but_does_not_begin() -> None:
    found = run(detector(silence_duration_ms=320), [0.4] * 10 + [0.9] * 2 + [0.4] * 30 + [0.1] * 10)
    assert [index for index, _ in found] == [11, 51]


def test_a_turn_does_not_begin_before_the_end_of_the_last() -> None:
    found = run(detector(silence_duration_ms=64, prefix_padding_ms=5000), [0.9] * 3 + [0.1] * 2 + [0.9] * 3)
    assert [detection for _, detection in found] == [TurnStarted(0), TurnEnded(5 * WINDOW), TurnStarted(5 * WINDOW)]


def test_a_turn_without_end_is_ended() -> None:
    found = run(detector(max_s=1.0), [0.9] * 70)
    assert [type(detection) for _, detection in found] == [TurnStarted, TurnEnded] * 2 + [TurnStarted]
    assert found[1][1].sample == 32 * WINDOW


def test_silence_after_a_reply_times_out_once() -> None:
    machine = detector(idle_ms=1000)
    assert run(machine, [0.1] * 100) == []  # the idle timer does not run yet
    machine.start_idle_timer()
    start = machine.sample
    found = run(machine, [0.1] * 200)
    assert [detection for _, detection in found] == [IdleTimedOut(start, start + 32 * WINDOW)]


def test_speech_and_replies_are_not_idle() -> None:
    machine = detector(idle_ms=1000)
    machine.start_idle_timer()
    found = run(machine, [0.1] * 20 + [0.9] * 60 + [0.1] * 60)
    assert [type(detection) for _, detection in found] == [TurnStarted, TurnEnded]
    machine.start_idle_timer()
    machine.stop_idle_timer()
    assert run(machine, [0.1] * 100) == []


@pytest.mark.parametrize(("eagerness", "silence_ms"), [("high", 500), ("auto", 800), ("medium", 800), ("low", 1500)])
def test_semantic_vad_waits_by_its_eagerness(eagerness: str, silence_ms: int) -> None:
    wanted = SemanticVad.model_validate({"type": "semantic_vad", "eagerness": eagerness})
    assert TurnSettings.of(wanted, 60.0).silence == silence_ms * 16


@pytest.mark.parametrize("chunk", [160, 512, 4000])
def test_real_speech_is_found_where_it_is(chunk: int) -> None:
    wav, rate = load_audio(QUESTION)
    speech = resample(wav, rate, 16_000)
    silence = np.zeros(16_000, np.float32)
    sound = np.concatenate([silence, speech, silence])
    machine, stream, found = detector(), SileroStream(), []
    for start in range(0, len(sound), chunk):
        for probability in stream.step(sound[start : start + chunk]):
            if (detection := machine.step(probability)) is not None:
                found.append(detection)
    begin, end = found
    assert isinstance(begin, TurnStarted)
    assert isinstance(end, TurnEnded)
    assert begin.sample / 16_000 == pytest.approx(1.0 - 0.3, abs=0.2)
    assert end.sample / 16_000 == pytest.approx(1.0 + len(speech) / 16_000 + 0.5, abs=0.2)


def test_noise_and_silence_are_not_speech() -> None:
    noise = np.random.default_rng(0).standard_normal(32_000).astype(np.float32) * 0.05
    assert max(SileroStream().step(noise)) < 0.5
    assert max(SileroStream().step(np.zeros(32_000, np.float32))) < 0.5
