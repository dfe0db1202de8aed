"""Free synthesizers as voices, rendered in parallel to level, trimmed 16 kHz clips.

flite, festival and espeak-ng are programs of Debian; hibari and joe come out of packages (`natural_voices`). A clip is
a pure function of its `Request` on the same versions of them; joe's clips are one of their chunk of requests.
Only recipes use this; no synthesizer takes part in answering.
"""

from __future__ import annotations

import math
import multiprocessing
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import soundfile
from numpy.typing import NDArray

from recipes.pocket.natural_voices import Joe, hibari
from recipes.pocket.sounds import sound
from recipes.pocket.warps import scale_f0, scale_formants

SAMPLE_RATE = 16000
LEVEL_DBFS = -23.0
TRIM_THRESHOLD_DB = -42.0  # below the loudest 10 ms frame
TRIM_MARGIN = 0.08  # seconds of silence kept at both ends
CHUNK = 128  # requests per job: many festival utterances share one process


@dataclass(frozen=True)
class Voice:
    """One voice of one program. `weight`: how often a user clip takes it; `held_out`: heard only in tests."""

    id: str
    engine: str
    name: str
    weight: float = 0.0
    held_out: bool = False


def _espeak(accent: str, variant: str, held_out: bool = False) -> Voice:
    name = f"{accent}+{variant}" if variant else accent
    return Voice(f"espeak-{name}", "espeak", name, 0.0 if held_out else 0.4 / 12, held_out)


REPLY_VOICE = Voice("flite-slt", "flite", "slt", 0.12)
VOICES: tuple[Voice, ...] = (
    REPLY_VOICE,
    Voice("flite-awb", "flite", "awb", 0.12),
    Voice("flite-kal16", "flite", "kal16", 0.11),
    Voice("flite-kal", "flite", "kal", 0.05),
    Voice("festival-slt-hts", "festival", "cmu_us_slt_arctic_hts", 0.11),
    Voice("festival-kal", "festival", "kal_diphone", 0.09),
    _espeak("en-us", ""),
    _espeak("en-us", "f1"),
    _espeak("en-us", "f2"),
    _espeak("en-us", "f3"),
    _espeak("en-us", "f5"),
    _espeak("en-us", "m1"),
    _espeak("en-us", "m3"),
    _espeak("en-us", "m7"),
    _espeak("en-gb", ""),
    _espeak("en-gb", "m2"),
    _espeak("en-gb-scotland", "m4"),
    _espeak("en-gb-x-rp", "m6"),
    Voice("flite-rms", "flite", "rms", held_out=True),
    _espeak("en-us", "f4", held_out=True),
    Voice("festival-ked", "festival", "ked_diphone", held_out=True),
)
# Heard in the training alone, so that a voice nobody heard before is less of a surprise. They are apart from the
# others because the test draws its voices from those: it stays the same, whoever joins here.
MORE_VOICES: tuple[Voice, ...] = tuple(
    Voice(f"espeak-{accent}+{variant}", "espeak", f"{accent}+{variant}", 0.5 / 27)
    for accent, variants in (
        ("en-us", "Alex Andrea Gene Mike adam anika belinda david klatt2 linda m5 m8 paul robert travis"),
        ("en-gb", "Annie Lee aunty grandpa michel steph victor"),
        ("en-gb-scotland", "Hugo max"),
        ("en-gb-x-rp", "antonio klatt4 steph3"),
    )
    for variant in variants.split()
)
# Neural voices out of packages, see `natural_voices`.
NATURAL_VOICES: tuple[Voice, ...] = (Voice("hibari", "hibari", "heart"), Voice("joe", "joe", "en_US-joe-medium"))
NATURAL_REPLY_VOICE = NATURAL_VOICES[0]
VOICE_BY_ID = {voice.id: voice for voice in (*VOICES, *MORE_VOICES, *NATURAL_VOICES)}
USER_VOICES = tuple(voice for voice in VOICES if not voice.held_out)
UNSEEN_VOICES = tuple(voice for voice in VOICES if voice.held_out)
TRAINING_VOICES = (*USER_VOICES, *MORE_VOICES)


def find_voice(voice_id: str) -> Voice:
    """The voice with this id: one of this module, or any language and variant of espeak-ng as "espeak-NAME".

    Raises:
        ValueError: there is no such voice.
    """
    if voice_id in VOICE_BY_ID:
        return VOICE_BY_ID[voice_id]
    engine, _, name = voice_id.partition("-")
    if engine != "espeak":
        raise ValueError(f"unknown voice {voice_id!r}; the voices are {', '.join(VOICE_BY_ID)}")
    return Voice(voice_id, engine, name)


@dataclass(frozen=True)
class Request:
    """What to say and how. `voice` is the id of a voice, or "sound-" and a sound for what is no speech.

    `rate` is speed (1.25 = faster), `pitch` in semitones, `level` in dB over `LEVEL_DBFS`, `formants` the factor that
    the formants are scaled by. Speed and pitch are those that are heard, whatever the formants.
    """

    text: str
    voice: str
    rate: float = 1.0
    pitch: float = 0.0
    level: float = 0.0
    seed: int = 0  # of sounds that are no voice, and of the noise in natural voices
    formants: float = 1.0


