"""Folders of the released decoder: what is read, and one sentence with file and key for what is not."""

import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from duologue.layers import Padded
from duologue.released.decoder.blocks import OFFLINE
from duologue.released.decoder.decoder import ReleasedDecoder, load_released_decoder, save_released_decoder
from duologue.released.decoder.flow import ReleasedFlowConfig
from duologue.released.decoder.folder import read_decoder_config, read_weights, write_decoder_config
from duologue.released.decoder.hift import HiFTConfig
from tests.released_sizes import FLOW, HIFT, small_decoder, small_tokens

RELEASED = Path(os.environ.get("DUOLOGUE_RELEASED") or Path(__file__).parents[2] / "shared" / "released") / "decoder"

# The published config.yaml holds more than the decoder: seeds, a model without weights, a pipeline.
AROUND = """
# set random seed
__set_seed1: !apply:random.seed [1986]
__set_seed2: !apply:torch.cuda.manual_seed_all [1986]
llm_input_size: 1024
spk_embed_dim: 12
llm: !new:cosyvoice.llm.llm.TransformerLM
    llm_input_size: !ref <llm_input_size>
    text_encoder: !new:cosyvoice.transformer.encoder.ConformerEncoder
        output_size: 1024
get_tokenizer: !name:whisper.tokenizer.get_tokenizer
    multilingual: True
collate: !name:cosyvoice.dataset.processor.padding
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_released_decoder(folder, small_decoder(), note="random weights")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path


def wav_of(decoder: ReleasedDecoder) -> torch.Tensor:
    """Two tokens at once, with few steps of the solver."""
    state = decoder.init_state(1, num_steps=1, streaming=OFFLINE)
    with torch.inference_mode():
        wav: torch.Tensor = decoder(Padded.full(small_tokens(2)[None]), state).values
    return wav


@pytest.mark.parametrize("safetensors", [False, True], ids=["pt", "safetensors"])
def test_a_saved_decoder_comes_back(tmp_path: Path, safetensors: bool) -> None:
    decoder = small_decoder()
    save_released_decoder(tmp_path, decoder, note="random weights\nfor tests", safetensors=safetensors)
    loaded = load_released_decoder(tmp_path)
    assert (loaded.flow.config, loaded.vocoder.network.config) == (FLOW, HIFT)
    assert not loaded.training
    torch.testing.assert_close(wav_of(loaded), wav_of(decoder), atol=1e-4, rtol=0)
    assert (tmp_path / "config.yaml").read_text().startswith("# random weights\n# for tests\nsample_rate: 22050\n")


def test_published_sizes_are_written_and_read(tmp_path: Path) -> None:
    write_decoder_config(tmp_path, ReleasedFlowConfig(), HiFTConfig())
    assert read_decoder_config(tmp_path) == (ReleasedFlowConfig(), HiFTConfig())
    text = (tmp_path / "config.yaml").read_text()
    assert "encoder: !new:cosyvoice.transformer.encoder.BlockConformerEncoder" in text
    assert "cfm_params: !new:omegaconf.DictConfig" in text


def test_what_stands_around_the_decoder_is_left_alone(folder: Path) -> None:
    path = folder / "config.yaml"
    text = path.read_text().replace("spk_embed_dim: 12", "spk_embed_dim: !ref <spk_embed_dim>")
    path.write_text(AROUND + text)
    assert read_decoder_config(folder) == (FLOW, HIFT)


@pytest.mark.skipif(not RELEASED.is_dir(), reason="no folder in the released format")
def test_the_released_folder_loads_and_speaks() -> None:
    decoder = load_released_decoder(RELEASED)
    state = decoder.init_state(1, num_steps=1)
    with torch.inference_mode():
        wav = decoder(Padded.full(torch.tensor([[3, 1, 4, 1, 5]])), state).rows()[0]
    assert len(wav) == 34 * 256
    assert bool(wav.isfinite().all())


def replaced(pattern: str, by: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.yaml"
        text, count = re.subn(pattern, by, path.read_text(), count=1)
        assert count, f"{pattern} is not in the file"
        path.write_text(text)

    return change


BAD_CONFIGS = {
    "no file": (lambda folder: (folder / "config.yaml").unlink(), r"config\.yaml does not exist"),
    "not yaml": (replaced("sample_rate: 22050", "sample_rate: [22050"), r"config\.yaml is not YAML"),
    "a list": (lambda folder: (folder / "config.yaml").write_text("- 1\n"), "must hold keys with values, not list"),
    "binary": (lambda folder: (folder / "config.yaml").write_bytes(b"\xff\xfe\x00"), "cannot be read as text"),
    "python tag": (
        replaced("sample_rate: 22050", "sample_rate: !!python/object/apply:os.system [echo]"),
        r"has a tag tag:yaml.org,2002:python/object/apply:os.system \(line 2\); only !new:, !apply:, !name: and !ref",
    ),
    "other tag": (replaced("sample_rate: 22050", "sample_rate: !include:x.yaml"), "has a tag !include:x.yaml"),
    "no part": (replaced("hift:", "vocoder:"), "has no key 'hift'"),
    "other class": (
        replaced("encoder.BlockConformerEncoder", "encoder.ConformerEncoder"),
        r"flow\.encoder in .* is tagged !new:cosyvoice\.transformer\.encoder\.ConformerEncoder; only "
        r"!new:\.\.\.BlockConformerEncoder is known there",
    ),
    "a call": (
        replaced(" !new:cosyvoice.flow.flow.Masked", " !apply:cosyvoice.flow.flow.Masked"),
        r"flow in .* is tagged !apply:",
    ),
    "no tag": (replaced("estimator: !new:.*", "estimator:"), r"flow\.decoder\.estimator in .* has no tag"),
    "a call inside": (replaced("channels: 80", "channels: !apply:os.getpid []"), "tagged !apply:os.getpid; no tag is"),
    "lost reference": (
        replaced("spk_embed_dim: 12", "spk_embed_dim: !ref <nowhere>"),
        r"flow\.spk_embed_dim in .* refers to <nowhere>, which does not exist",
    ),
    "sum": (replaced("spk_embed_dim: 12", "spk_embed_dim: !ref <a> + 1"), "only a plain <key> is read"),
    "unknown key": (replaced("    vocab_size", "    size_of_vocab: 3\n    vocab_size"), "unknown key 'size_of_vocab'"),
    "unknown matching key": (replaced("n_spks: 1", "num_speakers: 1"), r"unknown key 'flow\.decoder\.num_speakers'"),
    "twice": (replaced("    vocab_size: 32", "    vocab_size: 32\n    vocab_size: 33"), "'vocab_size' is given twice"),
    "wrong kind": (replaced("vocab_size: 32", "vocab_size: many"), "vocab_size in .* must be int, got 'many'"),
    "other switch": (
        replaced("use_cnn_module: false", "use_cnn_module: true"),
        "use_cnn_module .* the choices are False",
    ),
    "other solver": (replaced("solver: euler", "solver: heun"), "solver.solver .* is 'heun'; the choices are 'euler'"),
    "other rate": (replaced("input_frame_rate: 12.5", "input_frame_rate: 25"), "input_frame_rate is 25.0; only 12.5"),
    "other channels": (
        replaced("in_channels: 240", "in_channels: 320"),
        "in_channels in .* is 320; the other sizes require 240",
    ),
    "sizes disagree": (
        replaced("in_channels: 320", "in_channels: 300"),
        "estimator.in_channels is 300; the other sizes require 320",
    ),
    "heads": (replaced("attention_heads: 2", "attention_heads: 3"), "a multiple of attention_heads 3"),
    "ratios": (replaced(r"sampling_ratios: \[1, 1", "sampling_ratios: [1, 2"), "only ratios of 1 are known"),
    "hop": (
        replaced("hop_len: 4", "hop_len: 2"),
        "the vocoder makes 128 samples a frame at 22050 Hz; only 256 at 22050",
    ),
    "other mels": (replaced("(?s)(hift:.*?in_channels: )80", r"\g<1>100"), "hift.in_channels in .* is 100, but"),
}


@pytest.mark.parametrize(("change", "words"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_a_bad_config_gets_one_sentence(folder: Path, change: Callable[[Path], None], words: str) -> None:
    change(folder)
    with pytest.raises(ValueError, match=words) as caught:
        load_released_decoder(folder)
    assert "config.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def edited(name: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        state = torch.load(folder / f"{name}.pt", weights_only=True)
        edit(state)
        torch.save(state, folder / f"{name}.pt")

    return change


def truncated(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return change


def not_a_state(folder: Path) -> None:
    torch.save(torch.zeros(3), folder / "flow.pt")


def nested(folder: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}}, folder / "flow.pt")


class Trap:
    """What a pickle may do when it is believed."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.putenv, ("DUOLOGUE_TRAPPED",)


