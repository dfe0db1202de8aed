"""Token corpora: what is written is read, what belongs to another tokenizer is refused, audio becomes tokens once."""

import importlib.util
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from duologue.checkpoint import file_hash, load_component, save_component
from duologue.config import to_mapping
from duologue.interleave import Kind, split
from duologue.language.backbone import Provenance
from duologue.layers import Padded
from duologue.tokenizer.encoder import EncoderConfig
from duologue.tokenizer.quantizer import QuantizerConfig
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from duologue.training.cluster import run_on_ray
from duologue.training.corpus import (
    CorpusSample,
    LabeledTurn,
    Task,
    TokenCorpus,
    read_manifest,
    write_manifest,
    write_shard,
)
from duologue.training.recipes import train as train_stage
from duologue.training.tokenize import TokensRecipe, run_tokens
from duologue.turns import Modality, Role, Turn
from duologue.vocabulary import Vocabulary
from recipes.pocket.text import train_text_tokenizer
from recipes.pocket.writing import main as write_what_is_read

OURS = Provenance("a" * 64, "b" * 64)
OTHERS = Provenance("c" * 64, "b" * 64)
OFFSET = 100

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed: run make test-scale"
)


def sample(number: int, task: Task = "chat", split: str = "train") -> CorpusSample:
    user = Turn(Role.USER, Modality.SPEECH, (100 + number, 101), "en", "slt", "plain")
    reply = Turn(Role.ASSISTANT, Modality.INTERLEAVED, (1, 2, number, *range(102, 130)), "en", "awb", "slow")
    turns = (LabeledTurn(user, (5, 6), loss=False), LabeledTurn(reply))
    return CorpusSample(f"s{number}", task, split, "sum", turns[: 1 if task == "clip" else 2], ("seven", "7"))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    samples = [sample(0), sample(1, "clip"), sample(2, split="valid"), sample(3, "clip", "valid")]
    write_shard(tmp_path, "one", samples[:3], OURS, OFFSET)
    write_shard(tmp_path, "two", samples[3:], OURS, OFFSET)
    manifest = write_manifest(tmp_path, OURS)
    assert manifest == read_manifest(tmp_path)
    assert (manifest.num_samples, manifest.num_text_tokens, manifest.num_speech_tokens) == (4, 2 * 3, 4 * 2 + 2 * 28)
    assert manifest.tasks == {"chat": 2, "clip": 2}
    assert manifest.splits == {"train": 2, "valid": 2}
    assert manifest.shards == {"one": 3, "two": 1}
    assert list(TokenCorpus(tmp_path)) == samples
    assert list(TokenCorpus(tmp_path, OURS, splits=("valid",))) == samples[2:]
    only: tuple[Task, ...] = ("clip",)
    clips = TokenCorpus(tmp_path, tasks=only)
    assert list(clips) == [samples[1], samples[3]]
    everything = np.arange(4)
    whole = TokenCorpus(tmp_path)
    assert whole.num_turns(everything).tolist() == [2, 1, 2, 1]
    assert whole.transcribed(everything).all()
    assert whole.where("task", "clip").tolist() == [1, 3]


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path, "one", [sample(0)], OURS, OFFSET)
    write_manifest(tmp_path, OURS)
    with pytest.raises(ValueError, match="corpus .* was made with another tokenizer than the model"):
        TokenCorpus(tmp_path, OTHERS)
    write_shard(tmp_path, "two", [sample(1)], OTHERS, OFFSET)
    with pytest.raises(ValueError, match=r"two\.parquet was made with another tokenizer than this run"):
        write_manifest(tmp_path, OURS)


