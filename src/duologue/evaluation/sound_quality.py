"""Measures of a reply's sound whose weights are given as files: UTMOS, and the likeness of two voices.

No weights are part of this package. `UtmosPredictor` and `SpeakerEmbedder` say which layouts they read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from duologue.audio import resample

SAMPLE_RATE = 16_000
NUM_MELS = 80
FRAME, HOP, FFT = 400, 160, 512  # samples at 16 kHz: 25 ms every 10 ms
LOWEST_HZ, PREEMPHASIS = 20.0, 0.97
_FLOOR = float(np.finfo(np.float32).eps)


class UtmosPredictor:
    """A predictor of mean opinion scores, such as UTMOS (arXiv 2204.02152), from a file.

    - ONNX (`.onnx`): one input (1, S) float32 at 16 kHz; the first output holds the score.
    - TorchScript (any other suffix): `f(wav)` or `f(wav, sample_rate)` with wav (1, S) float32 at 16 kHz, as the module
      `utmos22_strong` of SpeechMOS is called; its result holds the score.

    Raises:
        ValueError: the file is missing or has neither layout.
    """

    def __init__(self, path: str | Path) -> None:
        self.name = Path(path).name
        self._onnx = self._script = None
        if Path(path).suffix == ".onnx":
            self._onnx = _open_onnx(path, 2, "(1, S)")
            return
        if not Path(path).is_file():
            raise ValueError(f"there is no file {path} with a predictor of mean opinion scores")
        try:
            self._script = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError:
            raise ValueError(f"{path} is no TorchScript file; torch.jit.script(model).save(...) writes one") from None
        self._num_arguments = len(self._script.forward.schema.arguments) - 1  # without self

    def __call__(self, wav: NDArray[np.float32], sample_rate: int) -> float:
        """wav (S,) float32 -> score. Raises ValueError for a clip without samples."""
        if not len(wav):
            raise ValueError("a clip without samples has no quality")
        row = resample(wav, sample_rate, SAMPLE_RATE)[None]
        if self._onnx is not None:
            return _first_number(self._onnx.run(None, {self._onnx.get_inputs()[0].name: row})[0])
        assert self._script is not None
        arguments: list[Any] = [torch.from_numpy(row)]
        if self._num_arguments > 1:
            arguments.append(SAMPLE_RATE)
        with torch.inference_mode():
            return _first_number(self._script(*arguments))


class SpeakerEmbedder:
    """An embedder of voices from an ONNX file: one input (1, T, 80) of filter-bank features, one output (1, E).

    Exports of WeSpeaker name the input `feats`; they take Hamming windows and samples as 16-bit numbers. Those of
    3D-Speaker (CAM++, ERes2Net) name it `feature`; they and all others take Povey windows and samples in [-1, 1]. The
    mean over time is subtracted for both.

    Raises:
        ValueError: the file is missing or has another layout.
    """

    def __init__(self, path: str | Path) -> None:
        self.name = Path(path).name
        self._model = _open_onnx(path, 3, f"(1, T, {NUM_MELS})")
        self._input = self._model.get_inputs()[0].name
        self._window, self._scale = ("hamming", 32768.0) if self._input == "feats" else ("povey", 1.0)

    def embed(self, wav: NDArray[np.float32], sample_rate: int) -> NDArray[np.float64]:
        """wav (S,) float32 -> (E,) of length 1. Raises ValueError for less than 25 ms."""
        wav = resample(wav, sample_rate, SAMPLE_RATE) * np.float32(self._scale)
        features = filter_bank(wav, self._window)
        if not len(features):
            raise ValueError("a clip of less than 25 ms has no voice")
        features -= features.mean(0)
        found = self._model.run(None, {self._input: features[None].astype(np.float32)})[0]
        vector: NDArray[np.float64] = np.asarray(found, np.float64).reshape(-1)
        return vector / max(float(np.linalg.norm(vector)), 1e-12)

    def likeness(self, one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
        """The cosine of two results of `embed`, in [-1, 1]."""
        return float(one @ other)


def filter_bank(wav: NDArray[np.float32], window: str = "povey") -> NDArray[np.float64]:
    """wav (S,) float32 at 16 kHz -> log energies (T, 80), T = 1 + (S - 400) // 160.

    As Kaldi's `compute-fbank-feats --num-mel-bins=80 --dither=0` computes them.

    Args:
        window: "povey" or "hamming".
    """
    if len(wav) < FRAME:
        return np.zeros((0, NUM_MELS))
    frames = np.lib.stride_tricks.sliding_window_view(wav.astype(np.float64), FRAME)[::HOP]
    frames = frames - frames.mean(1, keepdims=True)
    previous = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    cosine = np.cos(2 * np.pi * np.arange(FRAME) / (FRAME - 1))
    shape = (0.5 - 0.5 * cosine) ** 0.85 if window == "povey" else 0.54 - 0.46 * cosine
    power = np.abs(np.fft.rfft((frames - PREEMPHASIS * previous) * shape, FFT)) ** 2
    energies = power[:, :-1] @ _mel_weights().T
    return np.asarray(np.log(np.maximum(energies, _FLOOR)))


def _mel_weights() -> NDArray[np.float64]:
    """Triangles (80, 256) of equal width on the mel scale, over the bins below half the sample rate."""

    def mel(hertz: NDArray[np.float64] | float) -> NDArray[np.float64]:
        return np.asarray(1127.0 * np.log1p(np.asarray(hertz) / 700.0))

    edges = np.linspace(mel(LOWEST_HZ), mel(SAMPLE_RATE / 2), NUM_MELS + 2)
    left, center, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bins = mel(np.arange(FFT // 2) * SAMPLE_RATE / FFT)[None]
    return np.maximum(0.0, np.minimum((bins - left) / (center - left), (right - bins) / (right - center)))


def _open_onnx(path: str | Path, num_dims: int, shape: str) -> Any:
    """A session of onnxruntime with one input of this shape. Raises ValueError."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before onnxruntime is imported
    try:
        import onnxruntime
    except ImportError:
        raise ValueError(
            'onnxruntime is not installed: run pip install -e ".[eval]" in the folder of Duologue'
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many types
        raise ValueError(f"{path} cannot be read as an ONNX model: {' '.join(str(error).split())[:200]}") from None
    inputs = session.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) != num_dims or inputs[0].type != "tensor(float)":
        found = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
        raise ValueError(f"{path} must have one float32 input {shape}, not {found}")
    return session


def _first_number(found: Any) -> float:
    values = np.asarray(found, np.float64).reshape(-1)
    if len(values) != 1 or not np.isfinite(values[0]):
        raise ValueError(f"a predictor of mean opinion scores must return one number, not {values.tolist()[:4]}")
    return float(values[0])