# Reply styles: (rate, pitch in semitones, level in dB). "faster2" is "even faster", and so on.
STYLES: dict[str, tuple[float, float, float]] = {
    "plain": (1.0, 0.0, 0.0),
    "faster": (1.3, 0.0, 0.0),
    "faster2": (1.6, 0.0, 0.0),
    "slower": (0.75, 0.0, 0.0),
    "slower2": (0.58, 0.0, 0.0),
    "higher": (1.0, 3.0, 0.0),
    "higher2": (1.0, 5.5, 0.0),
    "lower": (1.0, -3.0, 0.0),
    "lower2": (1.0, -5.5, 0.0),
    "louder": (1.0, 0.0, 5.0),
    "softer": (1.0, 0.0, -9.0),
}
STYLE_NAMES = tuple(name for name in STYLES if name != "plain")


def reply_request(text: str, style: str = "plain", voice: str = REPLY_VOICE.id) -> Request:
    """The request for a reply in a style; replies have one voice and no other variation."""
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}; the styles are {', '.join(STYLES)}")
    rate, pitch, level = STYLES[style]
    return Request(text, voice, rate, pitch, level)


# Mean F0 in Hz of each voice as it speaks by itself, the reference that `pitch` in semitones counts from.
_FLITE_F0 = {"slt": 170.0, "awb": 122.0, "kal16": 100.0, "kal": 100.0, "rms": 95.0}
_FESTIVAL_KAL_F0 = 105.0
_ESPEAK_WORDS_PER_MINUTE = 165


def render_one(request: Request) -> NDArray[np.int16]:
    """Samples (S,) int16 at 16 kHz of one request, trimmed and levelled."""
    return render_chunk([request])[0]


def render_chunk(requests: list[Request]) -> list[NDArray[np.int16]]:
    """Render requests one after another; all festival requests of the list share one process.

    Raises `ValueError` when the voice is unknown and `RuntimeError` when a program fails.
    """
    clips: list[NDArray[np.int16] | None] = [None] * len(requests)
    joe: Joe | None = None
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{index}.wav" for index in range(len(requests))]
        batch: list[tuple[Request, Path]] = []
        for index, (request, file) in enumerate(zip(requests, files, strict=True)):
            if request.voice.startswith("sound-"):
                clips[index] = _no_speech(request)
                continue
            own = own_manner(request)
            engine = find_voice(request.voice).engine
            if engine == "festival":
                batch.append((own, file))
            elif engine == "hibari":
                samples, rate = hibari(own.text, own.rate, 2 ** (own.pitch / 12), own.seed)
                clips[index] = finish(samples, rate, own.level, own.formants)
            elif engine == "joe":
                joe = joe or Joe(own.seed)
                samples, rate = joe(own.text, own.rate)
                if abs(own.pitch) > 0.05:
                    samples = scale_f0(samples, rate, 2 ** (own.pitch / 12))
                clips[index] = finish(samples, rate, own.level, own.formants)
            else:
                _run(_command(own, file), own.text)
        if batch:
            script = Path(folder) / "batch.scm"
            script.write_text(_festival_script(batch), encoding="utf-8")
            _run(["festival", "-b", str(script)], f"a batch of {len(batch)} sentences")
        for index, (request, file) in enumerate(zip(requests, files, strict=True)):
            if clips[index] is None:
                samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
                clips[index] = finish(samples[:, 0], rate, request.level, request.formants)
    return [clip for clip in clips if clip is not None]


def own_manner(request: Request) -> Request:
    """The request with the rate and pitch that the program speaks at, before resampling scales the formants."""
    return replace(
        request, rate=request.rate / request.formants, pitch=request.pitch - 12 * math.log2(request.formants)
    )


_BABBLE_WORDS = "under the river many people talk about water and bread while seven old horses walk to market again"


def _no_speech(request: Request) -> NDArray[np.int16]:
    """Samples (S,) int16 of a sound that is no speech to the listener; babble is several voices at once."""
    kind = request.voice.removeprefix("sound-")
    if kind != "babble":
        samples = sound(kind, request.seed, SAMPLE_RATE)
        return np.round(samples * 32767).astype(np.int16)
    rng = Random(f"babble|{request.seed}")
    talking = []
    for voice in rng.sample([v.id for v in USER_VOICES if v.engine == "espeak"], 5):
        words = _BABBLE_WORDS.split()
        rng.shuffle(words)
        talking.append(Request(" ".join(words[:10]), voice, rng.uniform(0.9, 1.2), rng.uniform(-3, 3)))
    clips = render_chunk(talking)
    length = min(int(rng.uniform(1.0, 3.0) * SAMPLE_RATE), *(clip.size for clip in clips))
    mixed = sum(clip[:length].astype(np.float64) for clip in clips) / 32767 * 10 ** (rng.uniform(-16, -6) / 20)
    return np.round(np.clip(mixed, -0.98, 0.98) * 32767).astype(np.int16)


