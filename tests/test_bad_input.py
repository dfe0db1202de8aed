"""Whatever is given to the command line gets a sensible result, or one clear sentence and exit code 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from duologue.cli import main
from tests.tiny import write_tiny_chatbot

RATE = 16_000
Capture = pytest.CaptureFixture[str]


def tone(seconds: float = 1.0, rate: int = RATE, level: float = 0.3) -> np.ndarray:
    return (level * np.sin(2 * np.pi * 220 * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def written(path: Path, wav: np.ndarray, rate: int = RATE, subtype: str | None = None) -> Path:
    soundfile.write(path, wav, rate, subtype=subtype)
    return path


def refusal(capsys: Capture, *argv: str | Path) -> str:
    """The sentence that a command ends with; checks that it is one sentence, with exit code 2 and nothing else."""
    code = main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "is untrained" not in line]
    assert code == 2, (out, err)
    assert len(lines) == 1, err
    assert lines[0].startswith("duologue: ")
    assert "Traceback" not in err
    assert out == ""
    return lines[0].removeprefix("duologue: ")


# Sound that cannot be used -------------------------------------------------------------------------------------------


def missing(folder: Path) -> Path:
    return folder / "nothing.wav"


def a_folder(folder: Path) -> Path:
    return folder


def text_named_wav(folder: Path) -> Path:
    (folder / "text.wav").write_text("This is no sound.\n")
    return folder / "text.wav"


def no_bytes(folder: Path) -> Path:
    (folder / "empty.wav").touch()
    return folder / "empty.wav"


def no_samples(folder: Path) -> Path:
    return written(folder / "short.wav", np.zeros(0, np.float32))


def not_a_number(folder: Path) -> Path:
    wav = tone()
    wav[100] = np.nan
    return written(folder / "nan.wav", wav, subtype="FLOAT")


def infinite(folder: Path) -> Path:
    wav = tone()
    wav[100] = np.inf
    return written(folder / "inf.wav", wav, subtype="FLOAT")


def header_only(folder: Path) -> Path:
    path = written(folder / "cut.flac", tone())
    path.write_bytes(path.read_bytes()[:20])
    return path


def a_strange_rate(folder: Path) -> Path:
    return written(folder / "slow.wav", tone(), 1000)


def over_an_hour(folder: Path) -> Path:
    return written(folder / "long.wav", np.zeros(4000 * 3601, np.int16), 4000, "PCM_U8")


UNUSABLE: list[tuple[Callable[[Path], Path], str]] = [
    (missing, "no such file"),
    (a_folder, "is a folder"),
    (text_named_wav, "not a sound file"),
    (no_bytes, "not a sound file"),
    (no_samples, "is empty"),
    (not_a_number, "NaN"),
    (infinite, "NaN or infinite"),
    (header_only, "not a sound file"),
    (a_strange_rate, "1000 Hz"),
    (over_an_hour, "60 minutes"),
]


@pytest.mark.parametrize(("make", "words"), UNUSABLE, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("command", ["chat", "tokenize"])
def test_unusable_sound_gets_one_sentence(
    command: str, make: Callable[[Path], Path], words: str, tiny_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = make(tmp_path)
    sentence = refusal(capsys, command, path, "--model", tiny_folder)
    assert words in sentence
    assert path.name in sentence


# Sound that is unusual and fine --------------------------------------------------------------------------------------


def one_sample(folder: Path) -> Path:
    return written(folder / "one.wav", np.full(1, 0.5, np.float32))


def silence(folder: Path) -> Path:
    return written(folder / "silence.wav", np.zeros(RATE, np.float32))


def noise(folder: Path) -> Path:
    return written(folder / "noise.wav", np.random.default_rng(0).standard_normal(RATE).astype(np.float32) * 0.2)


def clipping(folder: Path) -> Path:
    return written(folder / "clipping.wav", tone(level=30.0), subtype="FLOAT")


def stereo(folder: Path) -> Path:
    return written(folder / "stereo.wav", np.stack([tone(), -tone()], 1))


def at_8k(folder: Path) -> Path:
    return written(folder / "8k.wav", tone(rate=8000), 8000)


def at_44k(folder: Path) -> Path:
    return written(folder / "44k.wav", tone(rate=44100), 44100)


def at_48k(folder: Path) -> Path:
    return written(folder / "48k.wav", tone(rate=48000), 48000)


def at_96k(folder: Path) -> Path:
    return written(folder / "96k.wav", tone(rate=96000), 96000)


def with_24_bits(folder: Path) -> Path:
    return written(folder / "24.wav", tone(), subtype="PCM_24")


def as_float(folder: Path) -> Path:
    return written(folder / "float.wav", tone(), subtype="FLOAT")


def as_flac(folder: Path) -> Path:
    return written(folder / "sound.flac", tone())


def as_ogg(folder: Path) -> Path:
    return written(folder / "sound.ogg", tone())


def as_mp3(folder: Path) -> Path:
    return written(folder / "sound.mp3", tone())


USABLE = [
    *(one_sample, silence, noise, clipping, stereo, at_8k, at_44k, at_48k, at_96k),
    *(with_24_bits, as_float, as_flac, as_ogg, as_mp3),
]


@pytest.mark.parametrize("make", USABLE, ids=lambda make: make.__name__)
def test_unusual_sound_gets_an_answer(
    make: Callable[[Path], Path], tiny_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    answer = tmp_path / "answer.wav"
    code = main(["chat", str(make(tmp_path)), "-o", str(answer), "--json", "--model", str(tiny_folder)])
    out, err = capsys.readouterr()
    assert code == 0, err
    (turn,) = json.loads(out)["turns"]
    wav, rate = soundfile.read(answer)
    assert rate == turn["sample_rate"]
    assert len(wav) == round(turn["timings"]["audio_s"] * rate) > 0
    assert np.isfinite(wav).all()


@pytest.mark.parametrize("make", USABLE, ids=lambda make: make.__name__)
def test_a_second_of_sound_is_twelve_and_a_half_tokens_at_any_rate(
    make: Callable[[Path], Path], tiny_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["tokenize", str(make(tmp_path)), "--json", "--model", str(tiny_folder)]) == 0
    result = json.loads(capsys.readouterr().out)
    if make is as_mp3:  # the encoder pads to whole frames
        assert 13 <= len(result["tokens"]) <= 15
    else:
        assert len(result["tokens"]) == (1 if make is one_sample else 13)


def test_two_minutes_of_speech(tmp_path: Path, tiny_folder: Path, capsys: Capture) -> None:
    rng = np.random.default_rng(0)
    question = written(tmp_path / "long.wav", rng.standard_normal(120 * RATE).astype(np.float32) * 0.1)
    sentence = refusal(capsys, "chat", question, "--model", tiny_folder)
    assert "too long" in sentence
    assert "seconds of speech" in sentence

    roomy = write_tiny_chatbot(tmp_path / "roomy", max_positions=2048, max_tokens=60)
    assert main(["chat", str(question), "--json", "--model", str(roomy)]) == 0
    assert json.loads(capsys.readouterr().out)["turns"][0]["speech_tokens"]


# Words and files around the sound ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("chat", "--text", "", "--model", "TINY"), "nothing was said"),
        (("chat", "--text", "Hello", "-o", "answer.txt", "--model", "TINY"), ".wav"),
        (
            ("chat", "--text", "Hello", "-o", "no/such/folder/a.wav", "--model", "TINY"),
            "the folder no/such/folder does not exist",
        ),
        (("chat", "--text", "Hello", "--voice", "bass", "--model", "TINY"), "'bass'"),
        (("chat", "--text", "Hello", "--temperature", "-1", "--model", "TINY"), "temperature must be 0 or more"),
        (("chat", "--text", "Hello", "--temperature", "hot", "--model", "TINY"), "'hot'"),
        (("chat", "--text", "Hello", "--device", "toaster", "--model", "TINY"), "'toaster'"),
        (("chat", "--text", "Hello", "--model", "no-such-model"), "'no-such-model'"),
        (("dance",), "'dance'"),
        (("chat", "--speed", "3"), "--speed"),
        (("train", "everything", "--recipe", "x.yaml"), "'everything'"),
        (("train", "tokenizer"), "--recipe"),
        (("train", "tokenizer", "--recipe", "nothing.yaml"), "nothing.yaml does not exist"),
        (("plot", "no-such-run"), "no-such-run/log.csv does not exist"),
        (("evaluate", "pocket", "--data", "no-such-data", "--model", "TINY"), "recipes.pocket.corpus"),
        (("evaluate", "pocket", "--limit", "0"), "'0'"),
        (("evaluate", "everything"), "'everything'"),
        (("bench", "latency", "--question", "nothing.wav", "--model", "TINY"), "no such file"),
        (("bench", "bandwidth"), "'bandwidth'"),
        (("synthesize", "nothing.json", "-o", "out.wav", "--model", "TINY"), "no such file"),
        (("synthesize", "nothing.json", "-o", "out.doc", "--model", "TINY"), ".wav"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_words_get_one_sentence(
    argv: tuple[str, ...],
    words: str,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    sentence = refusal(capsys, *(tiny_folder if arg == "TINY" else arg for arg in argv))
    assert words in sentence
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1, 2, 32]", "32"),
        ("[1, -1]", "-1"),
        ("[1, 2.5]", "whole numbers"),
        ("[true]", "whole numbers"),
        ('{"codes": [1]}', "whole numbers"),
        ("[]", "no tokens"),
        ("tokens", "not JSON"),
        ('{"tokens": [1], "tokenizer": "0123456789abcdef"}', "another tokenizer"),
    ],
)
def test_tokens_that_cannot_be_spoken(
    content: str, words: str, tiny_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "tokens.json").write_text(content)
    output = tmp_path / "out.wav"
    sentence = refusal(capsys, "synthesize", tmp_path / "tokens.json", "-o", output, "--model", tiny_folder)
    assert words in sentence
    assert not output.exists()


# Model folders and recipes -------------------------------------------------------------------------------------------


def without_card(folder: Path) -> None:
    (folder / "duologue.json").unlink()


def without_language(folder: Path) -> None:
    shutil.rmtree(folder / "language")


def with_truncated_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def with_another_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer" / "model.safetensors"
    tensors = load_file(path)
    save_file({key: value + 1 if value.is_floating_point() else value for key, value in tensors.items()}, path)


def with_unknown_key(folder: Path) -> None:
    path = folder / "decoder" / "vocoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "blue"}))


def with_other_sizes(folder: Path) -> None:
    path = folder / "decoder" / "vocoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"width": 24}))


def with_nan(folder: Path) -> None:
    path = folder / "decoder" / "flow" / "model.safetensors"
    tensors = load_file(path)
    name = next(key for key, value in tensors.items() if value.is_floating_point())
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_card, "duologue.json does not exist"),
        (without_language, "language"),
        (with_truncated_tokenizer, "truncated"),
        (with_another_tokenizer, "another tokenizer"),
        (with_unknown_key, "'colour'"),
        (with_other_sizes, "shape"),
        (with_nan, "not finite"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_model_folder_gets_one_sentence(
    spoil: Callable[[Path], None], words: str, tiny_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    spoil(folder)
    assert words in refusal(capsys, "chat", "--text", "Hello", "--model", folder)


@pytest.mark.parametrize(
    ("recipe", "setting", "words"),
    [
        ("corpora: [nowhere]\nloop: {num_steps: 1, learning_rate: 1e-3, speed: 3}", "", "'loop.speed'"),
        ("corpora: [nowhere]\nloop: {num_steps: many, learning_rate: 1e-3}", "", "'many'"),
        ("corpora: [nowhere]", "", "'loop'"),
        ("corpora: [nowhere", "", "not plain YAML"),
        ("- 1", "", "must hold keys"),
        ("corpora: !!python/name:os.system x", "", "not plain YAML"),
        ("corpora: [nowhere]\nloop: {num_steps: 1, learning_rate: 1e-3}", "", "nowhere"),
        ("corpora: [nowhere]\nloop: {num_steps: 1, learning_rate: 1e-3}", "loop.speed=2", "'loop.speed'"),
        ("corpora: [nowhere]\nloop: {num_steps: 1, learning_rate: 1e-3}", "loop", "loop.num_steps=20"),
        ("corpora: [nowhere]\nloop: {num_steps: 1, learning_rate: 1e-3}", "corpora.x=2", "corpora"),
    ],
)
def test_a_bad_recipe_gets_one_sentence(
    recipe: str, setting: str, words: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe)
    settings = ["--set", setting] if setting else []
    assert words in refusal(capsys, "train", "vocoder", "--recipe", "recipe.yaml", *settings)
