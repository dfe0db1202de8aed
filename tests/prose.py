"""Reads the prose of the repository: Markdown, docstrings and comments, cut into sentences.

`python -m tests.prose` prints every fault that `tests/test_house.py` counts, with its file. With `--lower` it also
writes the counts of today into `tests/known_offenders.json`, where they are lower than the listed ones.
"""

from __future__ import annotations

import ast
import inspect
import io
import itertools
import json
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
KNOWN_OFFENDERS = Path(__file__).parent / "known_offenders.json"
MAX_WORDS = 30

# A sentence goes on behind these; behind the second group only when a small letter or a digit follows.
_NEVER_LAST = {"e.g.", "i.e.", "vs.", "cf.", "fig.", "eq.", "no.", "dr.", "mr.", "ms.", "st."}
_SOMETIMES_LAST = {"etc.", "approx.", "al.", "resp.", "p.m.", "a.m."}

_FENCE = re.compile(r"^\s*(```|~~~)")
_ITEM = re.compile(r"^\s*([-*+]|\d+[.)])\s+")
_SECTION = re.compile(r"^(Args|Arguments|Attributes|Returns|Yields|Raises|Shapes|Notes?|Examples?):$")
_ENTRY = re.compile(r"^[\w*`.\[\], ()]+: ")
_CODE = re.compile(r"(`+).+?\1", re.DOTALL)
_IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
_URL = re.compile(r"\b(?:https?|wss?)://[^\s)>]*[^\s)>.,;:]")
_DATED_HEADING = re.compile(r"^##\s+\d{4}-\d\d-\d\d")
_END = re.compile(r"[.!?]+[\"')\]*_]*(?=\s|$)")


def sentences(text: str) -> list[str]:
    """The sentences of one paragraph.

    A sentence ends at a full stop, question mark or exclamation mark before a blank. Abbreviations, initials, decimal
    points, ellipses, inline code and URLs end none. A colon and a semicolon do not end a sentence either.
    """
    kept: list[str] = []

    def hide(found: re.Match[str]) -> str:
        kept.append(found.group())
        return f"\x00{len(kept) - 1}\x00"

    hidden = _URL.sub(hide, _CODE.sub(hide, " ".join(text.split())))
    found, start = [], 0
    for end in _END.finditer(hidden):
        word = hidden[: end.end()].rsplit(" ", 1)[-1].lstrip("(\"'*_[")
        rest = hidden[end.end() :].lstrip()
        if end.group().startswith("..") or word.lower() in _NEVER_LAST or re.fullmatch(r"[A-Z]\.", word):
            continue
        if word.lower() in _SOMETIMES_LAST and not rest[:1].isupper():
            continue
        found.append(hidden[start : end.end()])
        start = end.end()
    found.append(hidden[start:])
    shown = (re.sub("\x00(\\d+)\x00", lambda place: kept[int(place.group(1))], part).strip() for part in found)
    return [part for part in shown if part]


def num_words(sentence: str) -> int:
    """Words of a sentence: what stands between blanks and has a letter or a digit. Inline code is one word."""
    plain = _CODE.sub("code", _LINK.sub(r"\1", _IMAGE.sub("", sentence)))
    return sum(any(char.isalnum() for char in word) for word in plain.split())


def is_list_of_names(sentence: str) -> bool:
    """Whether a third of the words or more are inline code, as in a list of options or figures."""
    plain = _LINK.sub(r"\1", sentence)
    return 3 * len(_CODE.findall(plain)) >= max(num_words(plain), 1)


def markdown_blocks(text: str) -> Iterator[str]:
    """Paragraphs and list items of a Markdown text.

    Left out are code (fenced, or indented by four more than its list after a blank line), rows of tables, headings and
    HTML comments. So is everything below a heading that begins with a date, as the entries of a log do.
    """
    lines: list[str] = []
    fenced = dated = in_list = code = False
    before_blank = True
    margin = 0  # indentation of the text of a list's items
    for line in [*re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL).splitlines(), ""]:
        if _FENCE.match(line):
            fenced = not fenced
            line = ""
        elif fenced:
            continue
        if line.startswith("#"):
            dated = bool(_DATED_HEADING.match(line)) or (dated and line.startswith("###"))
            in_list, line = False, ""
        blank = not line.strip()
        indent = len(line) - len(line.lstrip())
        item = _ITEM.match(line)
        if item and (in_list or indent < 4):
            in_list, margin = True, item.end()
        elif not blank and not line.startswith(" "):
            in_list = in_list and not before_blank
        code = (indent >= 4 + margin * in_list and (before_blank or code)) or (code and blank)
        item = item if in_list else None
        if (blank or item or line.lstrip().startswith("|") or code) and lines:
            yield " ".join(lines)
            lines = []
        if not (blank or dated or code or line.lstrip().startswith("|")):
            lines.append(line[item.end() :] if item else line)
        before_blank = blank


