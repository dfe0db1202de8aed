"""Equality with the released code on its fixtures: speech tokenizer, language model, prompts, text tokenizer."""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from duologue import rates
from duologue.audio import LogMel
from duologue.interleave import Kind
from duologue.layers import Padded
from duologue.released.convert import convert
from duologue.released.language import load_released_language
from duologue.released.text import RELEASED_TEMPLATE, load_released_vocabulary
from duologue.released.tokenizer import ReleasedSpeechTokenizer, load_released_tokenizer, resample_released
from duologue.turns import Conversation, Modality, Role, Turn
from duologue.vocabulary import Vocabulary
from tests.parity import PARITY, RELEASED, assert_close, facts, params, tensors
from tests.released_prompts import released_ids, released_prompt

TEXTS = RELEASED / "9b" / "expected_text_ids.json"
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Makes the folder of a fixture in the released format, once."""
    root = tmp_path_factory.mktemp("released")
    return cache(lambda name: _WRITERS[name](root / name))


def write_tokenizer(folder: Path) -> Path:
    fixture = facts("tokenizer.json")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "whisper", **fixture["config"]}))
    (folder / "preprocessor_config.json").write_text(json.dumps(fixture["feature_extractor"]))
    shutil.copyfile(PARITY / fixture["state_file"], folder / "model.safetensors")
    return folder


def write_language(folder: Path) -> Path:
    fixture = facts("llm.json")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "chatglm", **fixture["config"]}))
    shutil.copyfile(PARITY / fixture["state_file"], folder / "model.safetensors")
    return folder


def write_text_tokenizer(folder: Path) -> Path:
    """The small text tokenizer with its added tokens moved to where the prompts' fixture has them."""
    fixture = facts("prompts.json")
    folder.mkdir()
    shutil.copyfile(RELEASED / "9b" / "tokenizer.model", folder / "tokenizer.model")
    entries = json.loads((RELEASED / "9b" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    names = {int(token): entry["content"] for token, entry in entries.items()}
    end = next(token for token, name in names.items() if name == fixture["end_token"])
    moved = {t + fixture["end_token_id"] - end: n for t, n in names.items() if not n.startswith("<|audio_")}
    strings = " ".join(turn["expected_prompt"] + turn["completion"] for c in fixture["cases"] for turn in c["turns"])
    num_codes = 1 + max([0, *(int(code) for code in re.findall(r"<\|audio_(\d+)\|>", strings))])
    moved |= {fixture["audio_token_0_id"] + code: f"<|audio_{code}|>" for code in range(num_codes)}
    (folder / "added_tokens.json").write_text(json.dumps({name: token for token, name in moved.items()}))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"padded_vocab_size": max(moved) + 100}))
    return folder


_WRITERS: dict[str, Callable[[Path], Path]] = {
    "tokenizer": write_tokenizer,
    "language": write_language,
    "text": write_text_tokenizer,
}


@cache
def load_tokenizer(folder: Path) -> ReleasedSpeechTokenizer:
    return load_released_tokenizer(folder)


@cache
def load_language(folder: Path) -> PreTrainedModel:
    return load_released_language(folder, "float32")


@cache
def load_vocabulary(folder: Path) -> Vocabulary:
    return load_released_vocabulary(folder)


