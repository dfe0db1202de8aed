"""Distilling a smaller recognizer on a token corpus."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from duologue.audio import LogMelConfig
from duologue.checkpoint import file_hash
from duologue.language.backbone import Provenance
from duologue.layers import Padded
from duologue.tokenizer.encoder import EncoderConfig
from duologue.tokenizer.quantizer import QuantizerConfig
from duologue.tokenizer.speech_recognizer import TextDecoder, load_speech_recognizer
from duologue.tokenizer.tokenizer import SpeechTokenizerConfig
from duologue.training.corpus import CorpusSample, LabeledTurn, write_manifest, write_shard
from duologue.training.loop import LoopConfig, run
from duologue.training.recognizer import RecognizerRecipe, RecognizerStage, with_decoder_layers
from duologue.training.tokenizer import TokenizerRecipe, TokenizerStage
from duologue.turns import Modality, Role, Turn
from duologue.vocabulary import Vocabulary
from recipes.pocket.text import train_text_tokenizer
from recipes.pocket.whisper import write_random_whisper

NUM_CODES = 16
WORDS = ("one", "two", "three", "four")


@pytest.fixture(scope="module")
def recipe(audio_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RecognizerRecipe:
    """A corpus of two words in a language of sounds, and a teacher with random weights."""
    folder = tmp_path_factory.mktemp("distilled")
    parts = TokenizerStage(
        TokenizerRecipe(
            corpora=(str(audio_corpus),),
            whisper=str(write_random_whisper(folder / "whisper")),
            loop=LoopConfig(num_steps=1, learning_rate=1e-3),
            tokenizer=SpeechTokenizerConfig(
                LogMelConfig(floor="fixed"), EncoderConfig(num_layers=1), QuantizerConfig(NUM_CODES, normalize=True)
            ),
            distill_weight=0.0,
        )
    )
    parts.save(folder)
    vocabulary = Vocabulary.extend(train_text_tokenizer(["one two three four"] * 2, 300), NUM_CODES)
    vocabulary.save(folder / "vocabulary")
    provenance = Provenance(file_hash(folder / "tokenizer"), vocabulary.hash)
    samples = []
    for split in ("train", "valid"):
        for number, word in enumerate(WORDS * 3):
            codes = vocabulary.speech_ids([(ord(letter) + k) % NUM_CODES for letter in word for k in range(3)])
            turn = Turn(Role.USER, Modality.SPEECH, tuple(codes), "en")
            labeled = LabeledTurn(turn, tuple(vocabulary.encode_text(word)))
            samples.append(CorpusSample(f"{split}-{number}", "clip", split, "", (labeled,)))
    write_shard(folder / "tokens", "all", samples, provenance, vocabulary.speech_offset)
    write_manifest(folder / "tokens", provenance)
    return RecognizerRecipe(
        corpus=str(folder / "tokens"),
        vocabulary=str(folder / "vocabulary"),
        tokenizer=str(folder / "tokenizer"),
        teacher=str(folder / "recognizer"),
        decoder_layers=(1,),
        batch_s=8.0,
        corrupt=0.0,
        num_valid_clips=4,
        loop=LoopConfig(
            num_steps=60, learning_rate=3e-3, warmup_steps=1, evaluate_every=60, sample_every=60, precision="fp32"
        ),
    )


def test_the_student_keeps_layers_of_the_teacher(recipe: RecognizerRecipe) -> None:
    teacher = load_speech_recognizer(recipe.teacher)
    student = with_decoder_layers(teacher, (1,))
    assert student.config == replace(teacher.config, num_decoder_layers=1)
    kept, whole = student.state_dict(), teacher.state_dict()
    assert torch.equal(kept["decoder.layers.0.fc1.weight"], whole["decoder.layers.1.fc1.weight"])
    assert torch.equal(kept["layer_norm.weight"], whole["layer_norm.weight"])
    with pytest.raises(ValueError, match="the teacher has layers 0 to 1"):
        with_decoder_layers(teacher, (2,))


def test_a_student_with_all_layers_is_the_teacher(recipe: RecognizerRecipe) -> None:
    stage = RecognizerStage(replace(recipe, decoder_layers=(0, 1)))
    stage.recognizer.eval()
    with torch.no_grad():
        losses = stage.losses("recognizer", stage.batch(0), 0.0)
    assert abs(float(losses["distill"])) < 1e-5
    assert float(losses["asr"]) > 1.0


def test_it_learns_the_words_and_writes_a_recognizer(recipe: RecognizerRecipe, tmp_path: Path) -> None:
    stage = RecognizerStage(replace(recipe, distill_weight=0.0))
    metrics = run(stage, stage.recipe.loop, tmp_path)
    assert metrics["wer/student"] < 0.5 < metrics["wer/teacher"]
    saved = load_speech_recognizer(tmp_path / "final" / "recognizer")
    said = stage.valid[0]
    values = stage._vectors(torch.tensor([said.codes]), torch.tensor([len(said.codes)]))
    assert saved.eval().transcribe(values) == stage.recognizer.transcribe(values)
    assert (tmp_path / "samples" / "step-0000060" / "transcripts.jsonl").read_text().count("heard") == 4


def test_text_is_limited_by_the_speech(recipe: RecognizerRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve speech tokens have room for eight ids and twelve times the rate."""
    limits: list[list[int]] = []

    def greedy(*args: Any) -> list[list[tuple[int, float]]]:
        limits.append(args[-1].tolist())
        return [[]]

    monkeypatch.setattr(TextDecoder, "greedy", greedy)
    teacher = load_speech_recognizer(recipe.teacher)
    for most in (None, 0.5, 1.5):
        student = with_decoder_layers(teacher, (0,), most).eval()
        student.transcribe(Padded.full(torch.randn(1, 12, student.config.width)))
    assert limits == [[16], [14], [26]]


def test_another_tokenizer_is_refused(recipe: RecognizerRecipe) -> None:
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        RecognizerStage(replace(recipe, tokenizer="src/duologue/pocket/tokenizer"))
