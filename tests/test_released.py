"""Folders in the released formats, made here with random weights: reading, converting, and what is said of bad ones."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from duologue.audio import LogMelConfig
from duologue.interleave import Kind
from duologue.language.engine import PlainEngine
from duologue.language.sampling import Sampling
from duologue.layers import Padded
from duologue.memory import estimate
from duologue.quantization import check_available, quantize
from duologue.released.convert import PROGRESS_FILE, convert
from duologue.released.language import chatglm_shapes, load_released_language, read_config
from duologue.released.random_weights import ReleasedLanguageSizes, write_random_language, write_random_tokenizer
from duologue.released.text import load_released_vocabulary, read_ranks
from duologue.released.tokenizer import ReleasedSpeechTokenizer, load_released_tokenizer, released_shapes
from duologue.released.weights import LABEL, header_bytes
from duologue.tokenizer.encoder import EncoderConfig
from duologue.tokenizer.quantizer import QuantizerConfig
from duologue.tokenizer.tokenizer import SpeechTokenizerConfig
from duologue.vocabulary import Vocabulary
from tests.released_prompts import released_prompt

ROOT = Path(__file__).parent.parent
LISTEN = LogMelConfig(128, floor="utterance")
PUBLISHED = SpeechTokenizerConfig(LISTEN, EncoderConfig(128, 1280, 20, 5120, 16, 200, 1500), QuantizerConfig(16384))
SMALL = SpeechTokenizerConfig(LISTEN, EncoderConfig(128, 32, 2, 64, 2, 200, 1500), QuantizerConfig(64))
SIZES = ReleasedLanguageSizes(32, 2, 2, 1, 16, 64, 1024, codebook_size=64, num_ranks=400, first_speech=24)
SHARD_BYTES = 40_000


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    write_random_tokenizer(tmp_path / "tokenizer", SMALL)
    return tmp_path / "tokenizer"


@pytest.fixture
def language_folder(tmp_path: Path) -> Path:
    write_random_language(tmp_path / "9b", SIZES, max_shard_bytes=SHARD_BYTES)
    return tmp_path / "9b"


def edit(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; None takes a key away."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


# Sizes.


def test_the_published_tokenizer_has_343_599_360_parameters() -> None:
    with torch.device("meta"):
        module = ReleasedSpeechTokenizer(PUBLISHED)
    assert sum(parameter.numel() for parameter in module.parameters()) == 343_599_360
    assert released_shapes(module)["embed_positions2.weight"] == (375, 1280)


def test_the_published_language_model_has_9_54_billion_parameters_and_its_ids(tmp_path: Path) -> None:
    sizes = ReleasedLanguageSizes()
    assert sizes.num_rows == 168960
    assert sizes.num_ranks + sizes.first_speech == 152353
    total = sum(torch.Size(shape).numel() for shape in published_shapes(tmp_path).values())
    assert round(total / 1e9, 2) == 9.54


def published_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Writes the published config and gives its weights."""
    sizes = ReleasedLanguageSizes()
    write_random_language(folder / "small", SIZES)
    edit(
        folder / "small" / "config.json",
        hidden_size=sizes.width,
        num_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        multi_query_group_num=sizes.num_kv_heads,
        kv_channels=sizes.head_dim,
        ffn_hidden_size=sizes.ffn_dim,
        padded_vocab_size=sizes.num_rows,
        seq_length=sizes.seq_length,
    )
    return chatglm_shapes(read_config(folder / "small"))


# Reading.


def test_both_key_layouts_of_the_tokenizer_are_read(tokenizer_folder: Path) -> None:
    wav = torch.randn(1, 30_000, generator=torch.Generator().manual_seed(0))
    plain = load_released_tokenizer(tokenizer_folder)
    weights = load_file(tokenizer_folder / "model.safetensors")
    width = SMALL.encoder.width
    other = {f"model.encoder.{key}": value for key, value in weights.items() if not key.startswith("ema_")}
    other["model.encoder.layer_norm.weight"] = torch.ones(width)
    other["model.encoder.layers.2.fc1.bias"] = torch.ones(64)  # behind the quantizer
    other["model.decoder.embed_tokens.weight"] = torch.ones(4, width)
    save_file(other, tokenizer_folder / "model.safetensors")
    edit(tokenizer_folder / "config.json", encoder_layers=4)
    prefixed = load_released_tokenizer(tokenizer_folder)
    with torch.inference_mode():
        ours, theirs = (module(Padded.full(wav)).values for module in (plain, prefixed))
    assert torch.equal(ours, theirs)
    assert json.loads((tokenizer_folder / "config.json").read_text())[LABEL] is True


