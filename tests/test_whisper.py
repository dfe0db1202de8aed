"""A speech tokenizer that starts from a whole Whisper folder, here a tiny random one written by transformers."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import WhisperForConditionalGeneration

from duologue.cli import main
from duologue.layers import Padded
from duologue.tokenizer.ctranslate2 import convert_whisper_ct2
from duologue.tokenizer.encoder import pool
from duologue.tokenizer.quantizer import QuantizerConfig
from duologue.tokenizer.speech_recognizer import (
    WhisperText,
    load_speech_recognizer,
    prune_text,
    save_speech_recognizer,
)
from duologue.tokenizer.whisper import WhisperFolder, WhisperTeacher, from_whisper
from recipes.pocket.whisper import write_random_whisper


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration.from_pretrained(folder).eval()


def test_layers_are_whispers(folder: Path, reference: WhisperForConditionalGeneration) -> None:
    """With one block over everything and Whisper's symmetric padding, our layers are its layers."""
    tokenizer, _ = from_whisper(WhisperFolder.open(folder), 2, block_frames=1500)
    encoder = reference.model.encoder
    mel = torch.randn(1, 3000, 80)
    with torch.no_grad():
        ours = tokenizer.encoder.encode_frames(Padded.full(mel), tokenizer.encoder.init_state(1)).values
        # Shifted by what causality takes away: conv1 sees 1 frame less of the future, conv2 1 frame of its own rate.
        later = functional.pad(mel.transpose(1, 2), (2, 0))
        x = functional.gelu(functional.conv1d(later, encoder.conv1.weight, encoder.conv1.bias))
        x = functional.gelu(functional.conv1d(functional.pad(x, (2, 0)), encoder.conv2.weight, encoder.conv2.bias, 2))
        x = x.transpose(1, 2) + encoder.embed_positions.weight
        for layer in encoder.layers[:2]:
            out = layer(x, attention_mask=None)
            x = out[0] if isinstance(out, tuple) else out
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


