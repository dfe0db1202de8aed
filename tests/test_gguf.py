"""Language models as GGUF files. What llama.cpp does with them runs where llama-cpp-python is installed."""

import asyncio
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from duologue.checkpoint import load_tensors
from duologue.interleave import INTERLEAVED, TEXT_ONLY, Schedule
from duologue.language.backbone import LanguageConfig, Provenance, new_glm, save_language
from duologue.language.drawing import DrawState
from duologue.language.engine import PlainEngine
from duologue.language.sampling import Sampling
from duologue.language.stepping import EagerStepper, StepRow
from duologue.released.gguf import GGUF_TYPES, write_gguf
from duologue.released.random_weights import init_random
from duologue.vocabulary import Vocabulary
from recipes.pocket.text import train_text_tokenizer
from tests.tiny_language import tiny_vocabulary

SIZES = LanguageConfig(width=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, ffn_dim=96, max_positions=512)
PROMPT = list(range(3, 40))
SHORT = Schedule(3, 5)
# One unit in the last place of q8_0 and q4_0, as a share of the largest value of a block.
ERRORS = {"f32": 0.0, "f16": 1e-3, "bf16": 8e-3, "q8_0": 1 / 127, "q4_0": 1 / 7}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return tiny_vocabulary()


@pytest.fixture(scope="module")
def model(vocabulary: Vocabulary) -> PreTrainedModel:
    model = new_glm(vocabulary, SIZES).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20.0)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    save_language(folder, model, Provenance("tokenizer", vocabulary.hash))
    return folder


@pytest.mark.parametrize("dtype", GGUF_TYPES)
def test_every_weight_and_size_is_read_back(folder: Path, tmp_path: Path, dtype: Any) -> None:
    import gguf

    write_gguf(folder, tmp_path / "x.gguf", dtype, {"vocabulary": "its hash"})
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "chatglm"
    assert fields["chatglm.block_count"] == SIZES.num_layers
    assert fields["chatglm.rope.dimension_count"] == SIZES.head_dim // 2
    assert fields["chatglm.attention.head_count_kv"] == SIZES.num_kv_heads
    assert fields["tokenizer.ggml.model"] == "none"
    assert fields["duologue.vocabulary"] == "its hash"
    written = {one.name: gguf.dequantize(one.data, one.tensor_type) for one in reader.tensors}
    weights = load_tensors(folder)
    assert len(written) == len(weights)
    for key, name in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("model.layers.1.self_attn.k_proj.bias", "blk.1.attn_k.bias"),
        ("model.layers.0.mlp.gate_up_proj.weight", "blk.0.ffn_up.weight"),
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        ("model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output.weight"),
    ):
        wanted = weights[key].numpy()
        assert written[name].shape == wanted.shape
        allowed = 0.0 if wanted.ndim == 1 else ERRORS[dtype] * np.abs(wanted).max()
        assert np.abs(written[name] - wanted).max() <= allowed, name


def test_released_weights_become_the_same_file_as_converted_ones(tmp_path: Path) -> None:
    import gguf

    from duologue.released.convert import convert

    init_random("tiny", tmp_path / "released")
    convert(tmp_path / "released" / "language", tmp_path / "converted")
    for name in ("released/language", "converted"):
        write_gguf(tmp_path / name, tmp_path / f"{name.split('/')[0]}.gguf", "f32")
    released, converted = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("released", "converted"))
    theirs = {one.name: one.data for one in converted.tensors}
    assert len(theirs) == len(released.tensors)
    for one in released.tensors:
        assert np.array_equal(one.data, theirs[one.name]), one.name


