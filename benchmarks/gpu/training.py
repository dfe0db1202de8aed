"""Section `training`: two steps, an evaluation and a sample of every stage, on synthetic data."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.gpu.record import Run
from duologue.audio import LogMelConfig
from duologue.conversation.chatbot import model_folder
from duologue.decoder.encoder import TokenEncoderConfig
from duologue.decoder.flow import FlowConfig
from duologue.decoder.transformer import EstimatorConfig
from duologue.decoder.vocoder import VocoderConfig
from duologue.language.backbone import LanguageConfig
from duologue.released.decoder.conformer import ConformerConfig
from duologue.released.decoder.flow import ReleasedFlowConfig
from duologue.released.decoder.unet import UNetConfig
from duologue.tokenizer.encoder import EncoderConfig
from duologue.tokenizer.quantizer import QuantizerConfig
from duologue.tokenizer.tokenizer import SpeechTokenizerConfig
from duologue.training.discriminators import DiscriminatorConfig
from duologue.training.loop import LoopConfig, TrainingStage
from duologue.training.loop import run as run_loop

NUM_STEPS = 2
CLIP_S = (1.2, 1.6, 2.0, 0.9, 1.4, 1.1, 1.3, 1.7, 1.0, 1.5)
SAMPLE_RATE = 16000
WORDS = ("one", "two", "three", "four")
FLOW = FlowConfig(
    encoder=TokenEncoderConfig(width=16, num_heads=2, ffn_dim=24, num_layers=1),
    estimator=EstimatorConfig(width=16, num_heads=2, ffn_dim=24, num_layers=1, kernel_size=3, time_dim=8),
    condition_dim=80,
    speaker_dim=4,
    num_steps=2,
)
RELEASED = ReleasedFlowConfig(
    input_size=16,
    spk_embed_dim=4,
    encoder=ConformerConfig(input_size=16, output_size=16, attention_heads=2, linear_units=24, num_blocks=1),
    estimator=UNetConfig(channels=(16, 16), attention_head_dim=8, n_blocks=1, num_mid_blocks=1, num_heads=2),
)
LANGUAGE = LanguageConfig(
    width=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, ffn_dim=48, max_positions=512
)
DISCRIMINATORS = DiscriminatorConfig(periods=(2,), period_channels=(4, 8), resolutions=(256,), resolution_channels=4)
Make = Callable[["Places"], tuple[TrainingStage, LoopConfig]]


class Places:
    """Folders of the synthetic data, and of what earlier stages made."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        pocket = model_folder()
        self.tokenizer, self.vocabulary = pocket / "tokenizer", pocket / "vocabulary"
        self.clips, self.tokens = folder / "clips", folder / "tokens"


def training(run: Run) -> None:
    """Runs every stage; needs pyarrow for the stages of the language model."""
    with tempfile.TemporaryDirectory() as folder:
        places = Places(Path(folder), str(run.device))
        write_clips(places.clips)
        for name, make in STAGES.items():
            if run.over:
                run.record.add(name, None, reason="no time")
                continue
            with run.record.attempt(name):
                start = time.perf_counter()
                stage, loop = make(places)
                metrics = run_loop(stage, loop, places.folder / name.replace(" ", "-"), places.device)
                shown = {key: round(value, 3) for key, value in list(metrics.items())[:4]}
                run.record.add(name, time.perf_counter() - start, "s", steps=loop.num_steps, metrics=shown)


