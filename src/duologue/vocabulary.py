"""The joint vocabulary of text, control and speech ids, and the chat template.

    rows of the text tokenizer | controls it lacks | speech ids, one contiguous block | padding rows, if any

Prompts are built from ids, never from strings, so user text cannot become a control or speech token.
On disk a vocabulary is `tokenizer.json` (tokenizers library) and `vocabulary.json`.

A prompt, with the fields of `ChatTemplate` in braces (docs/checkpoints.md 2.1):

    [gMASK]<sop> <|system|>{role_break}{instruction} <|user|>{role_break}<|begin_of_audio|>...<|end_of_audio|>
    <|assistant|>{reply_marker} reply, whose end is the next <|user|>
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from duologue.config import parse_config, read_json, to_mapping, write_json
from duologue.interleave import Allowed, Kind
from duologue.turns import Conversation, Modality, Role, Turn

VOCABULARY_VERSION = 1

END_OF_TEXT = "<|endoftext|>"
BEGIN_OF_AUDIO = "<|begin_of_audio|>"
END_OF_AUDIO = "<|end_of_audio|>"
WRITE = "<|write|>"  # precedes a written reply, if the vocabulary has it
ROLE_TOKENS = {role: f"<|{role}|>" for role in Role}


class Task(StrEnum):
    """Pre-training tasks other than conversation; the value is the control token that requests them."""

    TRANSCRIBE = "<|transcribe|>"  # speech in, its text out
    READ = "<|read|>"  # text in, its speech out


CHAT_CONTROLS = (END_OF_TEXT, "[gMASK]", "<sop>", *ROLE_TOKENS.values(), BEGIN_OF_AUDIO, END_OF_AUDIO)
ALL_CONTROLS = (*CHAT_CONTROLS, *Task, WRITE)


@dataclass(frozen=True)
class ChatTemplate:
    """Literal texts of a prompt. All are empty by default, to save a small model's context.

    Attributes:
        prefix: control tokens that begin every sequence.
        role_break: text after the marker of system, user and observation.
        speech_instruction, text_instruction: default system text before a spoken or written first turn; empty for none.
        reply_marker: text after the marker of the assistant.
    """

    prefix: tuple[str, ...] = ("[gMASK]", "<sop>")
    role_break: str = ""
    speech_instruction: str = ""
    text_instruction: str = ""
    reply_marker: str = ""


@dataclass(frozen=True)
class VocabularyConfig:
    """The layout of the joint vocabulary.

    Attributes:
        codebook_size: number of speech ids.
        speech_offset: joint id of speech code 0.
        size: number of rows, padding included.
        controls: control tokens by name; special tokens of the text tokenizer need not be listed.
        ends: controls that end a reply; training writes the first.
        styles: text ids without characters, by name. As first id of a reply, one chooses how it sounds. The released
            format has none.
    """

    codebook_size: int
    speech_offset: int
    size: int
    controls: dict[str, int]
    ends: tuple[str, ...] = ("<|user|>",)
    template: ChatTemplate = field(default_factory=ChatTemplate)
    styles: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """A training sequence; `loss[i]` is true where `ids[i]` is a training target."""

    ids: list[int]
    loss: list[bool]


class Vocabulary:
    """The mapping between texts, speech codes and joint ids.

    Args:
        tokenizer: a byte-level text tokenizer, or one with byte fallback.
        config: layout of controls and speech ids.

    Raises:
        ValueError: ids overlap or exceed the size, or a required control is missing.
    """

    def __init__(self, tokenizer: Tokenizer, config: VocabularyConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.codebook_size = config.codebook_size
        self.speech_offset = config.speech_offset
        self.size = config.size
        self.template = config.template
        self.kinds = _kinds(tokenizer, config)
        if not config.ends:
            raise ValueError("a vocabulary needs at least one control that ends a reply")
        self.end_ids = tuple(self.control_id(name) for name in config.ends)
        self.end_id = self.end_ids[0]
        self._styles = {token: name for name, token in config.styles.items()}
        self._text_only = _without_added(tokenizer)
        self._prefix = [self.control_id(name) for name in config.template.prefix]
        self._role_break = self.encode_text(config.template.role_break)
        self._reply_marker = self.encode_text(config.template.reply_marker)
        for name in (*ROLE_TOKENS.values(), BEGIN_OF_AUDIO, END_OF_AUDIO):
            self.control_id(name)

    @classmethod
    def extend(
        cls,
        tokenizer: Tokenizer | str | Path,
        codebook_size: int,
        *,
        num_rows: int | None = None,
        template: ChatTemplate | None = None,
        multiple_of: int = 1,
    ) -> Vocabulary:
        """Appends the missing controls and the speech ids to a text tokenizer's rows.

        Args:
            tokenizer: a text tokenizer or its tokenizer.json.
            num_rows: rows of the LM's embedding, if more than the tokenizer's. New ids follow them.
            multiple_of: padding rows round the size up to a multiple of this.
        """
        if not isinstance(tokenizer, Tokenizer):
            tokenizer = _read_tokenizer(Path(tokenizer))
        if codebook_size <= 0 or multiple_of <= 0:
            raise ValueError(f"codebook_size and multiple_of must be positive, got {codebook_size} and {multiple_of}")
        known = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if num_rows is not None and num_rows < known:
            raise ValueError(f"num_rows is {num_rows}, but the tokenizer has ids up to {known - 1}")
        row = known if num_rows is None else num_rows
        controls = {}
        for name in ALL_CONTROLS:
            token = tokenizer.token_to_id(name)
            controls[name] = row if token is None else token
            row += token is None
        config = VocabularyConfig(
            codebook_size=codebook_size,
            speech_offset=row,
            size=-(-(row + codebook_size) // multiple_of) * multiple_of,
            controls=controls,
            template=template or ChatTemplate(),
        )
        return cls(tokenizer, config)

    def with_styles(self, names: Sequence[str]) -> Vocabulary:
        """Returns this vocabulary with styles in its padding rows.

        Raises:
            ValueError: it has styles, or too few padding rows.
        """
        rows = np.flatnonzero(self.kinds == Kind.PADDING).tolist()
        if self.config.styles or len(names) > len(rows):
            raise ValueError(
                f"{len(names)} styles need a vocabulary without styles and as many padding rows; this one has "
                f"{len(self.config.styles)} styles and {len(rows)} rows"
            )
        styles = dict(zip(names, rows, strict=False))
        return Vocabulary(self.tokenizer, dataclasses.replace(self.config, styles=styles))

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and `vocabulary.json`."""
        folder = Path(folder)
        write_json(folder / "tokenizer.json", json.loads(self.tokenizer.to_str()), compact=True)
        head = {"kind": "Vocabulary", "version": VOCABULARY_VERSION}
        write_json(folder / "vocabulary.json", {**head, **self._layout})

    @classmethod
    def load(cls, folder: str | Path) -> Vocabulary:
        """Reads a folder that `save` wrote.

        Raises:
            ValueError: a file is missing or malformed, or has an unknown version or key.
        """
        path = Path(folder) / "vocabulary.json"
        data = read_json(path)
        if data.pop("kind", None) != "Vocabulary":
            raise ValueError(f"{path} is not a vocabulary")
        version = data.pop("version", None)
        if version != VOCABULARY_VERSION:
            raise ValueError(f"{path} is of version {version!r}; this program reads version {VOCABULARY_VERSION}")
        config = parse_config(VocabularyConfig, data, str(path))
        return cls(_read_tokenizer(Path(folder) / "tokenizer.json"), config)

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of tokenizer and layout; saved conversations and token corpora record it."""
        whole = json.dumps([json.loads(self.tokenizer.to_str()), self._layout], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()

    @property
    def _layout(self) -> dict[str, Any]:
        """The config as plain values; without styles as vocabularies had it before there were any."""
        layout = to_mapping(self.config)
        return layout if self.config.styles else {key: value for key, value in layout.items() if key != "styles"}

    def kind(self, token: int) -> Kind:
        """Returns the kind of an id. Raises ValueError for an id outside the vocabulary."""
        if not 0 <= token < self.size:
            raise ValueError(f"token id {token} is outside of the vocabulary of {self.size}")
        return Kind(int(self.kinds[token]))

    def allowed_mask(self, allowed: Allowed) -> npt.NDArray[np.bool_]:
        """Returns bool (size,): the ids that may be sampled, never controls or padding."""
        wanted = [kind for kind in Kind if kind in allowed]
        return np.isin(self.kinds, wanted)

    def control_id(self, name: str) -> int:
        """Returns the id of a control token. Raises ValueError that lists the known ones."""
        if name not in self.config.controls:
            names = ", ".join(self.config.controls)
            raise ValueError(f"this vocabulary has no control token '{name}'; it has {names}")
        return self.config.controls[name]

    # Text and speech.

    def encode_text(self, text: str) -> list[int]:
        """Returns text ids. Markers such as `<|user|>` are encoded as plain characters."""
        return list(self._text_only.encode(text, add_special_tokens=False).ids)

    def decode_text(self, ids: Iterable[int]) -> str:
        """Decodes text ids; incomplete characters become U+FFFD. Raises ValueError for other kinds."""
        ids = list(ids)
        for token in ids:
            if self.kind(token) is not Kind.TEXT:
                raise ValueError(f"token id {token} is {self.kind(token).name.lower()}, not text")
        spelled = [token for token in ids if token not in self._styles]
        return str(self.tokenizer.decode(spelled, skip_special_tokens=False))

    def style_ids(self, style: str) -> list[int]:
        """Returns what begins the text ids of a reply in a style; nothing for a style without an id."""
        return [self.config.styles[style]] if style in self.config.styles else []

    def style(self, ids: Sequence[int]) -> str:
        """Returns the style that the ids of a reply begin with; "" without one."""
        return self._styles.get(ids[0], "") if ids else ""

    def speech_id(self, code: int) -> int:
        """Returns the joint id of a speech code. Raises ValueError outside the codebook."""
        if not 0 <= code < self.codebook_size:
            raise ValueError(f"speech token {code} is outside of the codebook of {self.codebook_size}")
        return self.speech_offset + code

    def speech_code(self, token: int) -> int:
        """Returns the speech code in [0, codebook_size) of a joint id. Raises ValueError for other kinds."""
        if self.kind(token) is not Kind.SPEECH:
            raise ValueError(f"token id {token} is {self.kind(token).name.lower()}, not speech")
        return token - self.speech_offset

    def speech_ids(self, codes: Iterable[int]) -> list[int]:
        return [self.speech_id(int(code)) for code in codes]

    def speech_codes(self, ids: Iterable[int]) -> list[int]:
        return [self.speech_code(int(token)) for token in ids]

    def render(self, ids: Iterable[int]) -> str:
        """Renders any ids for logs: text as is, controls by name, speech as `<|audio_7|>`."""
        names = {token: name for name, token in self.config.controls.items()}
        parts = []
        for kind, group in groupby(ids, self.kind):
            if kind is Kind.TEXT:
                parts.append(self.decode_text(group))
            elif kind is Kind.SPEECH:
                parts += [f"<|audio_{self.speech_code(token)}|>" for token in group]
            else:
                parts += [names.get(token) or self.tokenizer.id_to_token(token) or f"<{token}>" for token in group]
        return "".join(parts)

    # The chat template.

    def prompt_ids(self, conversation: Conversation, reply: Modality = Modality.INTERLEAVED) -> list[int]:
        """Returns the prompt of the next reply.

        The following prompt begins with this prompt and the reply's ids, so KV caches can be continued.

        Args:
            conversation: its last turn is of the user or a tool.
            reply: modality of the reply; `Modality.TEXT` adds the control for written replies, if there is one.

        Raises:
            ValueError: the last turn cannot be answered, a turn holds an illegal id, or the vocabulary is another one.
        """
        if not conversation.turns or conversation.turns[-1].role in (Role.ASSISTANT, Role.SYSTEM):
            raise ValueError("a prompt needs a conversation whose last turn is one of the user or a tool")
        return [*self._history(conversation).ids, *self._reply_opening(reply)]

    def open_prompt_ids(self, conversation: Conversation) -> list[int]:
        """Returns the beginning of `prompt_ids` while the last turn is still being spoken.

        Raises:
            ValueError: as `prompt_ids`; the last turn is not speech of the user.
        """
        last = conversation.turns[-1] if conversation.turns else None
        if last is None or last.role is not Role.USER or last.modality is not Modality.SPEECH:
            raise ValueError("only a conversation whose last turn is speech of the user has an open prompt")
        return self._history(conversation).ids[:-1]

    def chat_sample(self, conversation: Conversation) -> Sample:
        """Returns a training sample of a conversation. Targets are the replies and their end controls, except after an
        interrupt.

        Raises:
            ValueError: as `prompt_ids`.
        """
        sample = self._history(conversation)
        last = conversation.turns[-1] if conversation.turns else None
        if last is None or last.role is not Role.ASSISTANT or last.interrupted:
            return sample
        return Sample([*sample.ids, self.end_id], [*sample.loss, True])

    def task_prompt(self, task: Task, ids: Sequence[int]) -> list[int]:
        """Returns the prompt of a pre-training task on speech ids (TRANSCRIBE) or text ids (READ)."""
        modality = Modality.SPEECH if task is Task.TRANSCRIBE else Modality.TEXT
        turn = Turn(Role.USER, modality, tuple(ids))
        return [
            *self._prefix,
            *self._opening(Role.USER),
            self.control_id(task),
            *self._wrapped(turn),
            *self._opening(Role.ASSISTANT),
        ]

    def task_sample(self, task: Task, ids: Sequence[int], result: Sequence[int]) -> Sample:
        """Returns a training sample of a task; the targets are the result (joint ids) and its end."""
        prompt = self.task_prompt(task, ids)
        return Sample([*prompt, *result, self.end_id], [False] * len(prompt) + [True] * (len(result) + 1))

    def document_sample(self, ids: Sequence[int]) -> Sample:
        """Returns a training sample of text or speech ids; everything after the prefix is a target."""
        whole = [*self._prefix, *ids, self.control_id(END_OF_TEXT)]
        return Sample(whole, [False] * len(self._prefix) + [True] * (len(ids) + 1))

    def _history(self, conversation: Conversation) -> Sample:
        if conversation.vocabulary and conversation.vocabulary != self.hash:
            raise ValueError("the conversation uses another vocabulary")
        ids = list(self._prefix)
        if not any(turn.role is Role.SYSTEM for turn in conversation) and conversation.turns:
            written = conversation.turns[0].modality is Modality.TEXT
            text = self.template.text_instruction if written else self.template.speech_instruction
            if text:
                ids += [*self._opening(Role.SYSTEM), *self.encode_text(text)]
        loss = [False] * len(ids)
        ends_reply = False
        for turn in conversation:
            if turn.role is Role.ASSISTANT:
                opening, body = self._reply_opening(turn.modality), list(self._checked(turn))
            else:
                opening, body = self._opening(turn.role), self._wrapped(turn)
            ids += [*opening, *body]
            loss += [ends_reply and opening[0] in self.end_ids] + [False] * (len(opening) - 1)
            loss += [turn.role is Role.ASSISTANT] * len(body)
            ends_reply = turn.role is Role.ASSISTANT and not turn.interrupted
        return Sample(ids, loss)

    def _opening(self, role: Role) -> list[int]:
        behind = self._reply_marker if role is Role.ASSISTANT else self._role_break
        return [self.control_id(ROLE_TOKENS[role]), *behind]

    def _reply_opening(self, reply: Modality) -> list[int]:
        write = [self.control_id(WRITE)] if reply is Modality.TEXT and WRITE in self.config.controls else []
        return [*self._opening(Role.ASSISTANT), *write]

    def _wrapped(self, turn: Turn) -> list[int]:
        """Returns the ids of a turn that is no reply, each speech span between its two controls."""
        begin, end = self.control_id(BEGIN_OF_AUDIO), self.control_id(END_OF_AUDIO)
        if turn.modality is Modality.SPEECH:
            return [begin, *self._checked(turn), end]
        wrapped: list[int] = []
        for kind, group in groupby(self._checked(turn), self.kind):
            stretch = list(group)
            wrapped += [begin, *stretch, end] if kind is Kind.SPEECH else stretch
        return wrapped

    def _checked(self, turn: Turn) -> tuple[int, ...]:
        """Returns the turn's ids; ids from a file must not contain controls."""
        legal = {Modality.TEXT: (Kind.TEXT,), Modality.SPEECH: (Kind.SPEECH,)}.get(
            turn.modality, (Kind.TEXT, Kind.SPEECH)
        )
        for token in turn.ids:
            if self.kind(token) not in legal:
                kind = self.kind(token).name.lower()
                raise ValueError(f"a turn of the {turn.role} in {turn.modality} cannot hold the {kind} id {token}")
        return turn.ids