def trapped(folder: Path) -> None:
    (folder / "hift.pt").write_bytes(pickle.dumps(Trap(), protocol=2))


def other_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "flow.pt", "w") as file:
        file.writestr("readme", "nothing")


BAD_WEIGHTS = {
    "missing": (
        lambda folder: (folder / "hift.pt").unlink(),
        r"hift\.pt does not exist, and hift\.safetensors neither",
    ),
    "truncated": (truncated("flow.pt"), r"flow\.pt is truncated, damaged or no PyTorch file"),
    "empty": (lambda folder: (folder / "hift.pt").write_bytes(b""), r"hift\.pt is truncated, damaged or no PyTorch"),
    "text": (lambda folder: (folder / "flow.pt").write_text("version https://git-lfs"), r"flow\.pt is damaged"),
    "a zip": (other_zip, r"flow\.pt is truncated, damaged or no PyTorch file"),
    "a trap": (trapped, r"hift\.pt is damaged, or holds objects other than tensors"),
    "a tensor": (not_a_state, r"flow\.pt must hold named tensors, not Tensor"),
    "nested": (nested, r"flow\.pt must hold named tensors, but 'model' is dict"),
    "lost key": (edited("flow", lambda x: x.pop("encoder_proj.bias")), r"flow\.pt has no weight 'encoder_proj\.bias'"),
    "more keys": (edited("hift", lambda x: x.update(extra=torch.zeros(1))), r"hift\.pt has a weight 'extra'"),
    "shape": (
        edited("hift", lambda x: x.update({"conv_post.bias": torch.zeros(7)})),
        r"hift\.pt: weight 'conv_post\.bias' has shape \(7,\), the config asks for \(18,\)",
    ),
    "not finite": (
        edited("flow", lambda x: x["input_embedding.weight"].fill_(torch.nan)),
        r"flow\.pt: weight 'input_embedding\.weight' holds values that are not finite",
    ),
}


