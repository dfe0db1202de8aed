"""Devices other than the CPU, where no such device is needed: which one is asked for, and with which settings.

The meta device stands for a GPU: tensors on it have no values, and an operation with the CPU's tensors fails.
"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from duologue.conversation import chatbot
from duologue.language.engine import MAX_CACHED_TOKENS, PlainEngine
from duologue.layers import Padded
from duologue.models import CACHED_PER_SESSION, Models
from duologue.released import folder as released_folder
from duologue.released.decoder.decoder import ReleasedDecoder
from duologue.released.decoder.hift import exact_cycles, phase_dtype
from duologue.released.folder import ReleasedFolder
from duologue.released.random_weights import init_random
from duologue.serving import server
from duologue.tokenizer.quantizer import Quantized
from duologue.tokenizer.tokenizer import SpeechTokenizer
from duologue.training import loop, tokenize
from duologue.training.recipes import train
from duologue.training.sharding import start_distributed
from duologue.training.tokenize import TokensRecipe
from tests.released_sizes import small_decoder
from tests.test_loop import CONFIG, Line
from tests.test_train_tokenizer import recipe, whisper  # noqa: F401
from tests.tiny import write_tiny_chatbot


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chatbot(tmp_path_factory.mktemp("models"))


# Training.


def test_a_rank_takes_the_device_of_its_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Under torchrun: the device is set before the process group is made, and NCCL is for CUDA alone."""
    calls: list[tuple[str, object]] = []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("device", device)))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: calls.append(("group", backend)))
    assert start_distributed("cuda") == (0, 1, "cuda:3")
    assert calls == [("device", "cuda:3"), ("group", "cpu:gloo,cuda:nccl")]
    calls.clear()
    assert start_distributed("cpu") == (0, 1, "cpu")
    assert calls == [("group", "gloo")]


def test_without_torchrun_the_device_is_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert start_distributed("cuda:1") == (0, 1, "cuda:1")


def test_batches_and_modules_go_to_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str] = []

    class Watched(Line):
        def losses(self, phase: str, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
            seen.extend(value.device.type for value in batch.values())
            seen.extend(parameter.device.type for parameter in self.phases[phase].parameters())
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "start_distributed", lambda device: (0, 1, "meta"))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which the meta device lacks
    with pytest.raises(KeyboardInterrupt):
        loop.run(Watched(), replace(CONFIG, precision="fp32"), tmp_path, "cuda")
    assert set(seen) == {"meta"}


@pytest.mark.parametrize("trained", [True, False], ids=["with codebook", "before the codebook"])
def test_clips_of_an_evaluation_go_to_the_tokenizers_device(
    audio_corpus: Path,
    whisper: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    trained: bool,
) -> None:
    from duologue.training.tokenizer import TokenizerStage

    stage = TokenizerStage(recipe(audio_corpus, whisper))
    stage.tokenizer.quantizer.ema_count.fill_(1.0 if trained else 0.0)
    count = stage.tokenizer.quantizer.ema_count
    seen: list[str] = []

    def watched(self: SpeechTokenizer, x: Padded, *_: Any) -> Any:
        seen.extend([x.values.device.type, x.lengths.device.type])
        codes = Padded(torch.zeros(len(x.lengths), 2, dtype=torch.int64), torch.full_like(x.lengths, 2, device="cpu"))
        nothing = torch.zeros(len(x.lengths), 2, 32)
        return Quantized(codes, nothing, nothing, nothing) if len(seen) == 2 else Padded(nothing, codes.lengths)

    stage.tokenizer.quantizer.codebook.to("meta")
    monkeypatch.setattr(SpeechTokenizer, "quantize_piece", watched)
    monkeypatch.setattr(SpeechTokenizer, "encode_piece", watched)
    monkeypatch.setattr(type(stage.recognizer), "transcribe", lambda self, values, language: ["a", "b"])
    assert stage.tokenizer.quantizer.ema_count is count
    stage._transcribe(next(iter(stage.valid.values())), [0, 1])
    assert seen == ["meta"] * (2 if trained else 4)


def test_tokens_are_made_on_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_models: Path) -> None:
    """The command's device reaches the tokenizer, and clips follow it."""
    asked: list[object] = []

    def watched(made: TokensRecipe, device: str, ray: str) -> None:
        asked.append(device)
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenize, "run_tokens", watched)
    text = f"corpora: [a]\ntokenizer: {tiny_models / 'tokenizer'}\nvocabulary: {tiny_models / 'vocabulary'}\nout: out\n"
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(KeyboardInterrupt):
        train("tokens", tmp_path / "recipe.yaml", device="cuda:1")
    assert asked == ["cuda:1"]


