"""The language model on disk: any causal LM of transformers, extended, refused where it does not fit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from duologue.language.backbone import (
    LanguageConfig,
    Provenance,
    extend,
    load_language,
    load_provenance,
    new_glm,
    save_language,
    start_speech_embeddings,
)
from duologue.vocabulary import Vocabulary
from recipes.pocket.text import train_text_tokenizer

TINY = LanguageConfig(width=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, ffn_dim=48, max_positions=256)
SIBLINGS = Provenance("a" * 64, "b" * 64)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    tokenizer = train_text_tokenizer(["one and two is three", "what is the capital of France?"], 320)
    return Vocabulary.extend(tokenizer, codebook_size=64, multiple_of=16)


@pytest.fixture
def folder(vocabulary: Vocabulary, tmp_path: Path) -> Path:
    save_language(tmp_path / "language", new_glm(vocabulary, TINY), SIBLINGS)
    return tmp_path / "language"


def test_pocket_has_about_ten_million_parameters() -> None:
    tokenizer = train_text_tokenizer(["a"], 257)
    vocabulary = Vocabulary.extend(tokenizer, codebook_size=2048, num_rows=5120)
    with torch.device("meta"):
        model = new_glm(vocabulary, LanguageConfig())
    assert 8e6 < sum(parameter.numel() for parameter in model.parameters()) < 11e6


def test_plain_transformers_reads_what_was_saved(vocabulary: Vocabulary, folder: Path) -> None:
    ours = load_language(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.config.model_type == "glm"
    assert load_provenance(folder) == SIBLINGS


def test_the_same_seed_makes_the_same_weights_and_leaves_the_global_generator_alone(vocabulary: Vocabulary) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, other = new_glm(vocabulary, TINY, seed=1), new_glm(vocabulary, TINY, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_half_precision_on_disk_and_in_memory(vocabulary: Vocabulary, tmp_path: Path) -> None:
    model = new_glm(vocabulary, TINY)
    save_language(tmp_path, model, SIBLINGS, dtype="bfloat16", max_shard_bytes=20_000)
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert not any("lm_head.weight" in load_file(shard) for shard in shards)  # it is the input embedding
    assert next(model.parameters()).dtype == torch.float32
    loaded = load_language(tmp_path)
    assert next(loaded.parameters()).dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.bfloat16().float(), loaded.get_parameter(name))
    assert next(load_language(tmp_path, "bfloat16").parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_int8_on_disk_is_full_precision_in_memory(vocabulary: Vocabulary, tmp_path: Path, tied: bool) -> None:
    model = new_glm(vocabulary, replace(TINY, tie_embeddings=tied)).eval()
    save_language(tmp_path / "int8", model, SIBLINGS, dtype="int8")
    save_language(tmp_path / "float", model, SIBLINGS)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("int8", "float")]
    assert sizes[0] < 0.35 * sizes[1]
    read = load_language(tmp_path / "int8")
    assert (read.get_input_embeddings().weight is read.get_output_embeddings().weight) == tied
    assert read.generation_config.eos_token_id == model.generation_config.eos_token_id
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected, found = model(ids).logits, read(ids).logits
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.02 * expected.norm()
    weights = dict(read.named_parameters())
    save_language(tmp_path / "again", read, SIBLINGS, dtype="int8")
    assert all(torch.equal(weights[key], value) for key, value in load_language(tmp_path / "again").named_parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_any_causal_lm_is_extended_by_mean_rows(vocabulary: Vocabulary, tied: bool) -> None:
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    model = Qwen2ForCausalLM(config).eval()
    before = model.get_input_embeddings().weight.detach().clone()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        scores = model(ids).logits
        extend(model, vocabulary)
        after = model(ids).logits
    rows = model.get_input_embeddings().weight
    assert rows.shape[0] == model.config.vocab_size == vocabulary.size
    assert torch.equal(rows[:300], before)
    torch.testing.assert_close(rows[300:], before.mean(0).expand(vocabulary.size - 300, -1))
    torch.testing.assert_close(after[..., :300], scores)
    assert (model.get_output_embeddings().weight is rows) == tied
    extend(model, vocabulary)
    assert model.get_input_embeddings().weight.shape[0] == vocabulary.size


def test_siblings_of_another_tokenizer_are_refused() -> None:
    with pytest.raises(ValueError, match="the corpus was made with another tokenizer than the model"):
        SIBLINGS.check(Provenance("c" * 64, "b" * 64), "the corpus", "the model")
    with pytest.raises(ValueError, match="another vocabulary"):
        SIBLINGS.check(Provenance("a" * 64, "c" * 64), "the corpus", "the model")
    SIBLINGS.check(SIBLINGS, "the corpus", "the model")


def _edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_bad_folders_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    tensors = load_file(weights)

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            load_language(folder)
        assert "\n" not in str(caught.value)

    with pytest.raises(ValueError, match="does not exist"):
        load_language(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unknown dtype 'int3'"):
        load_language(folder, "int3")  # type: ignore[arg-type]
    weights.write_bytes(whole[:-100])
    refused("damaged|cannot be loaded")
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.down" not in k}, weights, {"format": "pt"})
    refused("1 missing, first model.layers.1.mlp.down_proj.weight")
    save_file({**tensors, "model.surplus": torch.zeros(1)}, weights, {"format": "pt"})
    refused("1 unexpected, first model.surplus")
    save_file({**tensors, "model.norm.weight": torch.full((32,), float("nan"))}, weights, {"format": "pt"})
    refused("model.norm.weight .* not numbers")
    weights.write_bytes(whole)
    load_language(folder)
    _edit_config(folder, num_attention_heads=4)
    refused("layers.0.self_attn")
    _edit_config(folder, num_attention_heads=2, model_type="chatglm", auto_map={"AutoModel": "evil.Model"})
    refused("chatglm")
    weights.unlink()
    refused(r"no \.safetensors")


def test_head_counts_must_divide() -> None:
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        LanguageConfig(num_heads=5, num_kv_heads=2)


@pytest.mark.parametrize("codebook_width", [8, 32, 64])
def test_speech_embeddings_start_from_the_codebook(vocabulary: Vocabulary, codebook_width: int) -> None:
    """Codes that are alike start alike, whatever the widths; text rows stay, and the scale is that of the model."""
    model, plain = new_glm(vocabulary, TINY), new_glm(vocabulary, TINY)
    generator = torch.Generator().manual_seed(3)
    sounds = torch.randn(vocabulary.codebook_size // 2, codebook_width, generator=generator)
    codebook = torch.cat([sounds, sounds + 0.05 * torch.randn(sounds.shape, generator=generator)]) + 7.0
    start_speech_embeddings(model, vocabulary, codebook)
    table, before = model.get_input_embeddings().weight.detach(), plain.get_input_embeddings().weight.detach()
    speech = table[vocabulary.speech_offset : vocabulary.speech_offset + vocabulary.codebook_size]
    alike, other = speech.chunk(2)
    likeness = torch.nn.functional.cosine_similarity(alike, other)
    strangers = torch.nn.functional.cosine_similarity(alike, other.roll(1, 0))
    assert likeness.mean() > 0.8
    assert strangers.mean().abs() < 0.2
    assert float(speech.std()) == pytest.approx(float(before.std()), rel=0.1)
    untouched = torch.ones(len(table), dtype=torch.bool)
    untouched[vocabulary.speech_offset : vocabulary.speech_offset + vocabulary.codebook_size] = False
    assert torch.equal(table[untouched], before[untouched])
    with pytest.raises(ValueError, match="codebook has"):
        start_speech_embeddings(model, vocabulary, codebook[1:])


@torch.no_grad()
def test_speech_embeddings_of_a_trained_model_stay_near_its_mean(vocabulary: Vocabulary) -> None:
    """Trained rows have a mean far from zero. With a tied output layer, rows without it would take all probability."""
    model = new_glm(vocabulary, TINY)
    table = model.get_input_embeddings().weight
    speech = slice(vocabulary.speech_offset, vocabulary.speech_offset + vocabulary.codebook_size)
    mean = torch.linspace(-1, 1, table.shape[1])
    table += mean
    table[speech] = mean
    std = float((table - table.mean(0)).std())
    start_speech_embeddings(model, vocabulary, torch.randn(vocabulary.codebook_size, 12), 0.25)
    torch.testing.assert_close(table[speech].mean(0), mean, atol=0.25 * std, rtol=0.0)
    assert float((table[speech] - mean).std()) == pytest.approx(0.25 * std, rel=0.2)
