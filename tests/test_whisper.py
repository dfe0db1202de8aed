"""A speech tokenizer that starts from a Whisper checkpoint, here a tiny random one written by transformers."""

from pathlib import Path

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from duologue.layers import Padded
from duologue.tokenizer.whisper import from_whisper

TINY = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 80,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("whisper")
    WhisperForConditionalGeneration(WhisperConfig(**TINY)).save_pretrained(path)
    return path


def test_layers_are_whispers(folder: Path) -> None:
    """With one block over everything and Whisper's symmetric padding, our layers are its layers."""
    tokenizer, _ = from_whisper(folder, 2, block_frames=1500)
    encoder = WhisperForConditionalGeneration.from_pretrained(folder).model.encoder.eval()
    assert isinstance(encoder, WhisperEncoder)
    mel = torch.randn(1, 3000, 80)
    with torch.no_grad():
        ours = tokenizer.encoder.encode_frames(Padded.full(mel), tokenizer.encoder.init_state(1)).values
        # Shifted by what causality takes away: conv1 sees 1 frame less of the future, conv2 1 frame of its own rate.
        later = torch.nn.functional.pad(mel.transpose(1, 2), (2, 0))
        x = torch.nn.functional.gelu(torch.nn.functional.conv1d(later, encoder.conv1.weight, encoder.conv1.bias))
        x = torch.nn.functional.pad(x, (2, 0))
        x = torch.nn.functional.conv1d(x, encoder.conv2.weight, encoder.conv2.bias, stride=2)
        x = torch.nn.functional.gelu(x).transpose(1, 2) + encoder.embed_positions.weight
        for layer in encoder.layers[:2]:
            out = layer(x, attention_mask=None)
            x = out[0] if isinstance(out, tuple) else out
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


def test_the_rest_becomes_the_recognizer(folder: Path) -> None:
    tokenizer, recognizer = from_whisper(folder, 1)
    weights = WhisperForConditionalGeneration.from_pretrained(folder).model.encoder.state_dict()
    assert len(recognizer.layers) == 2
    torch.testing.assert_close(recognizer.layers.state_dict()["1.fc1.weight"], weights["layers.2.fc1.weight"])
    torch.testing.assert_close(recognizer.layer_norm.weight, weights["layer_norm.weight"])
    torch.testing.assert_close(recognizer.embed_positions2.weight, tokenizer.encoder.embed_positions.weight[:375])
    codes = tokenizer(Padded.full(torch.randn(1, 16000)))
    assert codes.lengths.tolist() == [13]


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="can be cut after 1 to 2 layers"):
        from_whisper(folder, 3)
    with pytest.raises(ValueError, match=r"config\.json"):
        from_whisper(tmp_path, 1)
    (tmp_path / "config.json").write_text('{"model_type": "glm"}')
    with pytest.raises(ValueError, match="holds a 'glm' model"):
        from_whisper(tmp_path, 1)