def check_tokenizer(folders: Folders, name: str) -> None:
    fixture, stored = facts("tokenizer.json"), tensors(facts("tokenizer.json")["cases_file"])
    tokenizer, tolerance = load_tokenizer(folders("tokenizer")), fixture["tolerance"]
    case = next(case for case in fixture["cases"] if case["name"] == name)
    count, sample_rate = len(case["n_samples"]), case["sample_rate"]
    waves = [stored[f"{name}.wave_int16.{i}"].numpy() for i in range(count)]
    wavs = [(wave / np.float32(32768)).astype(np.float32) for wave in waves]
    pieces = []
    for index, wav in enumerate(wavs):
        channel = torch.from_numpy(wav[0] if wav.ndim == 2 else wav)
        heard = resample_released(channel, sample_rate, rates.LISTEN_SAMPLE_RATE)
        if f"{name}.resampled.{index}" in stored:
            assert_close(heard, stored[f"{name}.resampled.{index}"], 1e-6)
        pieces += heard.split(tokenizer.piece_samples)
    with torch.inference_mode():
        ours = tokenizer.encode_pieces(pieces)

    # Near the clip level a float32 spectrum is uncertain by about the tolerance, the stored one too: where that is off
    # the exact one by more than half of it, ours may be off the stored one by twice as much.
    padded = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True).double()
    padded = torch.nn.functional.pad(padded, (0, -padded.shape[1] % rates.SAMPLES_PER_TOKEN))
    exact = LogMel(tokenizer.config.features).double()(Padded.full(padded)).values.transpose(1, 2)
    stride = next((int(m[1]) for key in stored if (m := re.fullmatch(rf"{name}\.log_mel_every_(\d+)th_frame", key))), 1)
    expected_mel = stored[f"{name}.log_mel" if stride == 1 else f"{name}.log_mel_every_{stride}th_frame"]
    mel = ours.log_mel.transpose(1, 2)
    assert list(mel.shape) == case["mel_shape"]
    uncertain = float((expected_mel - exact[:, :, ::stride]).abs().max())
    assert uncertain < 2 * tolerance["log_mel_abs"]
    assert_close(mel[:, :, ::stride], expected_mel, max(tolerance["log_mel_abs"], 2 * uncertain))

    hidden = stored[f"{name}.hidden_before_vq"]
    assert_close(ours.hidden, hidden, tolerance["hidden_abs"], tolerance["hidden_rel"])
    mask = stored[f"{name}.mel_attention_mask"].bool()[:, :: rates.MEL_FRAMES_PER_TOKEN]
    assert torch.equal(ours.quantized.codes.mask, mask)
    (bound,) = re.findall(r"> *([0-9.e-]+)", tolerance["token_ids"])
    ids, expected = ours.quantized.codes.values, stored[f"{name}.all_token_ids_incl_padding"]
    certain = stored[f"{name}.l2sq_margin"] > float(bound)
    assert torch.equal(ids[certain], expected[certain].long())
    nearest = torch.cdist(hidden, tokenizer.quantizer.codebook.weight[None]).topk(2, largest=False).indices
    assert bool((nearest == ids[:, :, None]).any(-1).all())

    whole = tokenizer.tokenize(wavs, [sample_rate] * count, resampler="released")
    flat = torch.cat(whole)
    assert [len(row) for row in whole] == case["n_tokens"]
    assert torch.equal(flat, ids[mask])
    sure = certain[mask]
    assert torch.equal(flat[sure], torch.cat([stored[f"{name}.token_ids.{i}"] for i in range(count)]).long()[sure])


def check_language(folders: Folders, name: str) -> None:
    fixture, stored = facts("llm.json"), tensors(facts("llm.json")["cases_file"])
    model, tolerance = load_language(folders("language")), fixture["tolerance"]
    ids = stored["full.input_ids"].long()
    allowed = tolerance["logits_abs"], tolerance["logits_rel"]
    with torch.inference_mode():
        if name == "full":
            assert_close(model(input_ids=ids).logits, stored["full.logits"], *allowed)
        elif name == "step":
            cache = model(input_ids=ids, use_cache=True).past_key_values
            new, positions = stored["step.input_ids"].long(), stored["step.position_ids"].long()
            output = model(input_ids=new, position_ids=positions, past_key_values=cache)
            assert_close(output.logits, stored["step.logits"], *allowed)
        elif name == "padded":
            output = model(
                input_ids=ids,
                attention_mask=stored["padded.attention_mask"].long(),
                position_ids=stored["padded.position_ids"].long(),
            )
            assert_close(output.logits[1:, fixture["pad"] :], stored["padded.logits_row1_valid"], *allowed)
        elif name == "greedy":
            new_ids = stored["greedy.new_ids"].long()
            row = ids[:1]
            for _ in new_ids:
                row = torch.cat([row, model(input_ids=row).logits[:, -1:].argmax(-1)], 1)
            assert torch.equal(row[0, ids.shape[1] :], new_ids)
        else:
            pytest.fail(f"no check knows the case {name!r}")