def test_a_damaged_corpus_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        TokenCorpus(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no shards"):
        write_manifest(tmp_path, OURS)
    write_shard(tmp_path, "one", [sample(0)], OURS, OFFSET)
    write_shard(tmp_path, "two", [sample(1)], OURS, OFFSET)
    write_manifest(tmp_path, OURS)
    with pytest.raises(ValueError, match="no samples of splits"):
        TokenCorpus(tmp_path, splits=("test",))
    write_shard(tmp_path, "two", [sample(1), sample(2)], OURS, OFFSET)
    with pytest.raises(ValueError, match="holds 2 samples where manifest.json names 1"):
        TokenCorpus(tmp_path)
    (tmp_path / "two.parquet").unlink()
    with pytest.raises(ValueError, match=r"two\.parquet is missing"):
        TokenCorpus(tmp_path)


# From audio.


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tokenizer with random weights, a vocabulary for it, and a corpus of noise that knows what it says."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    config = SpeechTokenizerConfig(
        encoder=EncoderConfig(num_mels=80, width=16, num_heads=2, ffn_dim=16, num_layers=1, block_frames=8),
        quantizer=QuantizerConfig(codebook_size=32),
    )
    tokenizer = SpeechTokenizer(config)
    with torch.no_grad():  # a codebook made of what the encoder gives, so that codes differ
        levels = torch.logspace(-3, -0.5, 16)[:, None]
        hidden = tokenizer.encode_piece(Padded.full(torch.randn(16, 32000) * levels), tokenizer.encoder.init_state(16))
        tokenizer.quantizer.update(hidden, tokenizer.quantizer(hidden).codes)
    save_component(folder / "tokenizer", tokenizer, config)
    texts = train_text_tokenizer(["What is one plus two?", "Three.", "Say it again."], 300)
    Vocabulary.extend(texts, codebook_size=32).save(folder / "vocabulary")

    rng = np.random.default_rng(0)

    def shard(corpus: str, name: str, clips: list[tuple[str, str, str, str, float]]) -> None:
        (folder / corpus).mkdir(exist_ok=True)
        offset, lines, pcm = 0, [], []
        for key, role, part, text, seconds in clips:
            num = int(seconds * 16000)
            pcm.append((rng.standard_normal(num) * 3000).astype("<i2"))
            line: dict[str, object] = {
                "id": key,
                "text": text,
                "role": role,
                "voice": f"voice of {role}",
                "language": "en",
            }
            line |= {"style": "plain", "split": part, "intent": "x", "sample_rate": 16000}
            lines.append(json.dumps(line | {"offset": offset, "num_samples": num, "rate": 1.0}))
            offset += num
        (folder / corpus / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        (folder / corpus / f"{name}.pcm").write_bytes(np.concatenate(pcm).tobytes())

    shard("free", "clips-00000", [(f"f{i}", "free", "train", "Say it again.", 0.3 + 0.2 * i) for i in range(6)])
    asked = [("d0", "user", "train", "What is one plus two?", 1.3), ("d1", "reply", "train", "Three.", 0.9)]
    shard("talk", "clips-00000", asked)
    shard("talk", "clips-00001", [("d2", "user", "valid", "", 0.7), ("d3", "user", "train", "Say it again.", 0.7)])
    first = [
        {"role": "user", "text": "What is one plus two?", "clip": ["d0"], "sound": ""},
        {"role": "assistant", "text": "Three.", "clip": ["d1"], "style": "plain", "answers": ["three"]},
    ]
    again = [
        {"role": "user", "text": "Say it again.", "clip": ["d3"]},
        {"role": "assistant", "text": "Three.", "clip": ["d1"], "style": "loud", "answers": ["three"]},
    ]
    noise = [{"role": "user", "text": "", "clip": ["d2"], "sound": "noise"}, first[1]]
    long = [first[0], {"role": "assistant", "text": "one plus two three " * 20, "clip": ["d1"], "answers": ["three"]}]
    rows = [("a", "train", first + again), ("b", "valid", noise), ("c", "test", first), ("d", "train", long)]
    for table, chosen in (("dialogues-00000", rows[:1]), ("dialogues-00001", rows[1:])):
        lines = [
            json.dumps({"id": key, "intent": "sum", "split": part, "language": "en", "turns": turns})
            for key, part, turns in chosen
        ]
        (folder / "talk" / f"{table}.jsonl").write_text("\n".join(lines) + "\n")
    write_what_is_read(["--out", str(folder / "writing"), "--dialogues", "20"])
    return folder


def recipe(parts: Path, out: Path, **changes: object) -> TokensRecipe:
    fields = {
        "corpora": tuple(str(parts / name) for name in ("free", "talk", "writing")),
        "texts": (str(parts / "writing" / "facts.txt"),),
        "tokenizer": str(parts / "tokenizer"),
        "vocabulary": str(parts / "vocabulary"),
        "out": str(out),
        "batch_s": 3.0,
    }
    return TokensRecipe(**{**fields, **changes})  # type: ignore[arg-type]


def test_audio_becomes_tokens(parts: Path, tmp_path: Path) -> None:
    manifest = run_tokens(recipe(parts, tmp_path, clean_probability=1.0))
    vocabulary = Vocabulary.load(parts / "vocabulary")
    assert manifest.siblings == Provenance(file_hash(parts / "tokenizer"), vocabulary.hash)
    corpus = {one.id: one for one in TokenCorpus(tmp_path)}
    assert "c" not in corpus  # of the test
    assert "d" not in corpus  # its text would not stay ahead of its speech

    # One clip alone, by the tokenizer itself.
    samples = np.fromfile(parts / "talk" / "clips-00000.pcm", "<i2")[: int(1.3 * 16000)]
    tokenizer = load_component(parts / "tokenizer", SpeechTokenizer, SpeechTokenizerConfig)
    with torch.no_grad():
        wav = Padded.full(torch.from_numpy(samples.astype(np.float32) / 32768)[None])
        codes = tokenizer(wav).values[0].tolist()
    heard = corpus["d0"].turns[0]
    assert vocabulary.speech_codes(heard.turn.ids) == codes
    assert len(set(codes)) > 2
    assert vocabulary.decode_text(heard.transcript) == "What is one plus two?"
    assert (heard.turn.role, heard.turn.modality, heard.turn.voice) == (Role.USER, Modality.SPEECH, "voice of user")

    talk = corpus["a"]
    assert talk.task == "chat"
    assert [labeled.turn.role for labeled in talk.turns] == [Role.USER, Role.ASSISTANT] * 2
    assert talk.turns[0] == heard
    assert talk.turns[3].turn.style == "loud"
    assert talk.answers == ("three",)
    reply = split(talk.turns[1].turn.ids, vocabulary.kind)
    assert vocabulary.decode_text(reply.text) == "Three."
    assert reply.speech == list(corpus["d1"].turns[0].turn.ids)
    assert corpus["d1"].turns[0].turn.role is Role.ASSISTANT
    assert corpus["b"].turns[0].transcript == ()

    read = corpus["writing-000000"]
    assert read.task == "text"
    assert all(labeled.turn.modality is Modality.TEXT for labeled in read.turns)
    assert sum(one.id.startswith("text-facts") for one in corpus.values()) == manifest.shards["text-facts"] > 2000
    assert all(
        vocabulary.kind(token) is not Kind.CONTROL for one in corpus.values() for u in one.turns for token in u.turn.ids
    )


def test_a_stopped_run_goes_on_and_batches_change_nothing(parts: Path, tmp_path: Path) -> None:
    run_tokens(recipe(parts, tmp_path / "whole"))
    run_tokens(recipe(parts, tmp_path / "again", batch_s=1.0))
    kept = tmp_path / "again" / "free-clips-00000.parquet"
    before = kept.stat().st_mtime_ns
    (tmp_path / "again" / "talk-clips-00000.parquet").unlink()
    (tmp_path / "again" / "manifest.json").unlink()
    run_tokens(recipe(parts, tmp_path / "again"))
    assert kept.stat().st_mtime_ns == before
    assert list(TokenCorpus(tmp_path / "again")) == list(TokenCorpus(tmp_path / "whole"))


def test_variants_are_heard_in_different_rooms(parts: Path, tmp_path: Path) -> None:
    run_tokens(recipe(parts, tmp_path, variants=3, clean_probability=0.0))
    corpus = {one.id: one for one in TokenCorpus(tmp_path)}
    heard = [corpus[name].turns[0].turn.ids for name in ("d0", "d0#1", "d0#2")]
    assert len(set(heard)) == 3
    assert [corpus[name].turns[0].turn.ids for name in ("a", "a#1", "a#2")] == heard
    assert "d1#1" not in corpus  # the reply voice is clean


def test_what_does_not_belong_together_is_refused(parts: Path, tmp_path: Path) -> None:
    texts = train_text_tokenizer(["What is one plus two?"], 290)
    Vocabulary.extend(texts, codebook_size=64).save(tmp_path / "other")
    with pytest.raises(ValueError, match="has 32 speech tokens, .* is made for 64"):
        run_tokens(recipe(parts, tmp_path / "out", vocabulary=str(tmp_path / "other")))
    run_tokens(recipe(parts, tmp_path / "out", corpora=(str(parts / "talk"),), texts=()))
    Vocabulary.extend(texts, codebook_size=32).save(tmp_path / "third")
    with pytest.raises(ValueError, match="another vocabulary than this run"):
        run_tokens(recipe(parts, tmp_path / "out", vocabulary=str(tmp_path / "third")))
    with pytest.raises(ValueError, match="so it is no corpus"):
        run_tokens(recipe(parts, tmp_path / "out", corpora=(str(tmp_path / "other"),)))
    with pytest.raises(ValueError, match="names of their own"):
        recipe(parts, tmp_path, corpora=("a/free", "b/free"))


# Over a cluster.


def test_without_ray_the_command_names_the_extra(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeError, match=r'ray is not installed: run pip install -e "\.\[scale\]"'):
        run_tokens(recipe(parts, tmp_path), ray="local")


def kill_first_worker(item: str) -> None:
    """Writes a file for the item; the first worker that is asked dies in the middle of it."""
    folder, name = Path(item).parent, Path(item).name
    try:
        (folder / "died").touch(exist_ok=False)
    except FileExistsError:
        (folder / f"{name}.txt").write_text(name)
    else:
        (folder / f"{name}.{os.getpid()}.part").touch()
        os.kill(os.getpid(), signal.SIGKILL)


@needs_ray
def test_a_killed_worker_leaves_no_gap(tmp_path: Path) -> None:
    run_on_ray(kill_first_worker, [str(tmp_path / f"item{number}") for number in range(5)], "local")
    assert (tmp_path / "died").exists()
    assert sorted(path.name for path in tmp_path.glob("*.txt")) == [f"item{number}.txt" for number in range(5)]


@needs_ray
def test_workers_make_the_same_corpus(parts: Path, tmp_path: Path) -> None:
    run_tokens(recipe(parts, tmp_path / "here"))
    made = train_stage("tokens", write_recipe(recipe(parts, tmp_path / "spread"), tmp_path), ray="local")
    assert made.folder == tmp_path / "spread"
    assert list(TokenCorpus(tmp_path / "spread")) == list(TokenCorpus(tmp_path / "here"))
    assert not list((tmp_path / "spread").glob("*.part"))


@needs_ray
def test_a_fault_in_a_worker_is_its_own_sentence(parts: Path, tmp_path: Path) -> None:
    shutil.copytree(parts / "talk", tmp_path / "talk")
    (tmp_path / "talk" / "clips-00001.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"clips-00001\.jsonl"):
        run_tokens(recipe(parts, tmp_path / "out", corpora=(str(tmp_path / "talk"),)), ray="local")


def test_another_stage_refuses_ray(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage 'vocoder' does not run on Ray; tokens and interleave do"):
        train_stage("vocoder", write_recipe(recipe(parts, tmp_path), tmp_path), ray="local")


def write_recipe(recipe: TokensRecipe, folder: Path) -> Path:
    path = folder / "tokens.yaml"
    path.write_text(json.dumps(to_mapping(recipe)))
    return path