def docstring_blocks(docstring: str) -> Iterator[str]:
    """Paragraphs, list items and the entries of the sections of a docstring.

    Left out are code (indented by four after a blank line, outside a section) and rows of tables: lines with a bar, or
    with two blanks between words.
    """
    lines: list[str] = []
    base: int | None = None
    in_section = code = False
    before_blank = True
    for line in [*inspect.cleandoc(docstring).splitlines(), ""]:
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        header = bool(_SECTION.match(stripped))
        if not stripped:
            in_section = in_section and base is None
        row = " | " in line or stripped.startswith("|") or bool(re.search(r"\S {2,}\S", line))
        code = (indent >= 4 and not in_section and (before_blank or code)) or (code and not stripped)
        entry = False
        if in_section and stripped:
            base = indent if base is None else base
            entry = indent == base and bool(_ENTRY.match(stripped))
        if (not stripped or header or row or code or entry or _ITEM.match(line)) and lines:
            yield " ".join(lines)
            lines = []
        if header:
            in_section, base = True, None
        elif stripped and not row and not code:
            lines.append(_ITEM.sub("", stripped))
        before_blank = not stripped


@lru_cache(maxsize=1)  # a source is read for several rules in a row
def _nodes(source: str) -> tuple[ast.AST, ...]:
    """The module and its statements; expressions are most of a tree and hold no docstring."""
    found: list[ast.AST] = [ast.parse(source)]
    for node in found:
        for name in ("body", "orelse", "handlers", "finalbody", "cases"):
            part = getattr(node, name, ())
            found += part if isinstance(part, list) else ()
    return tuple(found)


def docstrings(source: str) -> Iterator[tuple[ast.AST, str]]:
    """The modules, classes and functions of a source that have a docstring, with it as it is written."""
    for node in _nodes(source):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield node, docstring


def comments(source: str) -> Iterator[str]:
    """The comments of a source that may name a file; the tokenizer of Python is slow."""
    if not any(_PATH.search(line.partition("#")[2]) for line in source.splitlines()):
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def long_sentences(blocks: Iterable[str]) -> list[str]:
    """The sentences above `MAX_WORDS` words, without lists of names."""
    return [
        sentence
        for block in blocks
        for sentence in sentences(block)
        if num_words(sentence) > MAX_WORDS and not is_list_of_names(sentence)
    ]


def style_faults(source: str) -> list[str]:
    """What is wrong with the form of the docstrings of a source."""
    found = []
    for node, docstring in docstrings(source):
        name = getattr(node, "name", "the module")
        lines = inspect.cleandoc(docstring).splitlines()
        if isinstance(node, ast.ClassDef) and _SECTION.match(lines[0].strip()):
            found.append(f"{name}: the docstring opens with {lines[0].strip()!r} and does not say what the class is")
        found += [
            f"{name}: no blank line before {line.strip()!r}"
            for before, line in itertools.pairwise(lines)
            if _SECTION.match(line.strip()) and before.strip()
        ]
    return found


# Beginnings of words in British spelling. "Cancelled" is not among them: it is a word of the real-time protocol.
_BRITISH = re.compile(
    r"(?i)(?:recognis|normalis|initialis|optimis|organis|summaris|quantis|tokenis|vocalis|generalis|specialis"
    r"|serialis|synchronis|realis|minimis|maximis|memoris|visualis|utilis|apologis|finalis|randomis|parallelis"
    r"|categoris)(?=[ei]|ation)"
    r"|synthesis(?=e[ds]?\b|ing\b)|emphasis(?=ed|ing)|analys(?=e[ds]?\b|ing\b)"
    r"|colour|centre|behaviour|honour|favour|flavour|neighbour|labour(?!er)|licence|defence|grey(?!hound)|metres?\b"
    r"|catalogue|programmes?\b|fulfil\b|artefact|(?:label|model|travel|signal)l(?:ed(?!by)|ing|er)"
)


def british_words(text: str) -> list[str]:
    """The words in British spelling, inside identifiers too."""
    return [found.group() for found in _BRITISH.finditer(text)]


_PATH = re.compile(r"(?<![\w/.*{-])(?:\.\./)*[A-Za-z_][\w-]*(?:(?:/[\w.-]*\w)*\.(?:md|py)\b|(?:/[\w.-]*\w)+/?|/(?!\S))")
_TARGET = re.compile(r"\]\(([^)\s]+)\)")


@cache
def repository() -> tuple[frozenset[str], frozenset[str]]:
    """Files and folders of the repository, as paths from its root."""
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, capture_output=True, text=True, check=False)
    names = done.stdout.splitlines() if done.returncode == 0 else _walked()
    files = frozenset(name for name in names if (ROOT / name).exists())
    return files, frozenset(str(parent) for name in files for parent in Path(name).parents if str(parent) != ".")


