"""Synthetic interleaved data: spans of a text in speech, and mixtures that count ids."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duologue.language.backbone import LanguageConfig, Provenance, new_glm, save_language
from duologue.language.sampling import Sampling
from duologue.training.corpus import CorpusSample, LabeledTurn, TokenCorpus, read_manifest, write_manifest, write_shard
from duologue.training.loop import LoopConfig, run
from duologue.training.pretrain import Jobs, Mixture, PretrainRecipe, PretrainStage
from duologue.training.recipes import train
from duologue.training.synthetic import InterleaveRecipe, draw_spans, read_texts, run_interleave
from duologue.turns import Modality, Role, Turn
from duologue.vocabulary import END_OF_TEXT, Vocabulary
from recipes.pocket.text import train_text_tokenizer

TEXTS = [f"the river number {number} runs past {number + 3} old mills and a bridge of stone" for number in range(12)]
TINY = LanguageConfig(width=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, ffn_dim=48, max_positions=1024)
MADE_WITH = "f" * 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary, a random text-to-token model and texts in three formats."""
    folder = tmp_path_factory.mktemp("synthetic")
    vocabulary = Vocabulary.extend(train_text_tokenizer(["an old river of stone"] * 2, 280), codebook_size=64)
    vocabulary.save(folder / "vocabulary")
    save_language(folder / "talker", new_glm(vocabulary, TINY), Provenance(MADE_WITH, vocabulary.hash))
    (folder / "plain.txt").write_text("\n".join(TEXTS) + "\n\nshort\n")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS[:5]))
    pq.write_table(pa.table({"body": TEXTS[5:9], "n": range(4)}), folder / "table.parquet")
    return folder


@pytest.fixture(scope="module")
def vocabulary(folder: Path) -> Vocabulary:
    return Vocabulary.load(folder / "vocabulary")


def recipe(folder: Path, out: Path, **changes: object) -> InterleaveRecipe:
    fields = {
        "texts": (str(folder / "plain.txt"),),
        "text_to_token": str(folder / "talker"),
        "vocabulary": str(folder / "vocabulary"),
        "out": str(out),
        "text_key": "body",
        "mean_span": 3.0,
    }
    return InterleaveRecipe(**{**fields, **changes})  # type: ignore[arg-type]


@given(st.integers(2, 400), st.floats(0.01, 0.99), st.floats(0.5, 30.0), st.integers(0, 2**31))
def test_spans_cover_the_share_and_never_touch(num_ids: int, ratio: float, mean_span: float, seed: int) -> None:
    spans = draw_spans(num_ids, ratio, mean_span, np.random.default_rng(seed))
    assert sum(end - begin for begin, end in spans) == round(ratio * num_ids)
    at = -1
    for begin, end in spans:
        assert at < begin < end <= num_ids
        at = end
    assert all(begin >= 0 for begin, _ in spans)


def test_spans_have_their_mean_length_and_lie_anywhere() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_spans(1000, 0.3, 10.0, rng) for _ in range(200)]
    lengths = [end - begin for spans in drawn for begin, end in spans]
    assert np.mean(lengths) == pytest.approx(10.0, abs=0.3)
    assert np.std(lengths) == pytest.approx(10.0**0.5, abs=0.3)
    middles = [(begin + end) / 2 for spans in drawn for begin, end in spans]
    assert np.mean(middles) == pytest.approx(500, abs=15)


def test_the_text_of_a_document_stays_whole(folder: Path, tmp_path: Path, vocabulary: Vocabulary) -> None:
    manifest = run_interleave(recipe(folder, tmp_path, documents_per_shard=5, valid_share=0.5))
    assert manifest.tasks == {"document": 12}
    assert set(manifest.splits) == {"train", "valid"}
    assert manifest.shards == {f"interleaved-plain-{number:05d}": count for number, count in enumerate((5, 5, 2))}
    for sample, text in zip(TokenCorpus(tmp_path), TEXTS, strict=True):
        ids = [token for one in sample.turns for token in (one.transcript or one.turn.ids)]
        assert ids == vocabulary.encode_text(text)
        spoken = [one for one in sample.turns if one.turn.modality is Modality.SPEECH]
        assert spoken
        assert sum(len(one.transcript) for one in spoken) <= round(0.3 * len(ids))
        assert all(vocabulary.speech_codes(one.turn.ids) for one in spoken)


def test_a_stopped_run_goes_on_and_rows_change_nothing(folder: Path, tmp_path: Path) -> None:
    files = tuple(str(folder / name) for name in ("plain.txt", "rows.jsonl", "table.parquet"))
    # Greedy: with random weights, draws among nearly equal chances turn on the last bit, which batches change.
    changes = {"texts": files, "documents_per_shard": 4, "sampling": Sampling(temperature=0.0)}
    run_interleave(recipe(folder, tmp_path / "whole", **changes))
    run_interleave(recipe(folder, tmp_path / "again", **changes, num_rows=3))
    kept = tmp_path / "again" / "interleaved-plain-00000.parquet"
    before = kept.stat().st_mtime_ns
    (tmp_path / "again" / "interleaved-plain-00001.parquet").unlink()
    run_interleave(recipe(folder, tmp_path / "again", **changes))
    assert kept.stat().st_mtime_ns == before
    assert list(TokenCorpus(tmp_path / "again")) == list(TokenCorpus(tmp_path / "whole"))
    assert read_manifest(tmp_path / "whole").num_samples == 12 + 5 + 4


def test_long_texts_are_cut_and_short_ones_left_out(folder: Path, tmp_path: Path, vocabulary: Vocabulary) -> None:
    (tmp_path / "long.txt").write_text(" ".join(TEXTS))
    long = recipe(folder, tmp_path / "out", texts=(str(tmp_path / "long.txt"),), max_ids=50, min_ids=20)
    num_ids = len(vocabulary.encode_text(" ".join(TEXTS)))
    assert run_interleave(long).num_samples == num_ids // 50 + (num_ids % 50 >= 20)


