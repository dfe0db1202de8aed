"""The tokenizer's training: quantizer, recognition heads and the stage, tiny."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duologue.checkpoint import load_component
from duologue.layers import Padded
from duologue.tokenizer.encoder import EncoderConfig
from duologue.tokenizer.quantizer import Quantizer, QuantizerConfig
from duologue.tokenizer.recognizer import Recognizer, RecognizerConfig
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from duologue.training.loop import LoopConfig, run
from duologue.training.tokenizer import TokenizerRecipe, TokenizerStage, words_of

TINY_HEADS = RecognizerConfig(width=16, num_heads=2, ffn_dim=32, num_layers=1, num_decoder_layers=1)


def recipe(corpus: Path, **changes: object) -> TokenizerRecipe:
    encoder = EncoderConfig(width=16, num_heads=2, ffn_dim=32, num_layers=1)
    tiny = TokenizerRecipe(
        corpora=(str(corpus),),
        loop=LoopConfig(num_steps=4, learning_rate=1e-3, warmup_steps=1, evaluate_every=4, sample_every=4),
        tokenizer=SpeechTokenizerConfig(encoder=encoder, quantizer=QuantizerConfig(16)),
        recognizer=TINY_HEADS,
        batch_s=4.0,
        quantize_from_step=2,
        num_valid_clips=2,
    )
    return replace(tiny, **changes)  # type: ignore[arg-type]


def test_codebook_follows_the_vectors() -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(QuantizerConfig(8, ema_decay=0.9), 4)
    centres = 5 * torch.randn(4, 4)
    for _ in range(60):
        x = Padded.full(centres[torch.randint(4, (2, 50))] + 0.1 * torch.randn(2, 50, 4))
        quantizer.update(x, quantizer(x).codes)
    x = Padded.full(centres[None])
    result = quantizer(x)
    assert float(result.commitment_loss) < 0.05
    assert len(set(result.codes.values[0].tolist())) == 4
    assert bool((result.margin >= 0).all())


def test_dead_codes_are_restarted_from_the_batch() -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(QuantizerConfig(4, ema_decay=0.5), 2)
    quantizer.codebook.weight.copy_(torch.tensor([[0.0, 0.0], [100.0, 100.0], [200.0, 0.0], [0.0, 200.0]]))
    quantizer.ema_weight.copy_(quantizer.codebook.weight)
    quantizer.ema_count.fill_(1.0)
    for _ in range(8):
        x = Padded.full(torch.randn(1, 64, 2))
        quantizer.update(x, quantizer(x).codes)
    assert float(quantizer.codebook.weight.abs().max()) < 10
    assert len(quantizer(Padded.full(torch.randn(1, 500, 2))).codes.values.unique()) == 4


def test_padding_is_not_heard() -> None:
    """Losses and transcripts do not change when a batch is padded further, nor what is behind a row's end."""
    torch.manual_seed(0)
    recognizer = Recognizer(TINY_HEADS).eval()
    rows = [torch.randn(n, 16) for n in (5, 9)]
    texts = [torch.tensor(recognizer.encode_text(text)) for text in ("ab", "it is")]
    values, text = Padded.stack(rows), Padded.stack(texts)
    frames = Padded(values.values.repeat_interleave(4, 1), values.lengths * 4)
    prosody = torch.randn(2, 9, 3)
    wider = [
        Padded(torch.nn.functional.pad(x.values, (0, 0) * (x.values.dim() - 2) + (0, 7), value=9), x.lengths)
        for x in (values, frames, text)
    ]
    first = recognizer.losses(values, frames, text, text, prosody)
    second = recognizer.losses(wider[0], wider[1], wider[2], wider[2], torch.nn.functional.pad(prosody, (0, 0, 0, 7)))
    for name, loss in vars(first).items():
        torch.testing.assert_close(loss, getattr(second, name), msg=name)
    assert recognizer.transcribe(values) == recognizer.transcribe(wider[0])
    assert recognizer.transcribe_ctc(values) == recognizer.transcribe_ctc(wider[0])


def test_the_stage_runs_saves_and_goes_on(audio_corpus: Path, tmp_path: Path) -> None:
    stage = TokenizerStage(recipe(audio_corpus))
    before = stage.tokenizer.quantizer.ema_count.clone()
    metrics = run(stage, stage.recipe.loop, tmp_path / "run")
    assert set(metrics) == {"wer", "wer_ctc", "codebook_usage", "codebook_usage_ema", "perplexity"}
    assert not torch.equal(stage.tokenizer.quantizer.ema_count, before)
    assert (tmp_path / "run" / "samples" / "step-0000004" / "transcripts.jsonl").read_text().count("heard") >= 1
    final = tmp_path / "run" / "final"
    saved = load_component(final / "tokenizer", SpeechTokenizer, SpeechTokenizerConfig)
    wav = Padded.full(torch.randn(1, 16000))
    torch.testing.assert_close(saved(wav).values, stage.tokenizer.eval()(wav).values)
    words = {word for clips in stage.clips for clip in clips.records for word in words_of(clip.text)}
    table = tmp_path / "phones.json"
    table.write_text(json.dumps({word: list(word) for word in words}))
    again = TokenizerStage(recipe(audio_corpus, start_from=str(final), pronunciations=str(table)))
    assert again.recognizer.config.phones == tuple(sorted({char for word in words for char in word}))
    torch.testing.assert_close(again.recognizer.ctc.weight, stage.recognizer.ctc.weight)
    assert torch.isfinite(again.losses("model", again.batch(0), 0)["frame_ctc"])


def test_a_word_without_pronunciation_is_named(audio_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "phones.json").write_text('{"zebra": ["z"]}')
    stage = TokenizerStage(recipe(audio_corpus, pronunciations=str(tmp_path / "phones.json")))
    with pytest.raises(ValueError, match="does not say how"):
        stage.batch(0)


def test_batches_are_functions_of_their_index(audio_corpus: Path) -> None:
    first, second = (TokenizerStage(recipe(audio_corpus)).batch(5) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
