"""A language model that grows says what it said before, and can learn more."""

from pathlib import Path

import pytest
import torch

from duologue.language.backbone import LanguageConfig, load_language, load_provenance, new_glm, save_language
from duologue.vocabulary import Vocabulary
from recipes.pocket.grow import Growth, grow, layer_sources, main

LARGER = Growth(num_layers=5, num_kv_heads=2, ffn_dim=100)


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    vocabulary = Vocabulary.load(tiny_folder / "vocabulary")
    model = new_glm(vocabulary, LanguageConfig(32, 3, 4, 1, 16, 64))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_language(folder, model, load_provenance(tiny_folder / "language"))
    return folder


def test_logits_stay_and_every_weight_learns(folder: Path) -> None:
    model = load_language(folder)
    grown = grow(model, LARGER)
    assert grown.num_parameters() > 1.5 * model.num_parameters()
    ids = torch.arange(24).reshape(2, 12)
    torch.testing.assert_close(grown(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(grown(ids).logits.flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
    idle = [
        name
        for name, parameter in grown.named_parameters()
        if parameter.grad is None or not bool(parameter.grad.abs().sum())
    ]
    assert not idle


def test_copies_are_spread_evenly() -> None:
    assert layer_sources(8, 10) == [0, 0, 1, 2, 3, 4, 4, 5, 6, 7]
    assert layer_sources(3, 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("growth", "words"), [(Growth(2, 2, 100), "is not larger"), (Growth(5, 3, 100), "do not divide")]
)
def test_sizes_that_do_not_fit_are_refused(folder: Path, growth: Growth, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        grow(load_language(folder), growth)


def test_the_command_keeps_the_provenance(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["--layers", "4", "--kv-heads", "2", "--ffn-dim", "80"]
    monkeypatch.setattr("sys.argv", ["grow", "--model", str(folder), "--out", str(tmp_path / "grown"), *sizes])
    main()
    assert load_provenance(tmp_path / "grown") == load_provenance(folder)
    assert load_language(tmp_path / "grown").config.num_hidden_layers == 4