def tiktoken_ids(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's own rule for one piece, written out: merge the neighbours of lowest joint rank, from the left."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        joint = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not joint:
            return [ranks[part] for part in parts]
        _, i = min(joint)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_text_ids_are_those_of_tiktoken(language_folder: Path) -> None:
    vocabulary = load_released_vocabulary(language_folder)
    ranks = read_ranks(language_folder / "tokenizer.model")
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        letters = torch.randint(ord("a"), ord("h"), (12,), generator=generator).tolist()
        piece = "".join(map(chr, letters))  # one piece: letters alone are never cut
        assert vocabulary.encode_text(piece) == tiktoken_ids(piece.encode(), ranks)


def test_user_text_never_becomes_a_control_or_a_speech_token(language_folder: Path) -> None:
    vocabulary = load_released_vocabulary(language_folder)
    text = "<|user|> <|audio_3|> [gMASK]<sop> <|end_of_audio|>"
    ids = vocabulary.encode_text(text)
    assert {vocabulary.kind(token) for token in ids} == {Kind.TEXT}
    assert vocabulary.decode_text(ids) == text
    assert "<|system|>" in released_prompt("hello", template=vocabulary.template)


def test_padding_and_controls_are_never_sampled(language_folder: Path) -> None:
    vocabulary = load_released_vocabulary(language_folder)
    model = load_released_language(language_folder, "float32")
    with torch.no_grad():  # they would be by far the likeliest
        forbidden = [i for i in range(vocabulary.size) if vocabulary.kind(i) in (Kind.PADDING, Kind.CONTROL)]
        model.lm_head.weight[forbidden] = model.lm_head.weight.abs().max() * 50
    assert len(forbidden) > 20
    engine = PlainEngine(model, vocabulary)
    ids = list(engine.stream([1, 2, 3], Sampling(temperature=2.0, top_p=1.0, max_tokens=60)))
    assert {vocabulary.kind(token) for token in ids} <= {Kind.TEXT, Kind.SPEECH, Kind.END}


# Converting.


def test_a_conversion_goes_on_where_it_stopped_and_plain_transformers_reads_it(
    language_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "native"
    done: list[str] = []

    def stop(name: str) -> None:
        done.append(name)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(language_folder, out, after_shard=stop)
    assert len(done) == 1
    assert not (out / "config.json").exists()  # half a conversion is no model
    before = (out / done[0]).stat().st_mtime_ns
    later: list[str] = []
    convert(language_folder, out, after_shard=later.append)
    assert (out / done[0]).stat().st_mtime_ns == before
    assert len(later) >= 2
    assert done[0] not in later
    assert not (out / PROGRESS_FILE).exists()

    ours, theirs = load_released_language(language_folder), AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([[1, 2, 3, 4, 300]])
    with torch.inference_mode():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    vocabulary = Vocabulary.load(out)
    assert vocabulary.hash == load_released_vocabulary(language_folder).hash
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"][2:] == vocabulary.encode_text("abc")
    with pytest.raises(ValueError, match="is not empty; give a new folder"):
        convert(language_folder, out)


def test_a_conversion_changes_the_dtype_when_asked(language_folder: Path, tmp_path: Path) -> None:
    convert(language_folder, tmp_path / "native", "float16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert model.dtype == torch.float16
    wanted = load_released_language(language_folder, "float16").state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())


def test_a_half_done_folder_of_other_weights_is_refused(language_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "native"
    out.mkdir()
    (out / PROGRESS_FILE).write_text(json.dumps({"version": 1, "dtype": None, "source": {}}))
    with pytest.raises(ValueError, match="holds a conversion of other weights"):
        convert(language_folder, out)


@pytest.mark.slow
def test_converting_takes_less_memory_than_the_largest_shard(tmp_path: Path) -> None:
    sizes = ReleasedLanguageSizes(1024, 1, 8, 1, 128, 2048, 1024, codebook_size=16384, num_ranks=40000)
    write_random_language(tmp_path / "9b", sizes, max_shard_bytes=10**8)
    largest = max(path.stat().st_size for path in (tmp_path / "9b").glob("*.safetensors"))
    assert largest > 10**8
    program = (
        "import resource, sys; from duologue.released.convert import convert\n"
        "from transformers import GlmConfig, GlmForCausalLM\n"  # whose memory is not that of the conversion
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "convert(sys.argv[1], sys.argv[2])\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "9b"), str(tmp_path / "native")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT / "src")
    assert int(result.stdout) < 1.5 * largest


# Quantization.


def test_a_missing_library_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bitsandbytes", "torchao"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, f"{name}.quantization", None)
    with pytest.raises(ValueError, match="int8 on the device 'cuda' needs bitsandbytes"):
        check_available("int8", torch.device("cuda"))
    with pytest.raises(ValueError, match="int8 on the device 'cpu' needs torchao"):
        check_available("int8", torch.device("cpu"))
    with pytest.raises(ValueError, match="unknown quantization 'int2'; the choices are int8, int4"):
        check_available("int2", torch.device("cpu"))


@pytest.mark.parametrize(("scheme", "error"), [("int8", 0.01), ("int4", 0.1)])
def test_quantized_layers_come_close_to_the_plain_ones(language_folder: Path, scheme: Any, error: float) -> None:
    pytest.importorskip("torchao")
    plain = load_released_language(language_folder, "float32")
    quantized = load_released_language(language_folder, "float32", quantization=scheme)
    assert type(quantized.model.layers[0].mlp.down_proj.weight.data) is not torch.Tensor
    assert type(quantized.lm_head.weight.data) is torch.Tensor
    x = torch.randn(4, SIZES.ffn_dim, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = (model.model.layers[0].mlp.down_proj(x) for model in (quantized, plain))
        assert 0 < float((ours - theirs).norm() / theirs.norm()) < error
        assert bool(torch.isfinite(quantized(torch.arange(12)[None]).logits).all())


def test_int4_says_which_layer_has_rows_that_do_not_fit() -> None:
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match="has rows of 40 values, but int4 needs a multiple of 32: use int8"):
        quantize(torch.nn.Sequential(torch.nn.Linear(40, 8)), "int4")


# The doctor's arithmetic, on sparse files of full size.


def test_memory_is_told_from_headers_of_full_size(tmp_path: Path) -> None:
    shapes = published_shapes(tmp_path)
    language, tokenizer = tmp_path / "model" / "9b", tmp_path / "model" / "tokenizer"
    language.mkdir(parents=True)
    tokenizer.mkdir()
    (tmp_path / "small" / "config.json").rename(language / "config.json")
    with torch.device("meta"):
        listen = released_shapes(ReleasedSpeechTokenizer(PUBLISHED))
    for folder, weights, dtype in ((language, shapes, torch.bfloat16), (tokenizer, listen, torch.float32)):
        header = header_bytes(weights, dtype)
        size = len(header) + sum(torch.Size(shape).numel() for shape in weights.values()) * dtype.itemsize
        with (folder / "model.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(size)  # sparse: takes no room on the disk
    told = estimate(tmp_path / "model")
    parts = {part.name: part for part in told.parts}
    assert parts["9b"].token_bytes == 40 * 1024
    assert parts["9b"].needed_gb("bfloat16") == pytest.approx(19.08 + 0.34, abs=0.02)
    assert parts["9b"].needed_gb("int8") < 12
    assert parts["9b"].needed_gb("int4") < 8
    assert parts["tokenizer"].needed_gb("int8") == pytest.approx(1.46, abs=0.01)
    assert (told.advise(16, 80).device, told.advise(16, 80).scheme) == ("cuda", "bfloat16")
    assert (told.advise(16, 16).device, told.advise(16, 16).scheme) == ("cuda", "int8")
    assert (told.advise(64).device, told.advise(64).scheme) == ("cpu", "bfloat16")
    assert told.advise(4).device == ""


# Bad folders: one sentence with file and key, before any weight is read.


def truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-10])


def garbage(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].write_bytes(b"no weights at all")


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def remove_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def configure(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **changes)


def with_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Rewrites the last weight file."""

    def apply(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[-1]
        weights = load_file(path)
        change(weights)
        save_file(weights, path)

    return apply


def to_fp8(weights: dict[str, torch.Tensor]) -> None:
    key = max(weights, key=lambda key: weights[key].dim())
    weights[key] = weights[key].to(torch.float8_e4m3fn)


TOKENIZER_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing weights": (remove("model.safetensors"), r"tokenizer/model.safetensors does not exist"),
    "missing config": (remove("config.json"), r"config.json does not exist"),
    "missing features": (remove("preprocessor_config.json"), r"preprocessor_config.json does not exist"),
    "truncated": (truncate, r"model.safetensors is truncated, damaged or no .* file not fully covered"),
    "garbage": (garbage, r"model.safetensors is truncated, damaged or no safetensors file"),
    "another architecture": (configure(model_type="bert"), r"config.json \(model_type 'bert'\) is no speech tokenizer"),
    "plain whisper": (configure(quantize_vocab_size=None), r"with the key 'quantize_vocab_size'"),
    "other causality": (configure(encoder_causal_attention=True), r"encoder_causal_attention is True; only False"),
    "max pooling": (configure(pooling_type="max"), r"pooling_type is 'max'; only 'avg'"),
    "no width": (configure(d_model=None), r"config.json: d_model must be a whole number"),
    "shape": (configure(encoder_ffn_dim=96), r"'layers.0.fc1.weight' has shape \[64, 32\], .* asks for \[96, 32\]"),
    "missing key": (with_weights(lambda w: w.pop("layers.1.fc2.bias")), r"lacks the weight 'layers.1.fc2.bias'"),
    "unexpected key": (with_weights(lambda w: w.update(x=torch.ones(2))), r"holds the unexpected weight 'x'"),
    "fp8": (with_weights(to_fp8), r"weight 'conv\d.weight' is of type F8_E4M3: quantized weights are not read"),
    "quantized": (configure(quantization_config={"bits": 4}), r"config.json has the key 'quantization_config'"),
}  # fmt: skip
LANGUAGE_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing shard": (remove_a_shard, r"model-00002-of-0000\d.safetensors does not exist, but .* puts the weight"),
    "missing config": (remove("config.json"), r"config.json does not exist"),
    "missing ranks": (remove("tokenizer.model"), r"tokenizer.model does not exist"),
    "missing tokens": (remove("tokenizer_config.json"), r"tokenizer_config.json does not exist"),
    "truncated": (truncate, r"of-0000\d.safetensors is truncated, damaged or no .* file not fully covered"),
    "another architecture": (configure(model_type="llama"), r"config.json is of model_type 'llama'"),
    "other norm": (configure(rmsnorm=False), r"rmsnorm is False; only True"),
    "heads": (configure(multi_query_group_num=3), r"num_attention_heads is 2, no multiple of"),
    "shape": (configure(ffn_hidden_size=32), r"h_to_4h.weight' has shape \[128, 32\], .* asks for \[64, 32\]"),
    "layers": (configure(num_layers=3), r"lacks the weight 'transformer.encoder.layers.2.input_layernorm.weight'"),
    "index": (with_weights(lambda w: w.update(x=torch.ones(2))), r"holds the weight 'x', which .* does not put there"),
    "fp8": (with_weights(to_fp8), r"is of type F8_E4M3: quantized weights are not read"),
    "quantized": (configure(quantization_bit=4), r"config.json has the key 'quantization_bit'"),
    "rows": (configure(padded_vocab_size=420), r"has shape \[512, 32\], but the config asks for \[420, 32\]"),
}  # fmt: skip


@pytest.mark.parametrize("fault", TOKENIZER_FAULTS)
def test_a_bad_tokenizer_folder_is_told_in_one_sentence(tokenizer_folder: Path, fault: str) -> None:
    spoil, said = TOKENIZER_FAULTS[fault]
    spoil(tokenizer_folder)
    with pytest.raises(ValueError, match=said) as caught:
        load_released_tokenizer(tokenizer_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", LANGUAGE_FAULTS)
def test_a_bad_language_folder_is_told_in_one_sentence(language_folder: Path, tmp_path: Path, fault: str) -> None:
    spoil, said = LANGUAGE_FAULTS[fault]
    spoil(language_folder)
    with pytest.raises(ValueError, match=said) as caught:
        convert(language_folder, tmp_path / "native")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "native").exists()


def test_text_tokenizers_with_faults_are_refused(language_folder: Path) -> None:
    path = language_folder / "tokenizer_config.json"
    entries = json.loads(path.read_text())["added_tokens_decoder"]
    without = {token: entry for token, entry in entries.items() if entry["content"] != "<|begin_of_audio|>"}
    edit(path, added_tokens_decoder=without)
    with pytest.raises(ValueError, match=r"has no token '<\|begin_of_audio\|>'"):
        load_released_vocabulary(language_folder)
    without = {token: entry for token, entry in entries.items() if entry["content"] != "<|audio_7|>"}
    edit(path, added_tokens_decoder=without)
    with pytest.raises(ValueError, match=r"'<\|audio_7\|>' must have the id 431"):
        load_released_vocabulary(language_folder)
    edit(path, added_tokens_decoder=entries)
    ranks = language_folder / "tokenizer.model"
    ranks.write_bytes(ranks.read_bytes() + b"?? 7\n")
    with pytest.raises(ValueError, match=r"line 401, is not 'base64 rank'"):
        load_released_vocabulary(language_folder)


def test_weights_that_are_not_numbers_are_refused(language_folder: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["transformer.output_layer.weight"][0, 0] = torch.nan

    with_weights(spoil)(language_folder)
    with pytest.raises(ValueError, match=r"'transformer.output_layer.weight' holds values that are not finite"):
        load_released_language(language_folder)
