"""The tokenizer's training: quantizer and stage, tiny, from a random Whisper folder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duologue.audio import LogMelConfig
from duologue.checkpoint import load_component, load_tensors
from duologue.layers import Padded
from duologue.released.tokenizer import load_released_tokenizer, save_released_tokenizer
from duologue.tokenizer.encoder import EncoderConfig
from duologue.tokenizer.quantizer import Quantizer, QuantizerConfig
from duologue.tokenizer.speech_recognizer import load_speech_recognizer
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from duologue.training.loop import LoopConfig, run
from duologue.training.tokenizer import SpecAugmentConfig, TokenizerRecipe, TokenizerStage, _masked
from recipes.pocket.whisper import write_random_whisper


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_whisper(tmp_path_factory.mktemp("whisper"))


def recipe(corpus: Path, whisper: Path, **changes: object) -> TokenizerRecipe:
    tiny = TokenizerRecipe(
        corpora=(str(corpus),),
        whisper=str(whisper),
        loop=LoopConfig(
            num_steps=4, learning_rate=1e-3, warmup_steps=1, evaluate_every=4, sample_every=4, precision="fp32"
        ),
        tokenizer=SpeechTokenizerConfig(
            features=LogMelConfig(floor="fixed"),
            encoder=EncoderConfig(num_layers=1),
            quantizer=QuantizerConfig(16, normalize=True),
        ),
        batch_s=4.0,
        quantize_from=0.5,
        bypass_until=0.75,
        kmeans_batches=2,
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


@pytest.mark.parametrize("normalize", [False, True])
def test_kmeans_starts_the_codebook(normalize: bool) -> None:
    """Vectors around separate centers get a code for each center, whatever the scale of a channel."""
    torch.manual_seed(0)
    centers = 5 * torch.randn(6, 8) * torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 100]) + 3
    vectors = centers[torch.randint(6, (600,))] + 0.05 * torch.randn(600, 8)
    quantizer = Quantizer(QuantizerConfig(12, restart_threshold=0.0, normalize=normalize), 8)
    quantizer.fit_normalization(vectors)
    quantizer.fit_codebook(vectors, num_rounds=12)
    result = quantizer(Padded.full(vectors[None]))
    assert float(result.commitment_loss) < 0.05 * float(quantizer.normalized(vectors).var())
    torch.testing.assert_close(quantizer.codes(Padded.full(vectors[None])).values, result.codes.values)
    before = quantizer.codebook.weight.clone()
    quantizer.update(Padded.full(vectors[None]), result.codes)
    assert float((quantizer.codebook.weight - before).abs().max()) < 0.1 * float(before.abs().max())
    with pytest.raises(ValueError, match="at least 12 vectors"):
        quantizer.fit_codebook(vectors[:5])


def test_normalization_is_undone_for_the_recognizer(audio_corpus: Path, whisper: Path) -> None:
    """After calibration the recognizer sees vectors close to those that Whisper's upper layers know."""
    stage = TokenizerStage(recipe(audio_corpus, whisper))
    hidden = stage._vectors(2**40, 4, torch.device("cpu"))
    with torch.no_grad():
        back = stage.tokenizer.quantizer.normalized(hidden) * stage.recognizer.scale + stage.recognizer.offset
    assert float((back - hidden).square().mean()) < 0.2 * float((hidden - hidden.mean(0)).square().mean())


def test_the_end_starts_as_the_teacher_hears_silence(audio_corpus: Path, whisper: Path) -> None:
    stage = TokenizerStage(recipe(audio_corpus, whisper, num_end=3))
    assert stage.recognizer.end.shape == (3, 32)
    assert bool(stage.recognizer.end.abs().sum(1).gt(0).all())
    assert TokenizerStage(recipe(audio_corpus, whisper, num_end=0)).recognizer.end.shape == (0, 32)