def test_clips_go_to_the_tokenizers_device(
    audio_corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_models: Path
) -> None:
    seen: list[str] = []

    def watched(self: SpeechTokenizer, x: Padded) -> Padded:
        seen.extend([x.values.device.type, x.lengths.device.type, self.quantizer.codebook.weight.device.type])
        raise KeyboardInterrupt

    monkeypatch.setattr(SpeechTokenizer, "forward", watched)
    made = TokensRecipe(
        (str(audio_corpus),), str(tiny_models / "tokenizer"), str(tiny_models / "vocabulary"), str(tmp_path / "out")
    )
    with pytest.raises(KeyboardInterrupt):
        tokenize.run_tokens(made, "meta")
    assert seen == ["meta"] * 3


# Models.


def test_sizes_reach_the_engine(tiny_models: Path) -> None:
    made = Models.load(tiny_models, max_sessions=64).engine
    assert isinstance(made, PlainEngine)
    assert (made.max_sessions, made._max_caches) == (64, 64)
    assert made.max_cached_tokens == 64 * CACHED_PER_SESSION
    other = chatbot.load(tiny_models, max_sessions=2, max_cached_tokens=5000).models.engine
    assert isinstance(other, PlainEngine)
    assert (other.max_sessions, other.max_cached_tokens) == (2, 5000)
    default = Models.load(tiny_models).engine
    assert isinstance(default, PlainEngine)
    assert (default.max_sessions, default.max_cached_tokens) == (32, MAX_CACHED_TOKENS)


def test_a_part_on_two_devices_is_refused(tiny_models: Path) -> None:
    models = Models.load(tiny_models)
    models.decoder.vocoder.to("meta")
    with pytest.raises(ValueError, match=r"the decoder lies on cpu, meta: every part must lie on one device"):
        replace(models)


def test_models_are_loaded_with_exact_float32(monkeypatch: pytest.MonkeyPatch, tiny_models: Path) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr("duologue.models.set_float32_precision", lambda *given: asked.append(given))
    Models.load(tiny_models)
    assert asked == [("cpu",)]


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cuda:0", None, torch.bfloat16),
        ("cuda", "float32", torch.float32),
        ("cpu", None, torch.float32),
        ("mps", None, torch.float32),
    ],
)
def test_the_u_net_is_in_bfloat16_on_cuda(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, dtype: str | None, expected: torch.dtype
) -> None:
    init_random("tiny", tmp_path / "set")
    asked: list[torch.dtype] = []

    def loaded(path: Path, dtype: torch.dtype, configs: object) -> nn.Module:
        asked.append(dtype)
        return nn.Linear(1, 1)

    monkeypatch.setattr(released_folder, "load_released_decoder", loaded)
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)
    found = ReleasedFolder.find(tmp_path / "set")
    assert found is not None
    found.load_decoder(device, dtype)
    assert asked == [expected]


def test_a_server_captures_the_decoder_before_it_answers(monkeypatch: pytest.MonkeyPatch, tiny_models: Path) -> None:
    bot = chatbot.load(tiny_models)
    calls: list[object] = []

    def capture(self: nn.Module, *given: object) -> int:
        calls.append(given)
        return 0

    monkeypatch.setattr(type(bot.models.decoder), "capture", capture)
    monkeypatch.setattr(chatbot.Session, "reply_now", lambda self: calls.append("reply"))
    server.warm_up(bot)
    assert calls == [(16, None, None), "reply"]
    bot.worker.close()


def test_captures_go_from_the_largest_bucket_to_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = small_decoder()
    asked: list[tuple[int, int]] = []

    def capture(rows: int, frames: int, *_: object) -> bool:
        asked.append((rows, frames))
        return True

    monkeypatch.setattr(decoder.flow, "capture", capture)
    assert ReleasedDecoder.capture(decoder, 4) == len(asked) == 12
    assert (asked[0], asked[-1]) == ((4, 416), (1, 96))
    assert asked == sorted(asked, key=lambda bucket: (-bucket[1], -bucket[0]))


# The phase of the vocoder.


def test_phases_are_float64_where_it_exists() -> None:
    assert phase_dtype(torch.device("mps")) is torch.float32
    assert phase_dtype(torch.device("cpu")) is phase_dtype(torch.device("cuda:1")) is torch.float64


def test_float32_keeps_the_phase_of_a_minute() -> None:
    """A minute of 200 to 400 Hz in one call; harmonics of both dtypes drift apart by a few thousandths of a turn."""
    pitch = 300 + 100 * torch.randn(1, 5000, generator=torch.Generator().manual_seed(0)).tanh()
    exact, _ = exact_cycles(pitch, torch.zeros(1, dtype=torch.float64), 256, 9, 22050)
    single, after = exact_cycles(pitch, torch.zeros(1), 256, 9, 22050)
    assert after.dtype is torch.float32
    apart = (exact - single).abs()
    assert float(torch.minimum(apart, 1 - apart).max()) < 6e-3