class TextStream:
    """Incremental text decoder: characters with missing bytes are held back.

    Leading white space is dropped, because a reply may begin with a mid-sentence token.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._begun = False
        self._before: list[int] = []  # last decoded ids, since some decoders treat the first id differently
        self._waiting: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """Consumes text ids and returns the characters that are final."""
        self._waiting += ids
        text = self._text()
        return "" if text.endswith("\ufffd") else self._accept(text)

    def flush(self) -> str:
        """Returns the rest at the end of a reply; incomplete characters become U+FFFD."""
        return self._accept(self._text())

    def _text(self) -> str:
        if not self._waiting:
            return ""
        decode = self._vocabulary.decode_text
        return decode(self._before + self._waiting)[len(decode(self._before)) :]

    def _accept(self, text: str) -> str:
        if self._waiting:
            self._before, self._waiting = self._waiting, []
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        return text


def _read_tokenizer(path: Path) -> Tokenizer:
    read_json(path)  # reports faults of the file itself
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} is not a tokenizer.json of the tokenizers library ({error})") from None


def _without_added(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer without added tokens, so that no text can produce one."""
    data = json.loads(tokenizer.to_str())
    added = {entry["content"] for entry in data["added_tokens"]}
    model = data["model"]
    if model.get("ignore_merges"):  # words of the table need no merge
        model["vocab"] = {word: token for word, token in model["vocab"].items() if word not in added}
    return Tokenizer.from_str(json.dumps(data | {"added_tokens": []}))