def test_the_stage_runs_saves_and_goes_on(audio_corpus: Path, whisper: Path, tmp_path: Path) -> None:
    stage = TokenizerStage(recipe(audio_corpus, whisper))
    before = stage.tokenizer.quantizer.ema_count.clone()
    metrics = run(stage, stage.recipe.loop, tmp_path / "run")
    assert set(metrics) == {"wer/valid", "codebook_usage", "codebook_usage_ema", "perplexity"}
    assert not torch.equal(stage.tokenizer.quantizer.ema_count, before)
    assert (tmp_path / "run" / "samples" / "step-0000004" / "transcripts.jsonl").read_text().count("heard") >= 1
    final = tmp_path / "run" / "final"
    saved = load_component(final / "tokenizer", SpeechTokenizer, SpeechTokenizerConfig)
    wav = Padded.full(torch.randn(1, 16000))
    torch.testing.assert_close(saved(wav).values, stage.tokenizer.eval()(wav).values)
    values = Padded.full(torch.randn(1, 5, 32))
    assert load_speech_recognizer(final / "recognizer").transcribe(values) == stage.recognizer.transcribe(values)
    again = TokenizerStage(recipe(audio_corpus, whisper, start_from=str(final)))
    torch.testing.assert_close(again.recognizer.prosody.weight, stage.recognizer.prosody.weight)
    assert set(again.losses("model", again.batch(0), 0.9)) == {"asr", "prosody", "distill", "commitment"}


def test_whispers_text_embeddings_rest_unless_asked(audio_corpus: Path, whisper: Path, tmp_path: Path) -> None:
    changed = {}
    for asked in (False, True):
        stage = TokenizerStage(recipe(audio_corpus, whisper, train_text_embeddings=asked))
        before = stage.recognizer.decoder.embed_tokens.weight.detach().clone()
        run(stage, replace(stage.recipe.loop, num_steps=1), tmp_path / str(asked))
        changed[asked] = not torch.equal(before, stage.recognizer.decoder.embed_tokens.weight)
    assert changed == {False: False, True: True}


def test_clips_bypass_the_quantizer_less_and_less(audio_corpus: Path, whisper: Path) -> None:
    stage = TokenizerStage(recipe(audio_corpus, whisper, quantize_from=0.25, bypass_until=0.75, bypass=0.5))
    shares = [stage._bypass(progress) for progress in (0.0, 0.24, 0.25, 0.5, 0.75, 0.99)]
    assert shares == [1.0, 1.0, 0.5, 0.25, 0.0, 0.0]
    assert "commitment" not in stage.losses("model", stage.batch(0), 0.24)


def test_released_sizes_are_saved_in_the_released_layout(audio_corpus: Path, whisper: Path, tmp_path: Path) -> None:
    plain = SpeechTokenizerConfig(LogMelConfig(floor="utterance"), EncoderConfig(num_layers=2), QuantizerConfig(16))
    stage = TokenizerStage(recipe(audio_corpus, whisper, tokenizer=plain))
    run(stage, stage.recipe.loop, tmp_path / "run")
    saved = load_released_tokenizer(tmp_path / "run" / "final" / "released")
    wav = Padded.full(0.1 * torch.randn(1, 40_000))
    torch.testing.assert_close(saved(wav).values, stage.tokenizer.eval()(wav).values)
    torch.testing.assert_close(saved.embed_positions2.weight, stage.recognizer.embed_positions2.weight)
    keys = load_tensors(tmp_path / "run" / "final" / "released")
    assert "model.encoder.layers.2.fc1.weight" in keys
    assert "model.encoder.layer_norm.bias" in keys
    other = TokenizerStage(recipe(audio_corpus, whisper))
    with pytest.raises(ValueError, match=r"quantizer\.normalize=false"):
        save_released_tokenizer(tmp_path / "no", other.tokenizer, other.recognizer)


def test_without_distillation_there_is_no_teacher(audio_corpus: Path, whisper: Path) -> None:
    stage = TokenizerStage(recipe(audio_corpus, whisper, distill_weight=0.0))
    assert stage.teacher is None
    assert "distill" not in stage.losses("model", stage.batch(0), 0.0)


def test_masks_hide_time_and_channels_of_some_rows() -> None:
    torch.manual_seed(0)
    mel = Padded(torch.randn(40, 200, 80), torch.full((40,), 150))
    masked = _masked(mel, SpecAugmentConfig(0.5, 2, 0.25, 2, 12))
    rows = (masked != mel.values).flatten(1).any(1)
    assert 8 < int(rows.sum()) < 32
    hidden = (masked != mel.values)[rows]
    assert int(hidden.all(2).sum(1).max()) <= 2 * 26
    assert int(hidden.all(1).sum(1).max()) <= 2 * 13
    assert torch.equal(_masked(mel, SpecAugmentConfig(0.0)), mel.values)


def test_batches_are_functions_of_their_index(audio_corpus: Path, whisper: Path) -> None:
    first, second = (TokenizerStage(recipe(audio_corpus, whisper)).batch(5) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
