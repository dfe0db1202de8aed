"""Carry-over to a new tokenizer whose codes are the old ones in another order: replies and mels stay the same."""

from pathlib import Path

import torch

from duologue.checkpoint import file_hash, load_component, read_extra, save_component
from duologue.decoder.flow import Flow, FlowConfig
from duologue.language.backbone import load_language, load_provenance
from duologue.layers import Padded
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from duologue.training.data import Clips
from duologue.vocabulary import Vocabulary
from recipes.pocket.carry_over import carry_flow, carry_language, count_pairs, translate_rows
from recipes.pocket.text import train_text_tokenizer
from tests.tiny import TEXTS

# New code c is the old code ORDER[c].
ORDER = torch.randperm(32, generator=torch.Generator().manual_seed(1))
COUNTS = 1e6 * torch.eye(32, dtype=torch.float64)[ORDER]


def test_codes_at_the_same_place_are_counted(tiny_folder: Path, audio_corpus: Path) -> None:
    old = load_component(tiny_folder / "tokenizer", SpeechTokenizer, SpeechTokenizerConfig)
    new = load_component(tiny_folder / "tokenizer", SpeechTokenizer, SpeechTokenizerConfig)
    new.quantizer.codebook.weight.data = old.quantizer.codebook.weight.data[ORDER]
    clips = Clips(audio_corpus)
    counts = count_pairs(old, new, clips, hours=1.0)
    assert counts.sum() == sum(-(-clip.num_samples // 1280) for clip in clips.records)
    assert torch.equal(counts > 0, torch.diag(counts[:, ORDER].diag())[:, ORDER.argsort()] > 0)


def test_a_row_is_the_mean_of_the_old_ones_at_their_length() -> None:
    table = torch.nn.functional.normalize(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    counts = torch.zeros(2, 32, dtype=torch.float64)
    counts[0, 3], counts[0, 7] = 3e6, 1e6
    rows = translate_rows(table, counts)
    wanted = torch.nn.functional.normalize(0.75 * table[3] + 0.25 * table[7], dim=0)
    assert rows.shape == (2, 64)
    assert rows.dtype == table.dtype
    assert torch.cosine_similarity(rows[0], wanted, dim=0) > 0.98
    assert 0.9 < rows[0].norm() < 1.1


def _runs(tiny_folder: Path, folder: Path) -> Path:
    """The folder of a run with the tokenizer in another order and a vocabulary of other text."""
    tokenizer = load_component(tiny_folder / "tokenizer", SpeechTokenizer, SpeechTokenizerConfig)
    tokenizer.quantizer.codebook.weight.data = tokenizer.quantizer.codebook.weight.data[ORDER]
    save_component(folder / "frozen" / "tokenizer", tokenizer, tokenizer.config)
    Vocabulary.extend(train_text_tokenizer([*TEXTS, "A zebra sees a fuzzy bee."] * 2, 310), 32).save(
        folder / "vocabulary"
    )
    return folder


@torch.no_grad()
def test_language_model_answers_as_before(tiny_folder: Path, tmp_path: Path) -> None:
    runs = _runs(tiny_folder, tmp_path)
    vocabulary, out = Vocabulary.load(runs / "vocabulary"), runs / "carried" / "language"
    carry_language(tiny_folder, vocabulary, runs / "frozen" / "tokenizer", out, COUNTS)
    before, after = Vocabulary.load(tiny_folder / "vocabulary"), Vocabulary.load(runs / "vocabulary")
    old, new = load_language(tiny_folder / "language"), load_language(runs / "carried" / "language")
    assert load_provenance(runs / "carried" / "language").vocabulary == after.hash
    codes = [1, 5, 9, 30, 2]
    head = ["<|user|>", "<|begin_of_audio|>"]
    ids = [
        *map(before.control_id, head),
        *before.speech_ids([int(ORDER[c]) for c in codes]),
        before.encode_text("a")[0],
    ]
    same = [*map(after.control_id, head), *after.speech_ids(codes), after.encode_text("a")[0]]
    speech = old(torch.tensor([ids])).logits[0, :, before.speech_ids(ORDER.tolist())]
    carried = new(torch.tensor([same])).logits[0, :, after.speech_ids(range(32))]
    correlation = torch.corrcoef(torch.stack([speech.flatten(), carried.flatten()]))[0, 1]
    assert correlation > 0.9


@torch.no_grad()
def test_other_text_leaves_the_speech_as_it_was(tiny_folder: Path, tmp_path: Path) -> None:
    """Without counts, speech tokens stay the same: as for another language."""
    before = Vocabulary.load(tiny_folder / "vocabulary")
    after = Vocabulary.extend(train_text_tokenizer(["你好，再见。"] * 2, 270), before.codebook_size)
    carry_language(tiny_folder, after, tiny_folder / "tokenizer", tmp_path)
    old, new = (load_language(folder).get_input_embeddings().weight for folder in (tiny_folder / "language", tmp_path))
    assert torch.equal(new[after.speech_ids(range(32))], old[before.speech_ids(range(32))])
    [word] = after.encode_text("你好")
    torch.testing.assert_close(new[word], old[before.encode_text("你好")].mean(0))
    assert load_provenance(tmp_path).tokenizer == load_provenance(tiny_folder / "language").tokenizer


@torch.no_grad()
def test_flow_gives_the_same_mel(tiny_folder: Path, tmp_path: Path) -> None:
    runs = _runs(tiny_folder, tmp_path)
    carry_flow(tiny_folder, runs, runs / "carried", COUNTS)
    assert read_extra(runs / "carried" / "flow")["tokenizer"] == file_hash(runs / "frozen" / "tokenizer")
    old = load_component(tiny_folder / "decoder" / "flow", Flow, FlowConfig)
    new = load_component(runs / "carried" / "flow", Flow, FlowConfig)
    codes = torch.arange(20)[None]
    wanted = old(Padded.full(ORDER[codes]), old.init_state(1)).values
    found = new(Padded.full(codes), new.init_state(1)).values
    shuffled = new(Padded.full(ORDER[codes]), new.init_state(1)).values
    assert (found - wanted).norm() < 0.5 * (shuffled - wanted).norm()