def write_clips(folder: Path) -> None:
    """Writes tones as a corpus of clips; every second one is the reply voice, every fifth is for validation."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines, samples, offset = [], [], 0
    for index, seconds in enumerate(CLIP_S):
        size = int(seconds * SAMPLE_RATE)
        tone = 0.2 * np.sin(np.arange(size) * rng.uniform(0.02, 0.4)) + rng.normal(0, 0.01, size)
        samples.append((tone * 32767).astype("<i2"))
        lines.append(
            {
                "id": f"clip-{index}",
                "text": WORDS[index % len(WORDS)],
                "role": "reply" if index % 2 else "user",
                "voice": "reply" if index % 2 else f"voice-{index % 3}",
                "language": "en",
                "style": "plain",
                "split": "valid" if index % 5 >= 3 else "train",
                "intent": "free",
                "sample_rate": SAMPLE_RATE,
                "offset": offset,
                "num_samples": size,
            }
        )
        offset += size
    np.concatenate(samples).tofile(folder / "clips-00000.pcm")
    (folder / "clips-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    turns = [
        {"role": "user", "text": "what is one?", "clip": ["clip-0"]},
        {"role": "assistant", "text": "two", "clip": ["clip-1"]},
    ]
    dialogues = [
        {"id": f"talk-{split}", "split": split, "intent": "free", "language": "en", "turns": turns}
        for split in ("train", "valid")
    ]
    (folder / "dialogues-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in dialogues))


def _loop(steps: int = NUM_STEPS) -> LoopConfig:
    return LoopConfig(num_steps=steps, learning_rate=1e-3, warmup_steps=1, log_every=1)


def _vocoder(places: Places) -> tuple[TrainingStage, LoopConfig]:
    from duologue.training.vocoder import VocoderRecipe, VocoderStage

    small = VocoderConfig(width=16, ffn_dim=32, num_layers=1)
    recipe = VocoderRecipe(
        (str(places.clips),),
        _loop(3),
        vocoder=small,
        discriminators=DISCRIMINATORS,
        batch_size=2,
        adversarial_from=0.5,
        adversarial_warmup=0.0,
        num_valid_clips=1,
    )
    return VocoderStage(recipe), recipe.loop


def _flow(places: Places, released: ReleasedFlowConfig | None = None) -> tuple[TrainingStage, LoopConfig]:
    from duologue.training.flow import FlowRecipe, FlowStage

    recipe = FlowRecipe(
        (str(places.clips),),
        str(places.tokenizer),
        str(places.folder / "store"),
        _loop(),
        flow=FLOW,
        released=released,
        batch_s=4.0,
        max_tokens=20,
        num_valid_clips=2,
        num_generated=1,
    )
    return FlowStage(recipe), recipe.loop


def _tokenizer(places: Places) -> tuple[TrainingStage, LoopConfig]:
    from duologue.training.tokenizer import TokenizerRecipe, TokenizerStage
    from recipes.pocket.whisper import write_random_whisper

    config = SpeechTokenizerConfig(
        features=LogMelConfig(floor="fixed"),
        encoder=EncoderConfig(num_layers=1),
        quantizer=QuantizerConfig(16, normalize=True),
    )
    recipe = TokenizerRecipe(
        (str(places.clips),),
        str(write_random_whisper(places.folder / "whisper")),
        _loop(3),
        tokenizer=config,
        batch_s=4.0,
        quantize_from=0.5,
        bypass_until=0.75,
        kmeans_batches=2,
        num_valid_clips=2,
    )
    return TokenizerStage(recipe), recipe.loop


def _tokenizer_without_codebook(places: Places) -> tuple[TrainingStage, LoopConfig]:
    """An evaluation before the codebook exists."""
    from duologue.training.tokenizer import TokenizerRecipe, TokenizerStage

    recipe = TokenizerRecipe(
        (str(places.clips),),
        str(places.folder / "whisper"),
        _loop(1),
        tokenizer=SpeechTokenizerConfig(encoder=EncoderConfig(num_layers=1), quantizer=QuantizerConfig(16)),
        batch_s=4.0,
        num_valid_clips=2,
    )
    return TokenizerStage(recipe), recipe.loop


def _pretrain(places: Places) -> tuple[TrainingStage, LoopConfig]:
    from duologue.training.pretrain import Mixture, PretrainRecipe, PretrainStage
    from duologue.training.tokenize import TokensRecipe, run_tokens

    tokens = TokensRecipe((str(places.clips),), str(places.tokenizer), str(places.vocabulary), str(places.tokens))
    run_tokens(tokens, places.device)
    recipe = PretrainRecipe(
        str(places.tokens),
        str(places.vocabulary),
        _loop(),
        language=LANGUAGE,
        mixture=Mixture(text=0.0, woven=0.0),
        length=128,
        num_rows=2,
    )
    return PretrainStage(recipe), recipe.loop


def _chat(places: Places) -> tuple[TrainingStage, LoopConfig]:
    from duologue.training.chat import ChatRecipe, ChatStage
    from duologue.training.pretrain import Mixture

    recipe = ChatRecipe(
        str(places.tokens),
        str(places.vocabulary),
        str(places.folder / "pretrain" / "final" / "language"),
        loop=_loop(),
        mixture=Mixture(text=0.0, woven=0.0),
        length=128,
        num_rows=2,
        num_questions=1,
    )
    return ChatStage(recipe), recipe.loop


STAGES: dict[str, Make] = {
    "vocoder": _vocoder,
    "flow": _flow,
    "released flow": lambda places: _flow(places, RELEASED),
    "tokenizer": _tokenizer,
    "tokenizer before its codebook": _tokenizer_without_codebook,
    "pretrain": _pretrain,
    "chat": _chat,
}
