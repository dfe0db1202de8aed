"""UTMOS and the likeness of voices, by small models whose results are known."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from duologue.evaluation.benchmarks.table import BENCHMARKS
from duologue.evaluation.sound_quality import SpeakerEmbedder, UtmosPredictor, filter_bank
from duologue.evaluation.suite import Listener, SuiteSettings, run_benchmark
from recipes.pocket import speaker_model
from tests.benchmark_data import ScriptedAsker, write_seed_tts
from tests.onnx_file import write_onnx

RATE = 16_000
MEAN_LEVEL = [("Abs", {}), ("ReduceMean", {"axes": [1], "keepdims": 0})]
MEAN_OVER_TIME = [("Abs", {}), ("ReduceMean", {"axes": [1], "keepdims": 0})]


class MeanLevel(torch.nn.Module):
    def forward(self, wav: torch.Tensor) -> torch.Tensor:
        return wav.abs().mean(1)


class MeanLevelAtRate(torch.nn.Module):
    def forward(self, wav: torch.Tensor, sample_rate: int) -> torch.Tensor:
        return wav.abs().mean(1) + sample_rate / 16000


def noise(seconds: float = 1.0, seed: int = 0) -> NDArray[np.float32]:
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * RATE))).astype(np.float32)


def test_utmos_reads_three_layouts(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.jit.script(MeanLevel()).save(tmp_path / "one.pt")
    torch.jit.script(MeanLevelAtRate()).save(tmp_path / "two.pt")
    write_onnx(tmp_path / "three.onnx", "wav", [1, "samples"], MEAN_LEVEL)
    wav = np.full(RATE, 0.5, np.float32)
    assert UtmosPredictor(tmp_path / "one.pt")(wav, RATE) == pytest.approx(0.5)
    assert UtmosPredictor(tmp_path / "two.pt")(wav, RATE) == pytest.approx(1.5)
    assert UtmosPredictor(tmp_path / "three.onnx")(wav, RATE) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="without samples"):
        UtmosPredictor(tmp_path / "one.pt")(wav[:0], RATE)


def test_files_of_another_layout_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    for name in ("missing.pt", "missing.onnx"):
        with pytest.raises(ValueError, match="there is no file"):
            UtmosPredictor(tmp_path / name)
    (tmp_path / "text.pt").write_text("no model")
    with pytest.raises(ValueError, match="is no TorchScript file"):
        UtmosPredictor(tmp_path / "text.pt")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ValueError, match="cannot be read as an ONNX model"):
        UtmosPredictor(tmp_path / "text.onnx")
    wav_model = write_onnx(tmp_path / "wav.onnx", "wav", [1, "samples"], MEAN_LEVEL)
    with pytest.raises(ValueError, match=r"one float32 input \(1, T, 80\)"):
        SpeakerEmbedder(wav_model)
    many = write_onnx(tmp_path / "many.onnx", "wav", [1, "samples"], [("Abs", {})])
    with pytest.raises(ValueError, match="must return one number"):
        UtmosPredictor(many)(noise(), RATE)


def test_filter_banks_are_those_of_kaldi() -> None:
    time = np.arange(4000) / RATE
    wav = (0.1 * np.sin(2 * np.pi * 440 * time) + 0.01 * np.random.default_rng(0).standard_normal(4000)).astype("f4")
    # Computed by kaldi-native-fbank 1.23: frame 3, bands 0, 10, 40 and 79.
    expected = {
        "povey": [6.322293, 14.119523, 16.285833, 19.656155],
        "hamming": [11.067737, 12.8513155, 16.312107, 19.635202],
    }
    for window, values in expected.items():
        features = filter_bank(32768 * wav, window)
        assert features.shape == (23, 80)
        np.testing.assert_allclose(features[3, [0, 10, 40, 79]], values, atol=2e-4)
    assert filter_bank(wav[:399]).shape == (0, 80)


@pytest.mark.parametrize("name", ["feats", "feature"])
def test_a_voice_is_like_itself_at_any_level(tmp_path: Path, name: str) -> None:
    pytest.importorskip("onnxruntime")
    embedder = SpeakerEmbedder(write_onnx(tmp_path / "voice.onnx", name, [1, "frames", 80], MEAN_OVER_TIME))
    time = np.arange(RATE) / RATE
    voice: NDArray[np.float32] = (noise() * (1 + np.sin(2 * np.pi * 3 * time))).astype(np.float32)
    one, softer, other = (embedder.embed(wav, RATE) for wav in (voice, voice * np.float32(0.5), noise(seed=1)))
    assert embedder.likeness(one, one) == pytest.approx(1)
    assert embedder.likeness(one, softer) == pytest.approx(1, abs=1e-3)
    assert embedder.likeness(one, other) < embedder.likeness(one, softer)
    with pytest.raises(ValueError, match="less than 25 ms"):
        embedder.embed(voice[:300], RATE)


def test_a_benchmark_reports_both(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    data = write_seed_tts(tmp_path / "data")
    soundfile.write(data / "en" / "p.wav", noise(0.5), RATE)
    utmos = UtmosPredictor(write_onnx(tmp_path / "utmos.onnx", "wav", [1, "samples"], MEAN_LEVEL))
    speakers = SpeakerEmbedder(write_onnx(tmp_path / "voice.onnx", "feats", [1, "frames", 80], MEAN_OVER_TIME))
    listener = Listener(None, "", "no recognizer in this test", utmos, speakers)
    settings = SuiteSettings(data, tmp_path / "out")
    report = run_benchmark(BENCHMARKS["seed-tts-eval"], settings, ScriptedAsker(lambda one: "a" * 100), listener, None)
    rows = {(row.group, row.name): row for row in report.rows}
    assert rows["en", "UTMOS"].num == 2
    assert (rows["en", "speaker similarity"].num, rows["en", "speaker similarity"].unit) == (1, "cosine")
    assert ("zh", "speaker similarity") not in rows  # its prompts are not there
    assert report.settings["utmos"] == "utmos.onnx"


NETWORK = "import torch\n\nclass CAMPPlus(torch.nn.Linear):\n    pass\n"


def test_the_recipe_of_a_speaker_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, out = tmp_path / "campplus.pt", tmp_path / "campplus.onnx"
    arguments = ["--weights", str(weights), "--out", str(out)]
    with pytest.raises(SystemExit):
        speaker_model.main(arguments)
    assert f"there is no {weights}" in capsys.readouterr().err
    torch.save(torch.nn.Linear(80, 192).state_dict(), weights)
    monkeypatch.setitem(sys.modules, "speakerlab", None)
    with pytest.raises(SystemExit):
        speaker_model.main(arguments)
    assert "pip install --no-deps speakerlab" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "speakerlab")
    package = tmp_path / "speakerlab" / "models" / "campplus"
    package.mkdir(parents=True)
    (package / "DTDNN.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    exported: list[torch.nn.Linear] = []
    monkeypatch.setattr(speaker_model, "export", lambda network, _: exported.append(network))
    speaker_model.main(arguments)
    assert torch.equal(exported[0].weight, torch.load(weights, weights_only=True)["weight"])
    assert capsys.readouterr().out == f"{out}\n"