def render(requests: Iterable[Request], workers: int = 1) -> Iterator[NDArray[np.int16]]:
    """Render a stream of requests in order, `workers` processes at a time, without holding the stream in memory."""
    return render_chunks(chunked(requests), workers)


def chunked(requests: Iterable[Request]) -> Iterator[list[Request]]:
    """Lists of `CHUNK` requests and a last one of what is left."""
    iterator = iter(requests)
    return iter(lambda: list(islice(iterator, CHUNK)), [])


def render_chunks(chunks: Iterator[list[Request]], workers: int = 1) -> Iterator[NDArray[np.int16]]:
    """Render chunks of requests in order, each by one of `workers` processes."""
    if workers <= 1:
        for chunk in chunks:
            yield from render_chunk(chunk)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pending = [pool.apply_async(render_chunk, (chunk,)) for chunk in islice(chunks, 2 * workers)]
        while pending:
            yield from pending.pop(0).get()
            pending.extend(pool.apply_async(render_chunk, (chunk,)) for chunk in islice(chunks, 1))


def finish(samples: NDArray[np.float32], rate: int, level: float = 0.0, formants: float = 1.0) -> NDArray[np.int16]:
    """Mono samples (S,) at `rate` -> (S',) int16 at 16 kHz: resampled, trimmed, levelled to `LEVEL_DBFS` + `level`."""
    samples = trim(scale_formants(samples, rate, formants, SAMPLE_RATE))
    rms = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) if samples.size else 0.0
    if rms > 0:
        peak = float(np.max(np.abs(samples)))
        gain = 10 ** ((LEVEL_DBFS + level) / 20) / rms
        samples = samples * min(gain, 0.98 / peak)
    return np.round(samples * 32767).astype(np.int16)


def trim(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cut silence at both ends (16 kHz), keeping `TRIM_MARGIN` seconds where there was that much."""
    hop = SAMPLE_RATE // 100
    count = samples.size // hop
    if count == 0:
        return samples
    energy = np.mean(np.square(samples[: count * hop].reshape(count, hop), dtype=np.float64), axis=1)
    if energy.max() <= 0:
        return samples
    loud = np.flatnonzero(energy > energy.max() * 10 ** (TRIM_THRESHOLD_DB / 10))
    margin = int(TRIM_MARGIN * SAMPLE_RATE)
    start = max(0, int(loud[0]) * hop - margin)
    end = min(samples.size, (int(loud[-1]) + 1) * hop + margin)
    return samples[start:end]


def _command(request: Request, file: Path) -> list[str]:
    voice = find_voice(request.voice)
    if voice.engine == "flite":
        command = ["flite", "-voice", voice.name, "--setf", f"duration_stretch={1 / request.rate:.4f}"]
        if request.pitch != 0:
            mean = _FLITE_F0[voice.name] * 2 ** (request.pitch / 12)
            command += ["--setf", f"int_f0_target_mean={mean:.2f}"]
        return [*command, "-t", request.text, "-o", str(file)]
    speed = round(_ESPEAK_WORDS_PER_MINUTE * request.rate)
    pitch = round(50 + 6.5 * request.pitch)  # the scale of espeak-ng is 0 to 99 around 50
    options = ["-s", str(speed), "-p", str(min(99, max(0, pitch)))]
    return ["espeak-ng", "-v", voice.name, *options, "-w", str(file), request.text]


def _festival_script(batch: list[tuple[Request, Path]]) -> str:
    lines = []
    for request, file in batch:
        name = VOICE_BY_ID[request.voice].name
        lines.append(f"(voice_{name})")
        if name.endswith("_hts"):
            # selecting the voice resets hts_engine_params; -r is the speaking rate, -fm half tones of shift
            lines.append(
                "(set! hts_engine_params (append hts_engine_params"
                f' \'(("-r" {request.rate:.4f}) ("-fm" {request.pitch:.4f}))))'
            )
        else:
            mean = _FESTIVAL_KAL_F0 * math.pow(2, request.pitch / 12)
            lines.append(f"(Parameter.set 'Duration_Stretch {1 / request.rate:.4f})")
            lines.append(
                f"(set! int_lr_params '((target_f0_mean {mean:.2f}) (target_f0_std 14)"
                " (model_f0_mean 170) (model_f0_std 34)))"
            )
        text = request.text.replace("\\", "").replace('"', "")
        lines.append(f'(set! utterance (Utterance Text "{text}"))')
        lines.append("(utt.synth utterance)")
        lines.append(f'(utt.save.wave utterance "{file}" \'riff)')
    return "\n".join(lines) + "\n"


def _run(command: list[str], what: str) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not installed; synthesis needs flite, festival and espeak-ng") from None
    if result.returncode != 0:
        raise RuntimeError(f"{command[0]} failed on {what!r}: {result.stderr.strip()[-300:]}")
