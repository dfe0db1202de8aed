"""The average of language models: weights, shapes, and the command."""

from pathlib import Path

import pytest
import torch

from duologue.language.backbone import LanguageConfig, load_language, load_provenance, new_glm, save_language
from duologue.vocabulary import Vocabulary
from recipes.pocket.average import average, main
from recipes.pocket.grow import Growth, grow

SMALL = LanguageConfig(32, 2, 2, 1, 16, 48)


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    vocabulary, out = Vocabulary.load(tiny_folder / "vocabulary"), tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        save_language(out / str(seed), new_glm(vocabulary, SMALL, seed), load_provenance(tiny_folder / "language"))
    return [out / "0", out / "1"]


def test_the_command_averages_by_weight(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["average", "--out", str(tmp_path), str(folders[0]), f"{folders[1]}=3"])
    main()
    one, other, mean = (dict(load_language(folder).named_parameters()) for folder in (*folders, tmp_path))
    for name, value in mean.items():
        torch.testing.assert_close(value, 0.25 * one[name] + 0.75 * other[name])
    assert load_provenance(tmp_path) == load_provenance(folders[0])


def test_models_that_do_not_fit_are_refused(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_language(folders[0])
    with pytest.raises(ValueError, match="differ in shape"):
        average([model, grow(model, Growth(3, 1, 48))], [1.0, 1.0])
    monkeypatch.setattr("sys.argv", ["average", "--out", "never", f"{folders[0]}=0"])
    with pytest.raises(SystemExit, match="1"):
        main()
