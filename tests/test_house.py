"""The language of the repository: sentences, docstrings, spelling, references and names of classes.

Long sentences: none above 30 words in the pages (README.md, ARCHITECTURE.md, docs/) and in the docstrings of src/. Not
counted are tables, code, headings, lists of names (a third of the words or more are inline code), and the dated entries
of a log. README_zh.md is checked for references only, because no blanks divide its words.

`tests/known_offenders.json` holds the remaining faults, as counts by rule and file. The counts may only fall, and a
file that is not listed has none. `python -m tests.prose` prints all faults; with `--lower` it removes the mended ones.
"""

import itertools
from pathlib import Path

import pytest

from tests import prose

HERE = Path(__file__)
KNOWN = prose.known_offenders()


@pytest.mark.parametrize("rule", prose.RULES)
def test_no_file_has_more_faults_than_it_is_known_for(rule: str) -> None:
    known = KNOWN.get(rule, {})
    worse = [
        f"{name}: {len(items)} where {known.get(name, 0)} are known:\n    " + "\n    ".join(items)
        for name, items in prose.faults()[rule].items()
        if len(items) > known.get(name, 0)
    ]
    assert not worse, f"{rule}\n" + "\n".join(worse)


def test_only_rules_that_exist_have_known_offenders() -> None:
    assert set(KNOWN) <= set(prose.RULES)
    assert "references" not in KNOWN  # a reference to nothing is mended at once
    assert not any(name.endswith(".md") for files in KNOWN.values() for name in files)


def test_counts_only_fall() -> None:
    known = {"rule": {"better": 3, "gone": 2, "worse": 1}}
    found = {"rule": {"better": ["x"], "worse": ["x", "x"], "new": ["x"]}}
    assert prose.lowered(known, found) == {"rule": {"better": 1, "worse": 1}}