def _kinds(tokenizer: Tokenizer, config: VocabularyConfig) -> npt.NDArray[np.uint8]:
    """Returns the Kind of every row, uint8 (size,)."""
    text = tokenizer.get_vocab(with_added_tokens=False).values()
    added = {token: entry.content for token, entry in tokenizer.get_added_tokens_decoder().items()}
    named = [*config.controls.values(), *config.styles.values()]
    top = max([*text, *added, *named, config.speech_offset + config.codebook_size - 1])
    if top >= config.size:
        raise ValueError(f"the vocabulary has {config.size} rows, but its ids reach {top}")
    kinds = np.full(config.size, Kind.PADDING, dtype=np.uint8)
    kinds[list(text)] = Kind.TEXT
    kinds[list(added)] = Kind.CONTROL
    kinds[list(config.controls.values())] = Kind.CONTROL
    block = range(config.speech_offset, config.speech_offset + config.codebook_size)
    for code, token in enumerate(block):
        # The released tokenizer lists its speech ids as added tokens; any other use of a row is an overlap.
        if kinds[token] != Kind.PADDING and added.get(token) != f"<|audio_{code}|>":
            kind = Kind(int(kinds[token])).name.lower()
            raise ValueError(f"speech token {code} would be id {token}, which is a {kind} token already")
    kinds[block.start : block.stop] = Kind.SPEECH
    for name, token in config.styles.items():
        if kinds[token] != Kind.PADDING:
            raise ValueError(f"style {name} would be id {token}, which is in use already")
        kinds[token] = Kind.TEXT
    for name in config.ends:
        if name in config.controls:
            kinds[config.controls[name]] = Kind.END
    return kinds
