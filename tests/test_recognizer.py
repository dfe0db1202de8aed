"""The recognizer's decoder with a cache gives what it gives without one."""

import torch

from duologue.layers import Padded
from duologue.tokenizer.recognizer import Recognizer, RecognizerConfig, _CachedDecoder, joined


@torch.inference_mode()
def test_character_by_character_is_all_at_once() -> None:
    torch.manual_seed(0)
    config = RecognizerConfig(width=16, num_heads=2, ffn_dim=32, num_layers=1, num_decoder_layers=2)
    recognizer = Recognizer(config).eval()
    for parameter in recognizer.parameters():
        parameter.mul_(3.0)  # far from uniform, so that a wrong mask or position shows
    memory = recognizer.memory(Padded(torch.randn(3, 9, 16), torch.tensor([9, 4, 0])))
    symbols = torch.randint(0, 20, (3, 12))
    cached = _CachedDecoder(recognizer, memory)
    steps = torch.stack([cached.step(symbols[:, i]) for i in range(12)], 1)
    whole = recognizer._decode(symbols, memory)
    torch.testing.assert_close(steps, whole, atol=1e-5, rtol=1e-4)
    assert steps.std() > 0.1


@torch.inference_mode()
def test_tokens_of_a_transcript_have_the_log_probabilities_of_the_decoder() -> None:
    torch.manual_seed(1)
    config = RecognizerConfig(width=16, num_heads=2, ffn_dim=32, num_layers=1, num_decoder_layers=2)
    recognizer = Recognizer(config).eval()
    for parameter in recognizer.parameters():
        parameter.mul_(3.0)
    recognizer.characters.bias[0] -= 20.0  # no early end
    values = Padded(torch.randn(3, 9, 16), torch.tensor([9, 4, 0]))
    rows = recognizer.transcribe_tokens(values)
    assert [joined(row) for row in rows] == recognizer.transcribe(values)
    assert rows[2] == []
    assert len(rows[0]) > 3
    symbols = torch.tensor([[0, *(config.alphabet.index(token.text) + 1 for token in rows[0])]])
    whole = recognizer._decode(symbols, recognizer.memory(Padded(values.values[:1], values.lengths[:1])))
    scores = whole.log_softmax(-1)[0, :-1].gather(-1, symbols[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([token.logprob for token in rows[0]]), scores, atol=1e-4, rtol=1e-4)
