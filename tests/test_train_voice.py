"""Stage `voice`: the flow of a model learns one speaker, and the result is a model with a report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import duologue
from duologue.checkpoint import file_hash, load_component, load_tensors
from duologue.config import read_json
from duologue.decoder.flow import Flow, FlowConfig
from duologue.released.decoder.decoder import load_released_decoder
from duologue.released.random_weights import init_random
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
    fields = {"model": str(model), "voice": "ann", "store": str(tmp_path / "store"), "batch_s": 4.0, "num_compared": 2}
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

    rows = {(row["group"], row["name"]): row for row in read_json(final / "report.json")["rows"]}
    for kind in ("vocoder", "before", "after"):
        assert rows[kind, "speaker likeness to the recordings (cosine)"]["skipped"] == "no speaker_model was given"
    page = (final / "report.html").read_text()
    sounds = sorted(path.name for path in (final / "sounds").iterdir())
    assert len(sounds) == 2 * 3 * 2  # two clips, three kinds, each beside its recording
    assert all(name in page for name in sounds)
    assert (tmp_path / "run" / "samples" / "step-0000002" / "report.html").exists()


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
    (tmp_path / "voice.yaml").write_text(json.dumps({**fields, "batch_s": 4.0, "num_compared": 1}))
    assert train("voice", tmp_path / "voice.yaml", tmp_path / "run").folder == tmp_path / "run" / "final"
    assert (tmp_path / "run" / "final" / "model" / "duologue.json").exists()


def test_what_is_no_voice_is_refused(tmp_path: Path) -> None:
    model = write_tiny_chatbot(tmp_path / "model")
    two = write_speaker(tmp_path / "two", ("ann", "bob"))
    with pytest.raises(ValueError, match="a voice is one speaker; the corpora have 2: ann, bob"):
        VoiceStage(recipe(tmp_path, two, model))
    with pytest.raises(ValueError, match="leave the other keys out"):
        recipe(tmp_path, two, model, start_from="runs/flow/final")
    with pytest.raises(ValueError, match="whisper"):
        VoiceStage(recipe(tmp_path, two, model, recognizer=str(tmp_path / "no-whisper")))
    with pytest.raises(ValueError, match=r"speaker\.onnx"):
        VoiceStage(recipe(tmp_path, two, model, speaker_model=str(tmp_path / "speaker.onnx")))