@pytest.mark.parametrize(("change", "words"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS.keys())
def test_bad_weights_get_one_sentence(folder: Path, change: Callable[[Path], None], words: str) -> None:
    change(folder)
    with pytest.raises(ValueError, match=words) as caught:
        load_released_decoder(folder)
    assert "\n" not in str(caught.value)
    assert "DUOLOGUE_TRAPPED" not in os.environ


def test_truncated_safetensors_and_missing_folder(tmp_path: Path) -> None:
    save_released_decoder(tmp_path, small_decoder(), safetensors=True)
    truncated("hift.safetensors")(tmp_path)
    with pytest.raises(ValueError, match=r"hift\.safetensors is truncated, damaged or no safetensors file"):
        load_released_decoder(tmp_path)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        load_released_decoder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        read_weights(tmp_path / "nowhere", "flow")


def test_half_precision_files_are_read_as_float32(tmp_path: Path) -> None:
    save_released_decoder(tmp_path, small_decoder(), safetensors=True, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "flow.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    decoder = load_released_decoder(tmp_path)
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}
    save_file(
        {key: tensor for key, tensor in stored.items() if key != "encoder_proj.bias"}, tmp_path / "flow.safetensors"
    )
    with pytest.raises(ValueError, match=r"flow\.safetensors has no weight 'encoder_proj\.bias'"):
        load_released_decoder(tmp_path)
