"""A whole released set, random at the tiny preset: found by what it holds, run end to end, told by the doctor."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from duologue import rates
from duologue.cli import main
from duologue.conversation.chatbot import Chatbot, load
from duologue.doctor import CheckState, examine
from duologue.language.engine import PlainEngine
from duologue.layers import Padded
from duologue.models import Models, open_folder
from duologue.released.folder import ReleasedFolder
from duologue.released.random_weights import init_random
from duologue.sound_files import load_audio
from tests.parity import RELEASED


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "tiny"
    init_random("tiny", folder)
    return folder


@pytest.fixture
def released(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made, tmp_path / "set"))


def ask(bot: Chatbot) -> None:
    """One spoken question and its answer, in words and sound."""
    sampling = replace(bot.models.card.sampling, temperature=1.0, top_p=1.0, max_tokens=40)
    session = bot.session(sampling=sampling)
    time = np.arange(24_000) / rates.LISTEN_SAMPLE_RATE
    session.feed((0.1 * np.sin(2 * np.pi * 300 * time)).astype(np.float32), rates.LISTEN_SAMPLE_RATE)
    reply = session.reply_now()
    assert reply.audio.size == rates.speak_samples_for_tokens(len(reply.speech_tokens))
    assert np.isfinite(reply.audio).all()


def test_a_random_set_answers_and_says_that_it_is_random(made: Path) -> None:
    assert not open_folder(made).card.trained
    ask(load(made, dtype="float32"))


def test_the_decoder_of_a_set_computes_in_the_type_that_is_asked_for(made: Path, tmp_path: Path) -> None:
    usual, named, half = (open_folder(made).load_decoder(dtype=dtype) for dtype in (None, "float32", "bfloat16"))
    for decoder, dtype in ((usual, torch.float32), (half, torch.bfloat16)):
        assert {p.dtype for p in decoder.flow.decoder.parameters()} == {dtype}  # the U-Net
        assert {p.dtype for p in decoder.flow.encoder.parameters()} == {torch.float32}
        assert {p.dtype for p in decoder.vocoder.parameters()} == {torch.float32}
    tokens = Padded.full(torch.arange(10)[None])
    with torch.inference_mode():
        mel, same, in_half = (decoder.flow(tokens).values for decoder in (usual, named, half))
    assert mel.dtype == in_half.dtype == torch.float32
    assert 0 < float((mel - in_half).abs().mean()) < 0.05 * float(mel.abs().mean())
    assert torch.equal(same, mel)

    bot = load(made, dtype="float32", decoder_dtype="bfloat16")
    assert next(bot.models.decoder.flow.decoder.parameters()).dtype == torch.bfloat16
    ask(bot)
    (tmp_path / "tokens.json").write_text(json.dumps(list(range(10))))
    sound = tmp_path / "sound.wav"
    command = ("synthesize", str(tmp_path / "tokens.json"), "-o", str(sound), "--model", str(made))
    assert main([*command, "--decoder-dtype", "bfloat16"]) == 0
    heard, _ = load_audio(sound)
    assert main(list(command)) == 0
    assert not np.array_equal(heard, load_audio(sound)[0])


def test_a_type_that_the_decoder_has_not_is_refused(made: Path, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="unknown decoder_dtype 'float16'; the choices are float32, bfloat16"):
        Models.load(made, decoder_dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="computes in float32; only a released one can do so in bfloat16"):
        load(tiny_folder, decoder_dtype="bfloat16")


@pytest.mark.skipif(not RELEASED.is_dir(), reason="there are no released format folders: see tests/parity.py")
def test_the_released_format_folders_answer() -> None:
    ask(load(RELEASED))


def test_a_set_with_a_converted_language_model_answers_the_same(released: Path) -> None:
    plain = Models.load(released)
    assert main(["convert", str(released), "-o", str(released / "native")]) == 0
    shutil.rmtree(released / "language")
    converted = Models.load(released)
    assert converted.vocabulary.hash == plain.vocabulary.hash
    theirs = AutoModelForCausalLM.from_pretrained(released / "native")
    assert theirs.dtype == torch.bfloat16
    sampling = replace(plain.card.sampling, max_tokens=30)
    ids = []
    for models in (plain, converted):
        assert isinstance(models.engine, PlainEngine)
        ids.append(list(models.engine.stream([1, 2, 3], sampling)))
    assert ids[0] == ids[1]


def lose_decoder(folder: Path) -> None:
    shutil.rmtree(folder / "decoder")


def double_tokenizer(folder: Path) -> None:
    shutil.copytree(folder / "tokenizer", folder / "tokenizer-2")


def other_codebook(folder: Path) -> None:
    path = folder / "decoder" / "config.yaml"
    path.write_text(path.read_text().replace("vocab_size: 256", "vocab_size: 128"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lose_decoder, r"lacks the decoder of a released set: a folder with config.yaml"),
        (double_tokenizer, r"holds the speech tokenizer of a released set twice: tokenizer and tokenizer-2"),
        (other_codebook, r"unequal sizes: quantize_vocab_size in .*config.json is 256, .* in .*config.yaml is 128"),
    ],
)
def test_a_bad_set_is_told_in_one_sentence(released: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(released)
    with pytest.raises(ValueError, match=said) as caught:
        Models.load(released)
    assert "\n" not in str(caught.value)


def test_a_folder_without_any_part_is_no_set(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    assert ReleasedFolder.find(tmp_path) is None


def test_the_doctor_tells_what_each_part_needs_and_how_to_run_it(
    made: Path, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = {check.name: check for check in examine(made)}
    assert "int4" in checks["part language"].found
    assert checks["model fits"].state is CheckState.OK
    assert f"duologue chat QUESTION.wav -o ANSWER.wav --model {made}" in checks["model fits"].found
    monkeypatch.setattr("duologue.machine.free_memory_gb", lambda: 0.5)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    checks = {check.name: check for check in examine(made)}
    assert checks["model fits"].state is CheckState.BROKEN
    path = released / "tokenizer" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    found = next(check for check in examine(released) if check.name.startswith("model"))
    assert found.state is CheckState.BROKEN
    assert "model.safetensors is truncated" in found.found


def test_the_commands_write_sets_and_refuse_what_is_there(
    tmp_path: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init-random", "tiny", "-o", str(tmp_path / "new"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["preset"] == "tiny"
    ours, theirs = ((folder / "tokenizer" / "model.safetensors").read_bytes() for folder in (tmp_path / "new", made))
    assert ours == theirs  # the seed says everything
    assert main(["init-random", "tiny", "-o", str(tmp_path / "new")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert main(["convert", str(tmp_path), "-o", str(tmp_path / "native")]) == 2
    assert "config.json does not exist" in capsys.readouterr().err