def _walked() -> list[str]:
    """Files of a source archive, which has no git: everything but what `.gitignore` keeps out."""
    skipped = {".venv", "runs", "node_modules", "__pycache__"}
    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [str(path) for path in paths if not skipped & set(path.parts)]


# Programs of the released GLM-4-Voice, which the prose names and which are not here.
_ELSEWHERE = {"web_demo.py", "flow_inference.py", "model_server.py"}


def dangling(text: str, place: Path) -> list[str]:
    """References in a text to files and folders that are not in the repository.

    Checked are the targets of Markdown links, names that end in .md or .py, and paths whose first folder is one of the
    repository. A path counts from the root, from the folder of the text, or as the end of a path: `language/engine.py`.
    """
    files, folders = repository()
    tops = {folder.split("/")[0] for folder in folders} - {"runs"}

    def exists(name: str) -> bool:
        name = name.rstrip("/.")
        near = (place.parent / name).resolve()
        if near.is_relative_to(ROOT) and str(near.relative_to(ROOT)) in files | folders:
            return True
        return any(path == name or path.endswith("/" + name) for path in (*files, *folders))

    found = []
    for target in _TARGET.findall(text):
        name = target.split("#")[0]
        if name and "://" not in name and not name.startswith("mailto:") and not exists(name):
            found.append(name)
    for match in _PATH.finditer(_URL.sub(" ", text)):
        name = match.group()
        placeholder = any(part.isupper() and "." not in part for part in name.split("/"))  # examples/NAME
        checked = name.endswith((".md", ".py")) or (name.split("/")[0] in tops and not placeholder)
        if checked and name not in _ELSEWHERE and not exists(name):
            found.append(name)
    return sorted(set(found))


def _tracked(suffixes: tuple[str, ...], *tops: str) -> list[str]:
    return sorted(name for name in repository()[0] if name.endswith(suffixes) and name.startswith(tops))


PAGES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/")


RULES = ("long sentences", "docstring style", "British spelling", "references", "class names")


@cache
def faults() -> dict[str, dict[str, list[str]]]:
    """Every fault, by rule of `RULES` and file; 12 s of processor time, so no module computes it when it is imported.

    The rules are `long sentences` (pages, and docstrings of src/), `docstring style` (src/), `British spelling` (src/
    and pages), `references` (pages, and docstrings and comments everywhere) and `class names` (defined twice in src/).
    """
    found: dict[str, dict[str, list[str]]] = {rule: {} for rule in RULES}
    classes: Counter[str] = Counter()
    defined: dict[str, list[str]] = {}
    for name in _tracked((".md",), *PAGES, "README_zh.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        found["long sentences"][name] = long_sentences(markdown_blocks(text))
        found["references"][name] = dangling(text, ROOT / name)
    for name in _tracked((".py",), "src/", "recipes/", "benchmarks/", "examples/", "tests/"):
        source = (ROOT / name).read_text(encoding="utf-8")
        texts = [docstring for _, docstring in docstrings(source)]
        found["references"][name] = dangling("\n".join([*texts, *comments(source)]), ROOT / name)
        if name.startswith("src/"):
            found["long sentences"][name] = long_sentences(
                block for docstring in texts for block in docstring_blocks(docstring)
            )
            found["docstring style"][name] = style_faults(source)
            defined[name] = [node.name for node in _nodes(source) if isinstance(node, ast.ClassDef)]
            classes.update(defined[name])
    for name in _tracked((".py", ".md", ".js", ".html", ".css"), "src/", *PAGES):
        found["British spelling"][name] = british_words((ROOT / name).read_text(encoding="utf-8"))
    for name, own in defined.items():
        found["class names"][name] = [f"class {one}" for one in own if classes[one] > 1]
    return {rule: {name: items for name, items in files.items() if items} for rule, files in found.items()}


def known_offenders() -> dict[str, dict[str, int]]:
    """How many faults of each rule each file may still have."""
    known: dict[str, dict[str, int]] = json.loads(KNOWN_OFFENDERS.read_text(encoding="utf-8"))
    return known


def lowered(known: dict[str, dict[str, int]], found: dict[str, dict[str, list[str]]]) -> dict[str, dict[str, int]]:
    """The known offenders with the counts of today where they are lower; files without a fault leave the list."""
    return {
        rule: {name: min(num, len(found[rule][name])) for name, num in files.items() if found[rule].get(name)}
        for rule, files in known.items()
    }


if __name__ == "__main__":
    today = faults()
    for rule, files in today.items():
        for name, items in files.items():
            print(f"{rule}: {name}: {len(items)}", *items, sep="\n    ")
    if "--lower" in sys.argv:
        new = lowered(known_offenders(), today)
        KNOWN_OFFENDERS.write_text(json.dumps(new, indent=2, sort_keys=True) + "\n", encoding="utf-8")