def check_prompts(folders: Folders, name: str) -> None:
    fixture = facts("prompts.json")
    case = next(case for case in fixture["cases"] if case["name"] == name)
    vocabulary = load_vocabulary(folders("text"))
    assert vocabulary.template == RELEASED_TEMPLATE
    assert vocabulary.template.speech_instruction == fixture["system_prompt_audio"]
    assert vocabulary.template.text_instruction == fixture["system_prompt_text"]
    assert vocabulary.speech_offset == fixture["audio_token_0_id"]
    assert vocabulary.end_id == fixture["end_token_id"]
    previous = completion = ""
    conversation = Conversation()
    same = True  # until something that the released code does to its string and ids do not do
    for turn in case["turns"]:
        user, expected = turn["user"], turn["expected_prompt"]
        prompt = released_prompt(user, previous, completion)
        assert prompt == expected
        ids = released_ids(vocabulary, prompt)
        assert vocabulary.render(ids) == "[gMASK]<sop>" + expected
        spoken = not isinstance(user, str)
        assert spoken == (turn["mode"] == "audio")
        if not spoken:
            # Markers in a text act there; line breaks at its beginning become one token with the break before them.
            same = same and "<|" not in user and re.match(r"\s*[\r\n]", user) is None
        if same:
            said = vocabulary.speech_ids(user) if spoken else vocabulary.encode_text(user)
            conversation = conversation.plus(Turn(Role.USER, Modality.SPEECH if spoken else Modality.TEXT, tuple(said)))
            assert vocabulary.prompt_ids(conversation) == ids
        previous, completion = prompt, turn["completion"]
        # Blanks at the end of a reply are lost there, with an empty one even the line break before it.
        reply = vocabulary.tokenizer.encode(completion.rstrip(), add_special_tokens=False).ids
        same = same and bool(reply) and re.match(r"\s*[\r\n]", completion) is None
        same = same and all(vocabulary.kind(token) in (Kind.TEXT, Kind.SPEECH) for token in reply)
        if same:
            conversation = conversation.plus(Turn(Role.ASSISTANT, Modality.INTERLEAVED, tuple(reply)))


def check_texts(folders: Folders, name: str) -> None:
    expected = json.loads(TEXTS.read_text(encoding="utf-8"))
    vocabulary = load_vocabulary(RELEASED / "9b")
    assert vocabulary.speech_offset == expected["audio_0"]
    assert vocabulary.codebook_size == expected["codebook_size"]
    assert vocabulary.size == expected["padded_vocab_size"]
    group, _, number = name.rpartition("_")
    case = expected[group][int(number)]
    if group == "plain":
        assert vocabulary.encode_text(case["text"]) == case["ids"]
        assert vocabulary.decode_text(case["ids"]) == case["text"]
    else:
        assert vocabulary.tokenizer.encode(case["text"], add_special_tokens=False).ids == case["ids"]
        assert released_ids(vocabulary, case["text"]) == expected["prefix"] + case["ids"]


def text_cases() -> list[str]:
    if not TEXTS.exists():
        return []
    expected = json.loads(TEXTS.read_text(encoding="utf-8"))
    return [f"{group}_{i}" for group in ("plain", "with_special") for i in range(len(expected[group]))]


def language_cases() -> list[str]:
    if not facts("llm.json"):
        return []
    return sorted({key.split(".")[0] for key in tensors(facts("llm.json")["cases_file"])})


@pytest.mark.parametrize(
    ("check", "name"),
    [
        *params("tokenizer", (case["name"] for case in facts("tokenizer.json").get("cases", ())), check_tokenizer),
        *params("llm", language_cases(), check_language),
        *params("prompts", (case["name"] for case in facts("prompts.json").get("cases", ())), check_prompts),
        *params("expected_text_ids", text_cases(), check_texts),
    ],
)
def test_parity(check: Callable[[Folders, str], None], name: str, folders: Folders) -> None:
    check(folders, name)


@pytest.mark.skipif(not RELEASED.is_dir(), reason="there are no released format folders: see tests/parity.py")
def test_parity_of_a_converted_folder_in_plain_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert(RELEASED / "9b", tmp_path / "native")
    ours = load_released_language(RELEASED / "9b")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "native")
    expected = json.loads(TEXTS.read_text(encoding="utf-8"))["with_special"][0]
    ids = tokenizer(expected["text"], return_tensors="pt")["input_ids"]
    assert ids[0, 2:].tolist() == expected["ids"]
    assert type(theirs).__name__ == "GlmForCausalLM"
    with torch.inference_mode():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)
