"""Low-rank adapters and frozen text rows: what is trained, and that saving merges it."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import PreTrainedModel

from duologue.cli import main
from duologue.config import load_config
from duologue.interleave import Kind
from duologue.language.adapters import LoraOptions, add_lora, merged_state, train_rows
from duologue.language.backbone import Provenance, load_language, new_glm, save_language
from duologue.training.adapter_folder import merge_adapter, save_adapter, whole_language
from duologue.training.chat import ChatRecipe
from duologue.training.loop import LoopConfig, run
from duologue.training.pretrain import PretrainRecipe, PretrainStage
from duologue.vocabulary import Vocabulary
from tests.tiny_language import TINY, small_corpus, tiny_vocabulary

LOOP = LoopConfig(2, 1e-2, warmup_steps=1, precision="fp32", evaluate_every=10**6, sample_every=10**6, log_every=1)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return tiny_vocabulary()


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(vocabulary: Vocabulary, request: pytest.FixtureRequest) -> PreTrainedModel:
    return new_glm(vocabulary, replace(TINY, tie_embeddings=request.param)).eval()


def test_divided_tables_compute_and_train_what_whole_ones_do(vocabulary: Vocabulary, model: PreTrainedModel) -> None:
    ids = torch.tensor([[*vocabulary.encode_text("one"), *vocabulary.speech_ids([3, 4]), vocabulary.end_id]])
    before, state = model(ids).logits.detach(), {key: value.clone() for key, value in model.state_dict().items()}
    train_rows(model, vocabulary)
    torch.testing.assert_close(model(ids).logits, before)
    merged = merged_state(model)
    assert merged.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(merged[key], value), key
    model(ids).logits.square().mean().backward()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    table = merged_state(model)["model.embed_tokens.weight"]
    moved = (table != state["model.embed_tokens.weight"]).any(1).numpy()
    for kind in (Kind.TEXT, Kind.PADDING):
        assert not moved[vocabulary.kinds == kind].any()
    assert moved[ids[0, -2]]


def test_a_stage_with_frozen_text_rows(tmp_path: Path) -> None:
    stage = PretrainStage(small_corpus(tmp_path, PretrainRecipe, loop=LOOP, freeze_text_rows=True))
    before = merged_state(stage.model)["model.embed_tokens.weight"].clone()
    run(stage, LOOP, tmp_path / "run")
    after = load_language(tmp_path / "run" / "final" / "language").get_input_embeddings().weight
    same = (before == after).all(1).numpy()
    assert same[stage.vocabulary.kinds == Kind.TEXT].all()
    assert not same[stage.vocabulary.kinds == Kind.SPEECH].any()


def test_lora_is_merged_into_what_is_saved(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed (extra lora)")
    recipe = small_corpus(tmp_path, PretrainRecipe, loop=LOOP, lora=LoraOptions(rank=4))
    stage = PretrainStage(recipe)
    before = {key: value.clone() for key, value in stage.model.state_dict().items()}
    run(stage, LOOP, tmp_path / "run")
    trained = [name for name, parameter in stage.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name or name.endswith("table.trained") for name in trained)
    saved = load_language(tmp_path / "run" / "final" / "language")
    for key, value in saved.state_dict().items():
        adapted = "proj.weight" in key or "embed_tokens" in key or "lm_head" in key
        assert torch.equal(value, before[key]) is not adapted, key
    batch = stage.batch(5)
    stage.model.eval()
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        torch.testing.assert_close(saved(**inputs).logits, stage.model(**inputs).logits, atol=1e-5, rtol=1e-4)
    resumed = PretrainStage(recipe)  # checkpoints hold what is trained alone
    run(resumed, LOOP, tmp_path / "run")
    for name, parameter in stage.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


@pytest.mark.parametrize("rows", ["speech", "all", "none"])
def test_a_kept_adapter_merges_into_the_same_weights(
    rows: Literal["speech", "all", "none"], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft", reason="peft is not installed (extra lora)")
    run(start := PretrainStage(small_corpus(tmp_path, PretrainRecipe, loop=LOOP)), LOOP, tmp_path / "base")
    base = tmp_path / "base" / "final" / "language"
    kept = LoraOptions(rank=4, alpha=6.0, train_embeddings=rows, merge=False)
    recipe = small_corpus(tmp_path, PretrainRecipe, loop=LOOP, start_from=str(base), lora=kept)
    stage = PretrainStage(recipe)
    run(stage, LOOP, tmp_path / "run")
    final = tmp_path / "run" / "final"
    assert sorted(path.name for path in final.iterdir()) == ["adapter"]
    assert ((final / "adapter" / "rows.safetensors").exists()) is (rows != "none")
    wanted = merged_state(stage.model)
    # The base has moved since.
    base.rename(tmp_path / "moved")
    assert main(["export", str(final), "-o", str(tmp_path / "x"), "--format", "transformers"]) != 0
    assert "does not exist; name its place with --base" in capsys.readouterr().err
    place = str(tmp_path / "moved")
    assert main(["export", str(final), "-o", str(tmp_path / "out"), "--format", "transformers", "--base", place]) == 0
    merged = load_language(tmp_path / "out").state_dict()
    assert merged.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(merged[key], value, atol=1e-6, rtol=1e-6)
    moved = [key for key, value in start.model.state_dict().items() if not torch.equal(value, merged[key])]
    assert any("proj" in key for key in moved)
    if rows == "none":
        import peft

        model = peft.PeftModel.from_pretrained(load_language(tmp_path / "moved"), str(final / "adapter"))
        own = model.merge_and_unload().state_dict()
        for key, value in wanted.items():
            torch.testing.assert_close(own[key], value, atol=1e-6, rtol=1e-6)


def test_an_adapter_without_its_base_is_refused(vocabulary: Vocabulary, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed (extra lora)")
    kept = LoraOptions(rank=4, merge=False)
    with pytest.raises(ValueError, match="there is no base to keep: give start_from or backbone"):
        PretrainStage(small_corpus(tmp_path, PretrainRecipe, loop=LOOP, lora=kept))
    model = new_glm(vocabulary, TINY)
    provenance = Provenance("f" * 64, vocabulary.hash)
    save_language(tmp_path / "base", model, provenance)
    save_language(tmp_path / "other", new_glm(vocabulary, replace(TINY, width=48)), provenance)
    add_lora(model, vocabulary, kept, torch.device("cpu"))
    save_adapter(tmp_path / "adapter", model, kept, str(tmp_path / "base"), vocabulary, provenance)
    with pytest.raises(ValueError, match="it is not the base"):
        merge_adapter(tmp_path / "adapter", base=tmp_path / "other")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read"):
        merge_adapter(tmp_path / "adapter")
    with (
        pytest.raises(ValueError, match="holds no adapter, so it has no base"),
        whole_language(tmp_path / "base", base=tmp_path / "other"),
    ):
        pass


@pytest.mark.parametrize("name", ["full", "lora", "qlora"])
def test_the_recipes_of_the_9b_are_recipes(name: str) -> None:
    path = Path(__file__).parent.parent / "recipes" / "released-9b" / f"{name}.yaml"
    recipe = load_config(path, ChatRecipe)
    assert (recipe.lora is None) is (name == "full")
    assert recipe.loop.evaluate_first
    assert recipe.activation_checkpointing


def test_what_cannot_be_adapted_is_refused(
    vocabulary: Vocabulary, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="rank must be at least 1"):
        LoraOptions(rank=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install peft"):
        add_lora(model, vocabulary, LoraOptions(), torch.device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ValueError, match="needs bitsandbytes on CUDA"):
        add_lora(model, vocabulary, LoraOptions(quantization="int4"), torch.device("cpu"))
