"""The released text tokenizer: a tiktoken ranks file as byte-level BPE of the tokenizers library.

    tokenizer.model          one `base64(bytes) rank` per line
    tokenizer_config.json    special and speech tokens: `added_tokens_decoder`, id to content
    added_tokens.json        or here, name to id

All ids are looked up by name (docs/checkpoints.md 2.1, 2.1b, 2.2).
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from duologue.config import read_json, write_json
from duologue.interleave import INTERLEAVED
from duologue.text import byte_letters
from duologue.turns import Role
from duologue.vocabulary import (
    CHAT_CONTROLS,
    END_OF_TEXT,
    ROLE_TOKENS,
    ChatTemplate,
    Vocabulary,
    VocabularyConfig,
)

RANKS_FILE = "tokenizer.model"
# GLM-4's pre-tokenization pattern.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
ENDS = (ROLE_TOKENS[Role.USER], END_OF_TEXT, ROLE_TOKENS[Role.OBSERVATION])  # the eos list of the checkpoint


def _released_instruction(modality: str, ending: str) -> str:
    return (
        f"User will provide you with a {modality} instruction. Do it step by step. First, think about the instruction "
        f"and respond in a interleaved manner, with {INTERLEAVED.text_run} text token followed by "
        f"{INTERLEAVED.speech_run} audio tokens.{ending}"
    )


# As web_demo.py of the release has them: the first ends with a blank, the second does not.
RELEASED_TEMPLATE = ChatTemplate(
    role_break="\n",
    speech_instruction=_released_instruction("speech", " "),
    text_instruction=_released_instruction("text", ""),
    reply_marker="streaming_transcription\n",
)


def load_released_vocabulary(folder: str | Path) -> Vocabulary:
    """Loads the joint vocabulary of a released language model.

    Raises:
        ValueError: names file and token: a file is missing or damaged, a control token is missing, the speech tokens
            are not contiguous, or the ids exceed the model's rows.
    """
    folder = Path(folder)
    added, source = read_added_tokens(folder)
    tokenizer = build_tokenizer(read_ranks(folder / RANKS_FILE), added)
    ids = {name: token for token, name in added.items()}
    for name in CHAT_CONTROLS:
        if name not in ids:
            raise ValueError(f"{source} has no token {name!r}")
    if "<|audio_0|>" not in ids:
        raise ValueError(f"{source} has no token '<|audio_0|>'")
    offset = ids["<|audio_0|>"]
    codebook_size = sum(re.fullmatch(r"<\|audio_\d+\|>", name) is not None for name in ids)
    for code in range(codebook_size):
        if ids.get(f"<|audio_{code}|>") != offset + code:
            raise ValueError(
                f"{source}: '<|audio_{code}|>' must have the id {offset + code}: speech tokens must be contiguous"
            )
    config = VocabularyConfig(
        codebook_size=codebook_size,
        speech_offset=offset,
        size=_num_rows(folder, max(ids.values()) + 1),
        controls={name: ids[name] for name in CHAT_CONTROLS},
        ends=ENDS,
        template=RELEASED_TEMPLATE,
    )
    return Vocabulary(tokenizer, config)


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Reads a tiktoken ranks file.

    Raises:
        ValueError: the file is missing, a line is not `base64 rank`, or a byte has no rank.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}, line {number}, is not 'base64 rank': it is no tiktoken ranks file") from None
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise ValueError(f"{path} has no rank for the byte {byte:#04x}: it is damaged")
    if len(set(ranks.values())) != len(ranks):
        raise ValueError(f"{path} gives one rank to several tokens: it is damaged")
    return ranks


def read_added_tokens(folder: Path) -> tuple[dict[int, str], Path]:
    """Returns special and speech tokens, id to name, and their file. Raises ValueError if there are none."""
    path = folder / "tokenizer_config.json"
    entries = read_json(path).get("added_tokens_decoder")
    try:
        if isinstance(entries, dict):
            return {int(token): str(entry["content"]) for token, entry in entries.items()}, path
        path = folder / "added_tokens.json"
        if not path.exists():
            raise ValueError(
                f"{folder / 'tokenizer_config.json'} has no key 'added_tokens_decoder', and there is no {path}"
            )
        return {int(token): str(name) for name, token in read_json(path).items()}, path
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} lacks the id or content of an added token ({error!r})") from None


def build_tokenizer(ranks: Mapping[bytes, int], added: Mapping[int, str]) -> Tokenizer:
    """Returns a fast tokenizer with the ids of tiktoken.

    A piece with a rank is one token. Otherwise the adjacent pair with the lowest joint rank merges first. Every split
    of a token into two tokens is therefore a merge, ordered by rank.

    Raises:
        ValueError: an added token has the id of a rank.
    """
    letters = byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = sorted(
        (rank, ranks[left], ranks[right], spelled[left], spelled[right])
        for token, rank in ranks.items()
        for left, right in ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        if left in ranks and right in ranks
    )
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    taken = set(vocab.values())
    for token, name in added.items():
        if token in taken or name in vocab:
            raise ValueError(f"the added token {name!r} with id {token} is a text token already")
        # As a word of the model it keeps its id; the library would close gaps between ids of added tokens.
        vocab[name] = token
    prefix = [(name, token) for name in RELEASED_TEMPLATE.prefix for token, known in added.items() if known == name]
    specials = [
        {"id": token, "content": name, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for token, name in sorted(added.items())
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    opening = [{"SpecialToken": {"id": name, "type_id": 0}} for name, _ in prefix]
    description: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": specials,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*opening, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [*opening, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in prefix},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": [[left, right] for *_, left, right in merges],
        },
    }
    return Tokenizer.from_str(json.dumps(description, ensure_ascii=False))


def save_for_transformers(vocabulary: Vocabulary, folder: str | Path) -> None:
    """Writes tokenizer and settings for `Vocabulary.load` and transformers' `AutoTokenizer`."""
    folder = Path(folder)
    vocabulary.save(folder)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",
        "pad_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)


def _num_rows(folder: Path, num_known: int) -> int:
    path = folder / "config.json"
    config = read_json(path)
    rows = config.get("padded_vocab_size", config.get("vocab_size", num_known))
    if type(rows) is not int or rows < num_known:
        raise ValueError(f"{path}: padded_vocab_size is {rows!r}, but the tokenizer has ids up to {num_known - 1}")
    return rows
