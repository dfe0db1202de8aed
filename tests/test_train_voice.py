"""Stage `voice`: the flow of a model learns one speaker, and the result is a model with a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import duologue
from duologue.checkpoint import file_hash, load_component, load_tensors
from duologue.cli import main
from duologue.config import read_json
from duologue.decoder.flow import Flow, FlowConfig
from duologue.evaluation.sound_quality import SpeakerEmbedder
from duologue.evaluation.testset import read_clips
from duologue.evaluation.voices import VoiceJudges, compare_voices
from duologue.released.decoder.decoder import load_released_decoder
from duologue.released.random_weights import init_random
from duologue.sound_files import load_audio
from duologue.training.loop import LoopConfig, run
from duologue.training.recipes import train
from duologue.training.voice import VoiceRecipe, VoiceStage
from tests.tiny import write_tiny_chatbot

LOOP = LoopConfig(2, 1e-2, warmup_steps=1, precision="fp32", evaluate_every=2, sample_every=2, log_every=1)


def write_speaker(folder: Path, voices: tuple[str, ...] = ("ann",)) -> str:
    """Twelve tones of a second, a quarter for validation."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines, samples = [], []
    for number in range(12):
        tone = 0.2 * np.sin(np.arange(16000) * rng.uniform(0.02, 0.4)) + rng.normal(0, 0.01, 16000)
        samples.append((tone * 32767).astype("<i2"))
        line = {"id": f"ann-{number}", "text": f"tone {number}", "role": "free", "voice": voices[number % len(voices)]}
        line |= {"language": "en", "style": "plain", "split": "valid" if number % 4 == 3 else "train", "intent": ""}
        lines.append(line | {"sample_rate": 16000, "offset": 16000 * number, "num_samples": 16000})
    np.concatenate(samples).tofile(folder / "clips-00000.pcm")
    (folder / "clips-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def recipe(tmp_path: Path, corpus: str, model: Path, **changes: object) -> VoiceRecipe:
    fields = {"model": str(model), "voice": "ann", "store": str(tmp_path / "store"), "batch_s": 4.0}
    return VoiceRecipe(corpora=(corpus,), loop=LOOP, **{**fields, **changes})  # type: ignore[arg-type]


def test_a_model_gets_a_voice(tmp_path: Path) -> None:
    model = write_tiny_chatbot(tmp_path / "model")
    before = load_tensors(model / "decoder" / "flow")
    stage = VoiceStage(recipe(tmp_path, write_speaker(tmp_path / "ann"), model))
    metrics = run(stage, LOOP, tmp_path / "run")
    assert {"velocity", "mel_l1_unguided"} <= set(metrics)
    final = tmp_path / "run" / "final"
    assert file_hash(model / "decoder" / "vocoder") == file_hash(final / "model" / "decoder" / "vocoder")
    after = load_component(final / "model" / "decoder" / "flow", Flow, FlowConfig).state_dict()
    moved = [key for key, value in before.items() if not torch.allclose(value.float(), after[key].float(), atol=1e-2)]
    assert moved
    for key, value in stage.flow.state_dict().items():
        torch.testing.assert_close(after[key], value, atol=1e-3, rtol=1e-3)
    bot = duologue.load(final / "model")
    assert (bot.models.card.voices, bot.models.card.name) == (("ann",), "tiny-ann")
    assert len(bot.chat(text="hello").audio)

    samples = tmp_path / "run" / "samples" / "step-0000002"
    assert sorted(path.name for path in samples.iterdir()) == ["0.wav", "1.wav", "2.wav", "mels.png"]


def test_a_voice_beside_its_recordings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, corpus = write_tiny_chatbot(tmp_path / "model"), write_speaker(tmp_path / "ann")
    out = tmp_path / "report"
    arguments = ["evaluate", "voice", "--model", str(model), "--data", corpus, "-o", str(out)]
    assert main([*arguments, "--before", str(model), "--limit", "2"]) == 0
    rows = {(row["group"], row["name"]): row for row in read_json(out / "report.json")["rows"]}
    assert {group for group, _ in rows} == {"recording", "vocoder", "before", "after"}
    for kind in ("vocoder", "before", "after"):
        assert rows[kind, "speaker likeness to the recording (cosine)"]["skipped"] == "no model of speakers was given"
    page = (out / "report.html").read_text()
    sounds = sorted(path.name for path in (out / "sounds").iterdir())
    assert len(sounds) == 2 * 3 * 2  # two clips, three kinds, each beside its recording
    assert all(name in page for name in sounds)
    made = [load_audio(out / "sounds" / name)[0] for name in sounds]
    assert all(np.isfinite(wav).all() and len(wav) > 8000 for wav in made)
    capsys.readouterr()
    assert main([*arguments, "--before", "pocket"]) == 2
    assert "have different speech tokenizers, so their voices cannot be compared" in capsys.readouterr().err
    assert main([*arguments[:5], str(tmp_path / "model"), "-o", str(out)]) == 2
    assert "has no clip of split 'valid'" in capsys.readouterr().err


def test_likeness_and_words(tmp_path: Path) -> None:
    clips = [clip for clip in read_clips(Path(write_speaker(tmp_path / "ann"))) if clip.split == "valid"]

    class Recognizer:
        name = "scripted"

        def transcribe(self, wav: NDArray[np.float32], sample_rate: int, language: str = "en") -> str:
            return "tone 3" if sample_rate == 16000 else "a tone"

    class Embedder:
        def embed(self, wav: NDArray[np.float32], sample_rate: int) -> NDArray[np.float64]:
            return np.array([1.0, 0.0]) if sample_rate == 16000 else np.array([0.6, 0.8])

        def likeness(self, one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
            return float(one @ other)

    judges = VoiceJudges(Recognizer(), "", None, "not here", cast(SpeakerEmbedder, Embedder()))
    rows, shown = compare_voices(clips[:1], {"after": lambda clip: np.zeros(100, np.float32)}, judges)
    values = {(row.group, row.name): row.value for row in rows}
    assert values["after", "speaker likeness to the recording (cosine)"] == pytest.approx(0.6)
    assert (values["recording", "WER"], values["after", "WER"], values["after", "WER lost"]) == (0.0, 1.0, 1.0)
    assert [one.heard for one in shown] == ["a tone"]


def test_a_released_set_gets_a_voice(tmp_path: Path) -> None:
    init_random("tiny", tmp_path / "released")
    made = recipe(tmp_path, write_speaker(tmp_path / "ann"), tmp_path / "released")
    stage = VoiceStage(made)
    run(stage, LOOP, tmp_path / "run")
    out = tmp_path / "run" / "final" / "model" / "decoder"
    decoder = load_released_decoder(out)
    old = load_released_decoder(tmp_path / "released" / "decoder")
    weights = old.flow.state_dict()
    assert any(not torch.equal(value, weights[key]) for key, value in decoder.flow.state_dict().items())
    for key, value in stage.flow.state_dict().items():
        assert torch.equal(value, decoder.flow.state_dict()[key]), key
    for key, value in old.vocoder.state_dict().items():
        assert torch.equal(value, decoder.vocoder.state_dict()[key]), key


def test_by_its_recipe(tmp_path: Path) -> None:
    model, corpus = write_tiny_chatbot(tmp_path / "model"), write_speaker(tmp_path / "ann")
    loop = {"num_steps": 1, "learning_rate": 0.001, "warmup_steps": 1}
    fields = {"corpora": [corpus], "store": str(tmp_path / "store"), "model": str(model), "voice": "ann", "loop": loop}
    (tmp_path / "voice.yaml").write_text(json.dumps({**fields, "batch_s": 4.0}))
    assert train("voice", tmp_path / "voice.yaml", tmp_path / "run").folder == tmp_path / "run" / "final"
    assert (tmp_path / "run" / "final" / "model" / "duologue.json").exists()


def test_what_is_no_voice_is_refused(tmp_path: Path) -> None:
    model = write_tiny_chatbot(tmp_path / "model")
    two = write_speaker(tmp_path / "two", ("ann", "bob"))
    with pytest.raises(ValueError, match="a voice is one speaker; the corpora have 2: ann, bob"):
        VoiceStage(recipe(tmp_path, two, model))
    with pytest.raises(ValueError, match="leave the other keys out"):
        recipe(tmp_path, two, model, start_from="runs/flow/final")