def test_the_teacher_is_whispers_encoder(folder: Path, reference: WhisperForConditionalGeneration) -> None:
    teacher = WhisperTeacher(WhisperFolder.open(folder)).eval()
    wav = Padded.full(0.1 * torch.randn(1, 480_000))
    with torch.no_grad():
        wanted = reference.model.encoder(teacher.features(wav).values.transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(teacher(wav).values, pool(wanted), atol=1e-4, rtol=1e-4)
    short = wav.values[:, :20_000]
    alone = teacher(Padded.full(short))
    padded = teacher(Padded.stack([short[0], wav.values[0, :41_000]]))
    torch.testing.assert_close(padded.values[:1, : alone.values.shape[1]], alone.values, atol=1e-4, rtol=1e-4)


def test_the_text_decoder_is_whispers(folder: Path, reference: WhisperForConditionalGeneration) -> None:
    """Teacher forcing equals transformers', and greedy decoding with a cache takes the most likely id of each step."""
    opened = WhisperFolder.open(folder)
    _, recognizer = from_whisper(opened, 1)
    recognizer.eval()
    memory, ids = torch.randn(2, 9, 32), torch.randint(0, opened.size("vocab_size"), (2, 7))
    with torch.no_grad():
        hidden = recognizer.decoder(ids, Padded.full(memory))
        wanted = reference.model.decoder(ids, encoder_hidden_states=memory).last_hidden_state
        torch.testing.assert_close(hidden, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(recognizer.decoder.logits(hidden), reference.proj_out(wanted), atol=1e-4, rtol=1e-4)
    text = opened.text()
    ragged = Padded(memory, torch.tensor([9, 4]))
    prompt, none = torch.tensor(text.prompt()), torch.tensor([], dtype=torch.int64)
    scored = recognizer.decoder.greedy(prompt, ragged, text.end, none, torch.tensor([6, 3]))
    rows = [[own for own, _ in row] for row in scored]
    assert [len(row) <= limit for row, limit in zip(rows, (6, 3), strict=True)] == [True, True]
    for row, length, content in zip(rows, (9, 4), memory, strict=True):
        known = torch.tensor([*text.prompt(), *row])[None]
        with torch.no_grad():
            scores = recognizer.decoder.logits(recognizer.decoder(known, Padded.full(content[None, :length])))
        assert scores[0, len(prompt) - 1 : -1].argmax(-1).tolist() == row
        best = scores[0, len(prompt) - 1 : -1].log_softmax(-1).amax(-1)
        torch.testing.assert_close(torch.tensor([logprob for _, logprob in scored.pop(0)]), best, atol=1e-4, rtol=1e-4)


def test_the_rest_becomes_the_recognizer(folder: Path) -> None:
    opened = WhisperFolder.open(folder)
    tokenizer, recognizer = from_whisper(opened, 1)
    assert len(recognizer.layers) == 2
    torch.testing.assert_close(
        recognizer.layers.state_dict()["1.fc1.weight"], opened.weights["encoder.layers.2.fc1.weight"]
    )
    torch.testing.assert_close(recognizer.layer_norm.weight, opened.weights["encoder.layer_norm.weight"])
    torch.testing.assert_close(recognizer.embed_positions2.weight, tokenizer.encoder.embed_positions.weight[:375])
    codes = tokenizer(Padded.full(torch.randn(1, 16000)))
    assert codes.lengths.tolist() == [13]


def test_padding_is_not_heard(folder: Path) -> None:
    """Losses and transcripts do not change when a batch is padded further, nor what lies behind a row's end."""
    opened = WhisperFolder.open(folder)
    _, recognizer = from_whisper(opened, 1, quantizer=QuantizerConfig(16, normalize=True), num_end=3)
    torch.nn.init.normal_(recognizer.end)
    recognizer.text = opened.text()
    recognizer.eval()
    torch.manual_seed(1)
    values = Padded.stack([torch.randn(n, 32) for n in (5, 9)])
    text = Padded.stack([torch.tensor(recognizer.text.encode(line)) for line in ("it", "it is three")])
    prompts, prosody = torch.tensor([2, 2]), torch.randn(2, 9, 3)
    wider = [
        Padded(functional.pad(x.values, (0, 0) * (x.values.dim() - 2) + (0, 7), value=9), x.lengths)
        for x in (values, text)
    ]
    first = recognizer.losses(values, recognizer.memory(values), text, prompts, prosody)
    second = recognizer.losses(
        wider[0], recognizer.memory(wider[0]), wider[1], prompts, functional.pad(prosody, (0, 0, 0, 7))
    )
    torch.testing.assert_close(first.asr, second.asr)
    torch.testing.assert_close(first.prosody, second.prosody)
    assert recognizer.transcribe(values) == recognizer.transcribe(wider[0])


def test_the_decoder_reads_the_learned_end_behind_each_row(folder: Path) -> None:
    _, recognizer = from_whisper(WhisperFolder.open(folder), 1, num_end=2)
    torch.nn.init.normal_(recognizer.end)
    memory = Padded(torch.randn(2, 6, 32), torch.tensor([6, 3]))
    read = recognizer.readable(memory)
    assert read.lengths.tolist() == [8, 5]
    torch.testing.assert_close(read.values[1, :3], memory.values[1, :3])
    torch.testing.assert_close(read.values[1, 3:5], recognizer.end)
    torch.testing.assert_close(read.values[0, 6:], recognizer.end)
    _, without = from_whisper(WhisperFolder.open(folder), 1)
    assert without.readable(memory) is memory


def test_texts_and_prompts(folder: Path) -> None:
    opened = WhisperFolder.open(folder)
    english = opened.text()
    assert english.decode(english.encode("It is three, 你好!")) == "It is three, 你好!"
    multilingual = WhisperText(folder / "tokenizer.json", 51865)
    assert len(multilingual.prompt("zh")) == len(english.prompt()) + 2
    assert multilingual.prompt("zh") != multilingual.prompt("en")
    with pytest.raises(ValueError, match=r"no id for '<\|xx\|>'"):
        multilingual.prompt("xx")


def test_text_ids_that_are_not_used_can_be_dropped(folder: Path, tmp_path: Path) -> None:
    _, whole = from_whisper(WhisperFolder.open(folder), 1)
    whole.eval()
    said = "what is the capital of france"
    small = prune_text(whole, [said])
    ids = small.text.encode(said)
    assert [small.text.kept[own] for own in ids] == whole.text.encode(said)
    assert len(small.text.kept) < whole.config.vocab_size
    assert [small.text.kept[own] for own in small.text.prompt()] == whole.text.prompt()
    assert small.text.decode(ids[len(small.text.prompt()) : -1]) == said
    frequent = whole.text.pruned([f"{said} {said}", "where"], most=len(set(ids[len(small.text.prompt()) : -1])))
    assert frequent.kept == small.text.kept
    memory = Padded.full(torch.randn(1, 6, whole.config.width))
    hidden = [one.decoder(torch.tensor([one.text.encode(said)]), memory) for one in (whole, small)]
    torch.testing.assert_close(*hidden)
    scores = [one.decoder.logits(state) for one, state in zip((whole, small), hidden, strict=True)]
    torch.testing.assert_close(scores[0][..., small.text.kept], scores[1])
    save_speech_recognizer(tmp_path / "whole", whole)
    save_speech_recognizer(tmp_path / "small", small, torch.int8)
    read = load_speech_recognizer(tmp_path / "small")
    assert read.text.kept == small.text.kept
    assert read.text.special == small.text.special
    assert read.text.encode(said) == ids
    assert read.text.decode(ids) == small.text.decode(ids)
    names = [
        json.loads((tmp_path / name / "tokenizer.json").read_text())["model"]["vocab"] for name in ("small", "whole")
    ]
    assert len(names[0]) < len(names[1])
    values = Padded.full(torch.randn(2, 5, whole.config.width))
    assert len(read.transcribe(values)) == 2
    (tmp_path / "small" / "text_ids.json").write_text('{"vocab_size": 100, "kept": [1, 2]}')
    with pytest.raises(ValueError, match=r"text_ids\.json does not hold the \d+ text ids"):
        load_speech_recognizer(tmp_path / "small")


def test_refusals(folder: Path, tmp_path: Path) -> None:
    opened = WhisperFolder.open(folder)
    with pytest.raises(ValueError, match="can be cut after 1 to 2 layers"):
        from_whisper(opened, 3)
    with pytest.raises(ValueError, match=r"config\.json"):
        WhisperFolder.open(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "glm"}')
    with pytest.raises(ValueError, match="holds a 'glm' model"):
        WhisperFolder.open(tmp_path)
    del opened.weights["encoder.conv1.bias"]
    with pytest.raises(ValueError, match=r"no weight 'encoder\.conv1\.bias'"):
        from_whisper(opened, 1)


def _write_ct2(folder: Path, out: Path, dtype: type[np.generic] = np.float16) -> Path:
    """The folder's weights as CTranslate2 writes them."""
    weights = {key: value.numpy() for key, value in WhisperFolder.open(folder).weights.items()}
    variables: dict[str, np.ndarray] = {"decoder/alignment_layer": np.array(-1, np.int16)}
    for side, heads in (("encoder", 2), ("decoder", 2)):
        variables[f"{side}/num_heads"] = np.array(heads, np.int16)
        variables[f"{side}/position_encodings/encodings"] = weights[f"{side}.embed_positions.weight"]
        norms = [("layer_norm", "layer_norm")]
        for n in range(3 if side == "encoder" else 2):
            ours, theirs = f"{side}.layers.{n}", f"{side}/layer_{n}"
            norms += [
                (f"layers.{n}.self_attn_layer_norm", f"layer_{n}/self_attention/layer_norm"),
                (f"layers.{n}.final_layer_norm", f"layer_{n}/ffn/layer_norm"),
            ]
            for key, linear in (("fc1", "linear_0"), ("fc2", "linear_1")):
                for kind in ("weight", "bias"):
                    variables[f"{theirs}/ffn/{linear}/{kind}"] = weights[f"{ours}.{key}.{kind}"]
            blocks = [("self_attn", "self_attention", (("q_proj", "k_proj", "v_proj"), ("out_proj",)))]
            if side == "decoder":
                norms.append((f"layers.{n}.encoder_attn_layer_norm", f"layer_{n}/attention/layer_norm"))
                blocks.append(("encoder_attn", "attention", (("q_proj",), ("k_proj", "v_proj"), ("out_proj",))))  # type: ignore[arg-type]
            for block, name, linears in blocks:
                for i, keys in enumerate(linears):
                    for kind in ("weight", "bias"):
                        zero = np.zeros(32, np.float32)
                        parts = [weights.get(f"{ours}.{block}.{key}.{kind}", zero) for key in keys]
                        variables[f"{theirs}/{name}/linear_{i}/{kind}"] = np.concatenate(parts)
        for key, name in norms:
            variables[f"{side}/{name}/gamma"] = weights[f"{side}.{key}.weight"]
            variables[f"{side}/{name}/beta"] = weights[f"{side}.{key}.bias"]
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            variables[f"encoder/{conv}/{kind}"] = weights[f"encoder.{conv}.{kind}"]
    variables["decoder/embeddings/weight"] = weights["decoder.embed_tokens.weight"]

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    types = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}
    data = struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, value in variables.items():
        value = value.astype(dtype) if value.dtype == np.float32 else value
        data += string(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        data += struct.pack("<BI", types[str(value.dtype)], value.nbytes) + value.tobytes()
    out.mkdir()
    (out / "model.bin").write_bytes(data + struct.pack("<I", 0))
    (out / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    return out


def test_ctranslate2_folders_are_converted(folder: Path, tmp_path: Path) -> None:
    sizes = convert_whisper_ct2(_write_ct2(folder, tmp_path / "ct2"), tmp_path / "out")
    assert sizes["encoder_layers"] == 3
    assert sizes["d_model"] == 32
    original, converted = WhisperFolder.open(folder), WhisperFolder.open(tmp_path / "out")
    assert converted.weights.keys() == original.weights.keys() - {"proj_out.weight"}
    for key, value in converted.weights.items():
        torch.testing.assert_close(value, original.weights[key], atol=2e-3, rtol=2e-3, msg=key)
    _, info = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer, _ = from_whisper(converted, 2)
    assert tokenizer(Padded.full(torch.randn(1, 16000))).lengths.tolist() == [13]


def test_the_command_converts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _write_ct2(folder, tmp_path / "ct2")
    assert main(["convert", "whisper-ct2", str(source), "-o", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["d_model"] == 32
    assert main(["convert", "whisper-ct2", str(tmp_path / "none"), "-o", str(tmp_path / "out")]) == 2
    assert "tokenizer.json is missing" in capsys.readouterr().err


def test_bad_ctranslate2_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    good = _write_ct2(folder, tmp_path / "good")
    with pytest.raises(ValueError, match="quantized to torch.int8"):
        convert_whisper_ct2(_write_ct2(folder, tmp_path / "int8", np.int8), tmp_path / "out")
    weights = (good / "model.bin").read_bytes()
    (good / "model.bin").write_bytes(weights[:-1000])
    with pytest.raises(ValueError, match="is cut short"):
        convert_whisper_ct2(good, tmp_path / "out")
    (good / "model.bin").write_bytes(b"PK\x03\x04" + weights)
    with pytest.raises(ValueError, match="no CTranslate2 Whisper model"):
        convert_whisper_ct2(good, tmp_path / "out")
    (good / "model.bin").unlink()
    with pytest.raises(ValueError, match=r"model\.bin is missing"):
        convert_whisper_ct2(good, tmp_path / "out")
    (good / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        convert_whisper_ct2(good, tmp_path / "out")
