"""Export into the released layouts is the opposite of reading them, byte for byte of the weights."""

from pathlib import Path

import pytest
import torch

from duologue.checkpoint import load_tensors, save_component
from duologue.cli import main
from duologue.config import read_json
from duologue.language.backbone import Provenance, load_language, save_language
from duologue.released.convert import convert
from duologue.released.decoder.decoder import load_released_decoder
from duologue.released.gguf import write_gguf
from duologue.released.language import load_released_language, read_released
from duologue.released.random_weights import init_random
from duologue.released.text import load_released_vocabulary, save_for_transformers
from duologue.training.export import export_language, export_released
from tests.tiny_language import tiny_model, tiny_vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random released set, and its language model as training saves it."""
    folder = tmp_path_factory.mktemp("export")
    init_random("tiny", folder / "released")
    language = folder / "released" / "language"
    model = load_released_language(language, "bfloat16")
    vocabulary = load_released_vocabulary(language)
    place = folder / "final" / "language"
    save_language(place, model, Provenance("f" * 64, vocabulary.hash), dtype="bfloat16")
    save_for_transformers(vocabulary, place)
    return folder


def test_a_language_model_returns_to_the_released_layout(folder: Path, tmp_path: Path) -> None:
    assert main(["export", str(folder / "final"), "-o", str(tmp_path / "out")]) == 0
    source, out = folder / "released" / "language", tmp_path / "out" / "language"
    first, second = load_tensors(source), load_tensors(out)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype
        assert torch.equal(value, second[key]), key
    assert (source / "tokenizer.model").read_bytes() == (out / "tokenizer.model").read_bytes()
    old, new = read_json(source / "config.json"), read_json(out / "config.json")
    assert {key: value for key, value in old.items() if new.get(key) != value} == {"random_weights": True}
    assert read_released(out).config.to_dict() == read_released(source).config.to_dict()


def test_shards_and_dtype(folder: Path, tmp_path: Path) -> None:
    export_language(folder / "final" / "language", tmp_path / "out", "float32", max_shard_bytes=50_000)
    assert len(list(tmp_path.glob("out/model-*.safetensors"))) > 1
    weights = load_released_language(tmp_path / "out", "float32").state_dict()
    for key, value in load_released_language(folder / "released" / "language", "float32").state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_transformers_folders_of_both_kinds(folder: Path, tmp_path: Path) -> None:
    for name, source in (("a", folder / "final"), ("b", folder / "released" / "language")):
        assert main(["export", str(source), "-o", str(tmp_path / name), "--format", "transformers"]) == 0
    convert(folder / "released" / "language", tmp_path / "c")
    wanted = load_language(tmp_path / "c").state_dict()
    for name in ("a", "b"):
        for key, value in load_language(tmp_path / name).state_dict().items():
            assert torch.equal(value, wanted[key]), key


def test_a_gguf_file_is_that_of_the_released_folder(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed (extra gguf)")
    assert main(["export", str(folder / "final"), "-o", str(tmp_path / "a.gguf"), "--format", "gguf"]) == 0
    write_gguf(folder / "released" / "language", tmp_path / "b.gguf")
    from gguf import GGUFReader

    first, second = (
        {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / name).tensors} for name in ("a.gguf", "b.gguf")
    )
    assert first.keys() == second.keys()
    assert all((data == second[name]).all() for name, data in first.items())


def test_a_flow_returns_to_the_released_layout(folder: Path, tmp_path: Path) -> None:
    decoder = folder / "released" / "decoder"
    flow = load_released_decoder(decoder).flow
    save_component(tmp_path / "final" / "flow", flow, flow.config)
    with pytest.raises(ValueError, match="--decoder"):
        export_released(tmp_path / "final", tmp_path / "out")
    assert export_released(tmp_path / "final", tmp_path / "out", decoder=decoder) == ["decoder"]
    for name in ("flow.pt", "hift.pt"):
        first, second = (
            torch.load(place / name, weights_only=True) for place in (decoder, tmp_path / "out" / "decoder")
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_what_has_no_released_layout_is_refused(folder: Path, tmp_path: Path) -> None:
    vocabulary = tiny_vocabulary()
    save_language(tmp_path / "final" / "language", tiny_model(vocabulary), Provenance("f" * 64, vocabulary.hash))
    save_for_transformers(vocabulary, tmp_path / "final" / "language")
    with pytest.raises(ValueError, match="not of the released kind|has no token|no token"):
        export_released(tmp_path / "final", tmp_path / "out")
    with pytest.raises(ValueError, match="holds neither"):
        export_released(tmp_path, tmp_path / "other")
    with pytest.raises(ValueError, match="not an empty folder"):
        export_released(folder / "final", folder)