def test_what_cannot_be_written_is_refused_in_one_sentence(
    folder: Path, vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="unknown type 'q2' of a GGUF file; the choices are f32"):
        write_gguf(folder, tmp_path / "x.gguf", "q2")  # type: ignore[arg-type]
    taken = tmp_path / "taken.gguf"
    taken.touch()
    with pytest.raises(ValueError, match="exists; give the name of a new file"):
        write_gguf(folder, taken)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama', but this command writes a Glm"):
        write_gguf(tmp_path, tmp_path / "x.gguf")
    wide = new_glm(vocabulary, LanguageConfig(width=64, num_layers=1, num_heads=4, head_dim=32, ffn_dim=32))
    save_language(tmp_path / "wide", wide, Provenance("tokenizer", vocabulary.hash))
    with pytest.raises(ValueError, match="the heads have 128 values together and the layers 64"):
        write_gguf(tmp_path / "wide", tmp_path / "x.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="install Duologue with its extra 'gguf'"):
        write_gguf(folder, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_without_llama_cpp_a_gguf_file_is_refused_with_the_way_out(
    vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from duologue.language.llama import LlamaStepper

    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ValueError, match="install Duologue with its extra 'gguf'"):
        LlamaStepper(tmp_path / "x.gguf", vocabulary)


class TestLlamaCpp:
    """The same engine over llama.cpp and over transformers."""

    @pytest.fixture(autouse=True)
    def _library(self) -> None:
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (make test-gguf)")

    def stepper(self, folder: Path, vocabulary: Vocabulary, path: Path, dtype: Any = "f32", **sizes: Any) -> Any:
        from duologue.language.llama import LlamaStepper

        if not path.exists():
            write_gguf(folder, path, dtype)
        settings: dict[str, Any] = {"num_slots": 8, "num_cells": 2048, "full_precision": True, **sizes}
        return LlamaStepper(path, vocabulary, **settings)

    @pytest.mark.parametrize(("dtype", "error"), [("f32", 2e-3), ("f16", 2e-2)])
    def test_scores_are_those_of_transformers(
        self, folder: Path, vocabulary: Vocabulary, model: PreTrainedModel, tmp_path: Path, dtype: Any, error: float
    ) -> None:
        stepper, eager = self.stepper(folder, vocabulary, tmp_path / "x.gguf", dtype), EagerStepper(model, vocabulary)
        for start, ids in ((0, PROMPT), (len(PROMPT), [5]), (len(PROMPT) + 1, PROMPT[:7]), (4, PROMPT[:9])):
            row = StepRow(1, start, ids, wants_scores=True)
            mine, theirs = stepper.step([row])[0].scores, eager.step([row])[0].scores
            assert mine is not None
            assert theirs is not None
            assert (mine - theirs).abs().max() <= error * theirs.abs().max()

    def test_mixed_replies_alone_and_together_are_those_of_the_eager_stepper(
        self, folder: Path, vocabulary: Vocabulary, model: PreTrainedModel, tmp_path: Path
    ) -> None:
        jobs: list[tuple[list[int], Sampling, Schedule]] = [
            (PROMPT, Sampling(temperature=0.0, max_tokens=70), INTERLEAVED),
            (PROMPT[:6], Sampling(temperature=0.0, max_tokens=60), SHORT),
            (PROMPT * 9, Sampling(temperature=0.0, max_tokens=33), SHORT),
            ([*PROMPT, 7, 8], Sampling(temperature=0.7, top_k=5, max_tokens=40, seed=4), TEXT_ONLY),
        ]
        stepper = self.stepper(folder, vocabulary, tmp_path / "x.gguf")
        engine, eager = PlainEngine(None, vocabulary, stepper=stepper), PlainEngine(model, vocabulary)

        async def read(job: tuple[list[int], Sampling, Schedule]) -> list[int]:
            return [token async for token in engine.generate(*job)]

        async def together() -> list[list[int]]:
            return await asyncio.gather(*map(read, jobs))

        wanted = [list(eager.stream(*job)) for job in jobs]
        assert asyncio.run(together()) == wanted
        assert [list(engine.stream(*job)) for job in jobs] == wanted

    def test_a_conversation_that_goes_on_or_turns_aside_computes_only_what_is_new(
        self, folder: Path, vocabulary: Vocabulary, model: PreTrainedModel, tmp_path: Path
    ) -> None:
        engine = PlainEngine(None, vocabulary, stepper=self.stepper(folder, vocabulary, tmp_path / "x.gguf"))
        eager, greedy = PlainEngine(model, vocabulary), Sampling(temperature=0.0, max_tokens=20)
        first = list(engine.stream(PROMPT * 5, greedy, SHORT))
        for prompt in ([*PROMPT * 5, *first, 5, 6], [*PROMPT * 4, 9, 9]):
            before = engine.num_computed
            assert list(engine.stream(prompt, greedy, SHORT)) == list(eager.stream(prompt, greedy, SHORT))
            assert engine.num_computed - before <= 24

    def test_a_full_cache_drops_old_conversations_and_no_reply(
        self, folder: Path, vocabulary: Vocabulary, tmp_path: Path
    ) -> None:
        stepper = self.stepper(folder, vocabulary, tmp_path / "x.gguf", num_slots=4, num_cells=512)
        engine = PlainEngine(None, vocabulary, 2, 512, 2, stepper=stepper)
        for seed in range(12):
            prompt = [3 + (seed * 37 + i) % 250 for i in range(200)]
            assert list(engine.stream(prompt, Sampling(temperature=1.0, max_tokens=30, seed=seed), SHORT))

    def test_a_file_of_another_vocabulary_or_of_no_model_is_refused(
        self, folder: Path, vocabulary: Vocabulary, tmp_path: Path
    ) -> None:
        from duologue.language.llama import LlamaStepper

        write_gguf(folder, tmp_path / "x.gguf", "f32", {"vocabulary": vocabulary.hash})
        other = Vocabulary.extend(train_text_tokenizer(["one and two"], 320), codebook_size=32, multiple_of=16)
        with pytest.raises(ValueError, match="was made for another vocabulary"):
            LlamaStepper(tmp_path / "x.gguf", other)
        (tmp_path / "bad.gguf").write_bytes(b"no model")
        with pytest.raises(ValueError, match="is no GGUF file that llama.cpp can read"):
            LlamaStepper(tmp_path / "bad.gguf", vocabulary)
        with pytest.raises(ValueError, match="does not exist"):
            LlamaStepper(tmp_path / "missing.gguf", vocabulary)

    def test_a_draw_after_cached_scores_needs_no_step(
        self, folder: Path, vocabulary: Vocabulary, tmp_path: Path
    ) -> None:
        stepper = self.stepper(folder, vocabulary, tmp_path / "x.gguf")
        engine = PlainEngine(None, vocabulary, stepper=stepper)
        engine.prefill(PROMPT)
        state = DrawState(Sampling(temperature=0.0), SHORT)
        scores: Sequence[torch.Tensor] = [stepper.step([StepRow(7, 0, PROMPT, wants_scores=True)])[0].scores]
        assert math.isfinite(float(scores[0].sum()))
        first = next(iter(engine.stream(PROMPT, Sampling(temperature=0.0, max_tokens=4), SHORT)))
        assert stepper.draw(scores, [state.row(stepper.masks)]) == [first]