def test_every_page_is_in_the_index() -> None:
    files, _ = prose.repository()
    index = (prose.ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {name.removeprefix("docs/") for name in files if name.startswith("docs/") and name.endswith(".md")}
    assert [page for page in sorted(pages - {"README.md"}) if f"]({page})" not in index] == []
    assert "docs/README.md" in (prose.ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "parts",
    [
        ["One sentence.", "Another one!", "A third?", "The rest"],
        ["It costs 27.8 % of 1.5 s.", "16 kHz is the rate."],
        ["Small parts, e.g. norms, i.e. the rest, cf. Fig. 3, stay."],
        ["Sums, capitals etc. are known.", "Days, stories etc.", "Nothing else is."],
        ["Call `load(a. b)` first.", "`bot.chat` comes second."],
        ["See https://example.org/a.b?c=d.", "Then go on."],
        ["See https://example.org/a.", "b is not in it."],
        ['It says "stop."', "Then it stops."],
        ["It waits (for a while.)", "It goes on."],
        ["Sums, days ... and more.", "pocket knows them."],
        ["A. Zeng and others wrote it.", "It is cited as Zeng et al. 2024."],
        ["**The kind comes first.**", "Then the id."],
        ["It is among the last 300 s.", "At time t.", "Then it goes."],
        ["One idea: it has a colon; and a semicolon."],
    ],
)
def test_sentences(parts: list[str]) -> None:
    assert prose.sentences(" ".join(parts)) == parts
    assert prose.sentences("\n  ".join(" ".join(parts).split(" "))) == parts


@pytest.mark.parametrize(
    ("sentence", "num"),
    [
        ("One two three.", 3),
        ("27.8 % of 1.5 s - and more", 6),
        ("Call `load(a, b, c)` now", 3),
        ("See [the page on engines](engines.md) and ![a picture](x.png)", 6),
        ("a hard-won, well-known fact", 4),
    ],
)
def test_words(sentence: str, num: int) -> None:
    assert prose.num_words(sentence) == num


def test_lists_of_names() -> None:
    assert prose.is_list_of_names("`a`, `b`, `c` and others")
    assert not prose.is_list_of_names("The option `a` is what most people want to have")
    long = "word " * 40
    assert prose.long_sentences([long]) == [long.strip()]
    assert prose.long_sentences(["`name`, " * 40, "word " * 30]) == []


def test_markdown_blocks() -> None:
    text = """# A heading of words

First line
second line.

    code in the page

| a | table |
|---|---|
Behind it.
- item one
  goes on
- item two

  its second paragraph

      code = of(the, item)

```sh
fenced code
```
1. numbered
<!-- a comment
of two lines -->
## 2026-11-28, an entry

Dated history.

### A part of the entry

More history.

## Back

The end.
"""
    assert list(prose.markdown_blocks(text)) == [
        "First line second line.",
        "Behind it.",
        "item one   goes on",
        "item two",
        "  its second paragraph",
        "numbered",
        "The end.",
    ]


def test_docstring_blocks() -> None:
    docstring = """A head.

    A paragraph
    of two lines.

        code = 1

    name     what it is
    other    what that is

    - an item
    Args:
        first: what it is,
            and more
        second, third: the others.

    Returns:
        A tensor
        of two axes.

    The end.
    """
    assert list(prose.docstring_blocks(docstring)) == [
        "A head.",
        "A paragraph of two lines.",
        "an item",
        "first: what it is, and more",
        "second, third: the others.",
        "A tensor of two axes.",
        "The end.",
    ]
    assert list(prose.docstring_blocks("Attributes:\n        a: one.\n        b: two.")) == ["a: one.", "b: two."]


def test_style_of_docstrings() -> None:
    bad = 'class A:\n    """Attributes:\n    a: one.\n    """\n\ndef f():\n    """F.\n    Raises:\n        X: y."""\n'
    assert [fault.split(":")[0] for fault in prose.style_faults(bad)] == ["A", "f"]
    good = 'class A:\n    """What it is.\n\n    Attributes:\n        a: one.\n    """\n'
    assert prose.style_faults(good) == []


def test_spelling() -> None:
    text = "Recogniser normalised COLOUR_OF centre behaviour honours labelled neighbouring synthesised"
    assert len(prose.british_words(text)) == len(text.split())
    fine = "recognizer color center cancelled synthesis analysis laborer emphasis realistic aria-labelledby greyhound"
    assert prose.british_words(fine) == []


@pytest.mark.parametrize(
    "text",
    [
        "docs/no-such-page.md",
        "`checkpoints_of_old.md`",
        "see `recipes/pocket/nothing.yaml`",
        "tests/test_nothing.py::test_x",
        "the folder `recipes/nowhere/`",
        "[a page](nowhere.md)",
        "![a picture](docs/images/nothing.png)",
        "`language/no_engine.py`",
    ],
)
def test_dangling_references_are_seen(text: str) -> None:
    assert prose.dangling(text, HERE)


@pytest.mark.parametrize(
    "text",
    [
        "docs/pocket.md, `pocket.md` and [a page](docs/pocket.md#state)",
        "`recipes/pocket/chat.yaml` in `recipes/pocket/`",
        "tests/test_house.py::test_x and [the site](https://example.org/docs/x.md)",
        "`language/engine.py`, `loop.py`, src/duologue",
        "and/or, input/output, 24/7, text/plain, w/h, `runs/pocket/flow`, OWNER/NAME, application/json",
        "`web_demo.py` of the release",
    ],
)
def test_good_references_pass(text: str) -> None:
    assert prose.dangling(text, HERE) == []


def test_no_sentence_of_a_good_text_is_lost() -> None:
    words = [f"word{i}" for i in range(200)]
    text = ". ".join(" ".join(words[i : i + 7]) for i in range(0, 200, 7)) + "."
    found = prose.sentences(text)
    assert list(itertools.chain.from_iterable(one.rstrip(".").split() for one in found)) == words
