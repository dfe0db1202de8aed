"""Listening in small chunks: samples wait for their block, and provisional codes leave no trace."""

import copy

import pytest
import torch

from duologue.audio import LogMelConfig
from duologue.layers import Padded
from duologue.tokenizer.encoder import EncoderConfig
from duologue.tokenizer.quantizer import Quantizer, QuantizerConfig
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig

BLOCK = 5 * 1280  # samples


@pytest.fixture(scope="module")
def tokenizer() -> SpeechTokenizer:
    """Pieces of 2.4 s and blocks of 0.4 s."""
    torch.manual_seed(0)
    encoder = EncoderConfig(width=32, num_heads=2, ffn_dim=64, num_layers=2, block_frames=20, max_positions=120)
    features = LogMelConfig(floor="utterance")
    return SpeechTokenizer(SpeechTokenizerConfig(features, encoder, QuantizerConfig(codebook_size=64))).eval()


def wav(num_samples: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    level = torch.sin(torch.arange(num_samples) / 4000).abs()
    return 0.2 * level * torch.randn(rows, num_samples, generator=generator)


@torch.inference_mode()
def test_provisional_codes_are_those_of_an_end_now_and_leave_no_trace(tokenizer: SpeechTokenizer) -> None:
    sound = wav(40_000)  # beyond the end of a piece
    state, untouched = tokenizer.init_state(1), tokenizer.init_state(1)
    with_looks, without = [], []
    for at in range(0, 40_000, 1700):
        chunk = Padded.full(sound[:, at : at + 1700])
        with_looks += tokenizer.step(chunk, state).rows()[0].tolist()
        without += tokenizer.step(chunk, untouched).rows()[0].tolist()
        looked = tokenizer.provisional(state).rows()[0].tolist()
        assert looked == tokenizer.flush(copy.deepcopy(untouched)).rows()[0].tolist()
        heard = min(at + 1700, 40_000)
        assert len(with_looks) + len(looked) == -(-heard // 1280)
    assert with_looks == without
    assert tokenizer.flush(state).rows()[0].tolist() == tokenizer.flush(untouched).rows()[0].tolist()


@torch.inference_mode()
def test_provisional_codes_of_some_rows_beside_silent_ones(tokenizer: SpeechTokenizer) -> None:
    state = tokenizer.init_state(3)
    x = Padded(wav(9000, rows=3), torch.tensor([9000, 0, 1280]))
    tokenizer.step(x, state)
    codes = tokenizer.provisional(state)
    assert codes.lengths.tolist() == [3, 0, 1]
    alone = tokenizer.init_state(1)
    tokenizer.step(Padded.full(x.values[2:, :1280]), alone)
    assert codes.rows()[2].tolist() == tokenizer.provisional(alone).rows()[0].tolist()


@torch.inference_mode()
def test_a_chunk_that_closes_nothing_computes_nothing(
    tokenizer: SpeechTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All work falls on the chunk that closes a block: the first one 40 samples behind the end of the block."""
    calls = []
    features = tokenizer.features.step

    def counted(x: Padded, state: object) -> Padded:
        calls.append(int(x.lengths[0]))
        return features(x, state)  # type: ignore[arg-type]

    monkeypatch.setattr(tokenizer.features, "step", counted)
    state, sound = tokenizer.init_state(1), wav(3 * BLOCK)
    for at in range(0, BLOCK, 640):
        assert not tokenizer.step(Padded.full(sound[:, at : at + 640]), state).values.shape[1]
    assert not tokenizer.step(Padded.full(sound[:, BLOCK : BLOCK + 39]), state).values.shape[1]
    assert calls == []
    assert tokenizer.step(Padded.full(sound[:, BLOCK + 39 : BLOCK + 40]), state).lengths.tolist() == [5]
    assert calls == [BLOCK + 40]
    # What one long chunk closes at once comes at once.
    assert tokenizer.step(Padded.full(sound[:, BLOCK + 40 :]), state).lengths.tolist() == [5]
    assert tokenizer.flush(state).lengths.tolist() == [5]


def test_codes_follow_a_codebook_that_changes() -> None:
    """What is kept of the codebook for the next step is dropped when it is written, replaced or copied elsewhere."""
    torch.manual_seed(0)
    quantizer = Quantizer(QuantizerConfig(codebook_size=8), 4)
    x = Padded.full(torch.randn(1, 20, 4))

    def check(one: Quantizer) -> None:
        with torch.inference_mode():
            assert torch.equal(one.codes(x).values[0], torch.cdist(x.values[0], one.codebook.weight).argmin(1))

    check(quantizer)
    kept = quantizer._code_norms()
    check(quantizer)
    assert quantizer._code_norms() is kept
    with torch.no_grad():
        quantizer.codebook.weight.mul_(torch.linspace(0.1, 3, 8)[:, None])
    check(quantizer)
    check(copy.deepcopy(quantizer))
    quantizer.load_state_dict(Quantizer(QuantizerConfig(codebook_size=8), 4).state_dict())
    check(quantizer)
    quantizer.codebook.weight = torch.nn.Parameter(3 * torch.rand(8, 4), requires_grad=False)
    check(quantizer)