def test_what_cannot_be_read_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    def refused(name: str, content: str | None, message: str) -> None:
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            run_interleave(recipe(folder, tmp_path / "out", texts=(str(tmp_path / name),)))

    refused("nowhere.txt", None, "nowhere.txt does not exist")
    refused("a.csv", "a,b", "a.csv is no .txt, .jsonl or .parquet file")
    refused("a.jsonl", "{", "a.jsonl, line 1, is not JSON")
    refused("b.jsonl", '\n{"text": 1}', "b.jsonl, line 2, has no text under 'body'")
    refused("a.parquet", "no table", "a.parquet cannot be read as text")
    refused("empty.txt", "few\n", "empty.txt holds no text of at least 16 ids")
    with pytest.raises(ValueError, match="no column 'text'; it has body, n"):
        list(read_texts(folder / "table.parquet"))
    with pytest.raises(ValueError, match="ratio must lie between 0 and 1, got 1"):
        recipe(folder, tmp_path, ratio=1.0)
    with pytest.raises(ValueError, match="names of their own, got one, one"):
        recipe(folder, tmp_path, texts=("a/one.txt", "b/one.txt"))
    other = Vocabulary.extend(train_text_tokenizer(["other words"] * 2, 300), codebook_size=64)
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match="was made with another vocabulary"):
        run_interleave(recipe(folder, tmp_path / "out", vocabulary=str(tmp_path / "other")))


# The mixture.


@pytest.fixture(scope="module")
def corpus(folder: Path, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents in one folder with clips and texts of other lengths."""
    out = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    samples = []
    for number in range(60):
        speech = tuple(vocabulary.speech_ids(rng.integers(64, size=10 + number % 30).tolist()))
        text = tuple(vocabulary.encode_text(TEXTS[number % 12][: 10 + number % 20]))
        split = "valid" if number % 10 == 0 else "train"
        clip = LabeledTurn(Turn(Role.ASSISTANT, Modality.SPEECH, speech), text)
        written = LabeledTurn(Turn(Role.ASSISTANT, Modality.TEXT, text))
        samples.append(CorpusSample(f"clip-{number}", "clip", split, "", (clip,)))
        samples.append(CorpusSample(f"text-{number}", "text", split, "", (written,)))
        samples.append(CorpusSample(f"document-{number}", "document", split, "", (written, clip, written)))
    provenance = Provenance(MADE_WITH, vocabulary.hash)
    write_shard(out, "all", samples, provenance, vocabulary.speech_offset)
    write_manifest(out, provenance)
    return out


def test_documents_join_a_corpus(folder: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "tokens")
    made = train("interleave", write_recipe(folder, tmp_path), tmp_path / "tokens")
    assert made.metrics["num_samples"] == 3 * 60 + 12
    assert read_manifest(tmp_path / "tokens").tasks == {"clip": 60, "document": 60 + 12, "text": 60}


def write_recipe(folder: Path, out: Path) -> Path:
    fields = {"texts": [str(folder / "plain.txt")], "text_to_token": str(folder / "talker"), "out": "elsewhere"}
    path = out / "recipe.yaml"
    path.write_text(json.dumps({**fields, "vocabulary": str(folder / "vocabulary"), "mean_span": 3.0}))
    return path


def test_a_document_is_read_in_order(corpus: Path, vocabulary: Vocabulary) -> None:
    read = TokenCorpus(corpus, splits=("train",))
    document = read[int(read.where("task", "document")[0])]
    only = Mixture(0, 0, 0, 0, 0, 0, 0, interleaved=1.0)
    example = Jobs(read, vocabulary, only, 400).example("interleaved", document, np.random.default_rng(0))
    assert example is not None
    ids = [token for one in document.turns for token in one.turn.ids]
    assert list(example.ids)[-len(ids) - 1 :] == [*ids, vocabulary.control_id(END_OF_TEXT)]
    assert example.job == "interleaved"


MIXTURE = Mixture(asr=0.1, tts=0.2, woven=0.0, spans=0.0, speech=0.1, text=0.3, written=0.0, interleaved=0.3)


def stage(folder: Path, corpus: Path, steps: int) -> PretrainStage:
    loop = LoopConfig(steps, 1e-3, warmup_steps=1, log_every=1, evaluate_every=10**6, sample_every=10**6)
    parts = {"corpus": str(corpus), "vocabulary": str(folder / "vocabulary"), "language": TINY}
    return PretrainStage(PretrainRecipe(**parts, loop=loop, mixture=MIXTURE, mixture_of="ids", length=400, num_rows=4))  # type: ignore[arg-type]


def test_shares_count_ids(folder: Path, corpus: Path) -> None:
    made = stage(folder, corpus, 1)
    total = np.sum([made.batch(index)["num_ids_of_jobs"].numpy() for index in range(300)], axis=0)
    assert dict(
        zip(("asr", "tts", "speech", "text", "interleaved"), total / total.sum(), strict=True)
    ) == pytest.approx({"asr": 0.1, "tts": 0.2, "speech": 0.1, "text": 0.3, "interleaved": 0.3}, abs=0.01)


def test_the_log_has_the_shares(folder: Path, corpus: Path, tmp_path: Path) -> None:
    made = stage(folder, corpus, 3)
    run(made, made.recipe.loop, tmp_path)
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["name"] == "share_interleaved"]
    counts = [made.batch(index)["num_ids_of_jobs"].numpy() for index in range(3)]
    assert [float(row["value"]) for row in rows] == pytest.approx([one[-1] / one.sum() for one in counts], abs=1e-5)
