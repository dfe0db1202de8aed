"""The language switch: what ids may spell when the text is kept to English or Chinese."""

import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from duologue.interleave import Kind
from duologue.language.drawing import DrawMasks
from duologue.language.sampling import Sampling
from duologue.language.scripts import fits, language_mask
from duologue.text import byte_letters
from duologue.vocabulary import Vocabulary

SAMPLES = {
    "hello": ("Latin",),
    " naïve café": ("Latin",),
    "don't — 3/4, ok?": ("Latin",),
    "12:30": ("Latin", "Han"),
    " \n": ("Latin", "Han"),
    "😀": ("Latin", "Han"),
    "你好": ("Han",),
    "，。": ("Han",),
    "A股": (),
    "привет": (),
    "こんにちは": (),
    "안녕": (),
    "ｶﾀ": (),
    "नमस्ते": (),
    "١٢": (),
}


@pytest.mark.parametrize("script", ["Latin", "Han"])
@pytest.mark.parametrize("text", SAMPLES)
def test_text_belongs_to_the_language_of_its_letters(text: str, script: str) -> None:
    assert fits(text.encode(), script) == (script in SAMPLES[text])


def letters_of(text: str) -> set[str]:
    return {unicodedata.name(char).split()[0] for char in text if unicodedata.category(char)[0] == "L"}


@given(st.text(max_size=8), st.lists(st.integers(1, 6), max_size=12))
def test_a_text_is_never_let_through_by_cutting_it_inside_characters(text: str, cuts: list[int]) -> None:
    spelled, pieces = text.encode(), []
    for cut in cuts:
        pieces.append(spelled[:cut])
        spelled = spelled[cut:]
    pieces.append(spelled)
    if all(fits(piece, "Latin") for piece in pieces):
        assert letters_of(text) <= {"LATIN", "MODIFIER", "FEMININE", "MASCULINE", "MICRO"}
    if all(fits(piece, "Han") for piece in pieces):
        assert not letters_of(text) & {"LATIN", "GREEK", "CYRILLIC", "HIRAGANA", "KATAKANA", "HANGUL", "HALFWIDTH"}


def byte_vocabulary() -> Vocabulary:
    """All single bytes, and two words."""
    words = [*byte_letters(), "".join(byte_letters()[byte] for byte in "你".encode()), "hi"]
    tokenizer = Tokenizer(models.BPE({word: token for token, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Vocabulary.extend(tokenizer, codebook_size=4, multiple_of=8)


def test_masks_keep_text_to_one_language_and_leave_everything_else() -> None:
    vocabulary = byte_vocabulary()
    english, chinese = language_mask(vocabulary, "en"), language_mask(vocabulary, "zh")
    assert english[257]
    assert not english[256]
    assert chinese[256]
    assert not chinese[257]
    assert english[ord("a")]
    assert not chinese[ord("a")]
    assert chinese[0xE4]  # begins Han characters and nothing else
    assert not english[0xE4]
    assert english[vocabulary.kinds != Kind.TEXT].all()
    masks = DrawMasks(vocabulary, vocabulary.size, torch.device("cpu"))
    assert [masks.text_mask(language) for language in (None, "en", "zh")] == [0, 1, 2]
    everything, english_only, chinese_only = masks.table[:3] == 0
    is_text = torch.from_numpy(vocabulary.kinds == Kind.TEXT)
    assert torch.equal(everything, is_text)
    assert torch.equal(english_only, is_text & torch.from_numpy(english))
    assert torch.equal(chinese_only, is_text & torch.from_numpy(chinese))


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ValueError, match="text_language is 'fr'; the choices are en, zh"):
        Sampling(text_language="fr")  # type: ignore[arg-type]
