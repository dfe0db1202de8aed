"""The rules that keep the house a house, held by reading the source."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "duologue"
MAX_LINES = 500

# A file or a folder of the package, and the layer it lies in. Imports go down only; files of one layer may
# import each other without a circle, folders of one layer never.
LAYERS = {
    "rates": 0,
    "pcm": 0,
    "config": 0,
    "interleave": 0,
    "vocabulary": 0,
    "turns": 0,
    "scoring": 0,
    "text": 0,
    "progress": 0,
    "spoken_text": 0,
    "audio": 1,
    "audio_effects": 1,
    "sound_files": 1,
    "augmentation": 1,
    "layers": 1,
    "checkpoint": 1,
    "machine": 1,
    "cuda": 1,
    "memory": 1,
    "quantization": 1,
    "tokenizer": 2,
    "language": 2,
    "decoder": 2,
    "released": 3,
    "models": 4,
    "vllm_processor": 4,
    "client": 4,
    "conversation": 5,
    "evaluation": 6,
    "training": 7,
    "serving": 7,
    "talk": 7,
    "scale": 7,
    "doctor": 7,
    "cli": 8,
    "__main__": 9,
    "__init__": 9,
}
NO_TORCH_BELOW = 1
NAMELESS = {"utils", "util", "common", "helpers", "helper", "misc"}


def room(module: str) -> str:
    """`duologue.tokenizer.encoder` lies in the room `tokenizer`, `duologue` itself in `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def is_package(path: Path) -> bool:
    return path.name == "__init__.py"


@functools.cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def imports(source: str, module: str, package: bool, known: set[str]) -> Iterator[str]:
    """Every module that the source imports, wherever the statement stands: inside functions and TYPE_CHECKING too."""
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + (1 if package else 0)]
                base = ".".join([*parts, base] if base else parts)
            for (
                alias
            ) in node.names:  # `from duologue import rates` imports a module, `from duologue.rates import x` not
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base


def faults_of(source: str, module: str, package: bool = False, known: set[str] | None = None) -> list[str]:
    own = room(module)
    found = []
    for target in imports(source, module, package, known or set()):
        top = target.split(".")[0]
        if top == "recipes":
            found.append(f"{module} imports {target}: the package never uses its recipes")
        if top == "torch" and LAYERS[own] < NO_TORCH_BELOW:
            found.append(f"{module} imports {target}: layer 0 knows no torch")
        if top != "duologue":
            continue
        other = room(target)
        if other not in LAYERS:
            found.append(f"{module} imports {target}, which is not in the table")
        elif LAYERS[other] > LAYERS[own]:
            found.append(f"{module} (layer {LAYERS[own]}) imports {target} (layer {LAYERS[other]})")
        elif LAYERS[other] == LAYERS[own] and other != own and (is_folder(own) or is_folder(other)):
            found.append(f"{module} imports {target}: folders of one layer never import each other")
    return found


def is_folder(name: str) -> bool:
    return name in {
        "tokenizer",
        "language",
        "decoder",
        "released",
        "conversation",
        "evaluation",
        "training",
        "serving",
        "talk",
        "scale",
        "client",
        "cli",
    }


SOURCES = sorted(PACKAGE.rglob("*.py"))
KNOWN = {module_name(path) for path in SOURCES}


def test_every_room_is_in_the_table_with_its_kind() -> None:
    for path in PACKAGE.iterdir():
        if path.suffix == ".py":
            assert path.stem in LAYERS, f"{path.name} is not in the table of layers"
            assert not is_folder(path.stem)
        elif path.is_dir() and any(path.rglob("*.py")):
            assert path.name in LAYERS, f"{path.name}/ is not in the table of layers"
            assert is_folder(path.name)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    faults = faults_of(path.read_text(encoding="utf-8"), module_name(path), is_package(path), KNOWN)
    assert not faults, "\n".join(faults)


def test_no_circle() -> None:
    graph = {
        module_name(path): {
            target
            for target in imports(path.read_text(encoding="utf-8"), module_name(path), is_package(path), KNOWN)
            if target in KNOWN and target != module_name(path)
        }
        for path in SOURCES
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "imports in a circle: " + " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


# Rooms on the longest chain of imports between rooms, both ends included. The number may only become smaller.
MAX_FLOORS = 9


def test_the_floors_of_imports_are_few() -> None:
    """A room is a file or folder of the package. Its floor is one above the highest room that it imports."""
    below: dict[str, set[str]] = {name: set() for name in LAYERS}
    for path in SOURCES:
        own = module_name(path)
        for target in imports(path.read_text(encoding="utf-8"), own, is_package(path), KNOWN):
            if target.split(".")[0] == "duologue" and room(target) != room(own):
                below[room(own)].add(room(target))

    @functools.cache
    def floor(name: str) -> int:
        return 1 + max(map(floor, below[name]), default=0)

    assert max(map(floor, LAYERS)) == MAX_FLOORS, {name: floor(name) for name in sorted(LAYERS, key=floor)}


def test_the_runs_of_the_interleave_stand_in_one_place() -> None:
    for path in SOURCES:
        if path.stem == "interleave":
            continue
        for node in ast.walk(parsed(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and type(node.value) is int and node.value in (13, 26):
                pytest.fail(f"{path.name}:{node.lineno} says {node.value}; runs are interleave.py's alone")


# Names that two modules still share; the list may only become shorter.
SHARED_CLASS_NAMES = {
    "AudioDelta",
    "Encoder",
    "ErrorBody",
    "ErrorDetails",
    "Part",
    "Playback",
    "Session",
    "Speaker",
    "TextDelta",
    "Timings",
}


def test_a_class_name_exists_once() -> None:
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in parsed(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    doubles = {name: files for name, files in places.items() if len(files) > 1 and name not in SHARED_CLASS_NAMES}
    assert not doubles, f"classes of one name: {doubles}"


def tracked_sources() -> list[Path]:
    folders = (PACKAGE, ROOT / "recipes", ROOT / "tests", ROOT / "benchmarks")
    return sorted(path for folder in folders if folder.is_dir() for path in folder.rglob("*.py"))


def test_a_file_is_read_in_one_sitting() -> None:
    too_long = {
        str(path.relative_to(ROOT)): length
        for path in tracked_sources()
        if (length := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not too_long, f"over {MAX_LINES} lines: {too_long}"


def test_every_room_has_a_name_of_its_own() -> None:
    for path in tracked_sources():
        parts = {part.removesuffix(".py").strip("_") for part in path.relative_to(ROOT).parts}
        assert not parts & NAMELESS, f"{path.relative_to(ROOT)} says nothing about what is in it"


@pytest.mark.parametrize(
    ("source", "module", "fault"),
    [
        ("from duologue.training import loop", "duologue.evaluation.report", "layer 7"),
        ("def f():\n    import duologue.cli", "duologue.conversation.chatbot", "layer 8"),
        (
            "if TYPE_CHECKING:\n    from ..decoder.flow import Flow",
            "duologue.tokenizer.encoder",
            "never import each other",
        ),
        ("from . import checkpoint", "duologue.vocabulary", "layer 1"),
        ("import torch.nn as nn", "duologue.interleave", "no torch"),
        ("from duologue.serving import server", "duologue.training.loop", "never import each other"),
        ("from duologue import load", "duologue.audio", "layer 9"),
        ("from duologue.gadgets import x", "duologue.cli", "not in the table"),
        ("import recipes.pocket.corpus", "duologue.cli", "never uses its recipes"),
    ],
)
def test_the_reader_sees_what_is_forbidden(source: str, module: str, fault: str) -> None:
    known = {"duologue.checkpoint", "duologue.training.loop", "duologue.serving.server"}
    assert any(fault in found for found in faults_of(source, module, known=known))


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from .interleave import Kind", "duologue.vocabulary"),
        ("from duologue import rates", "duologue.decoder.flow"),
        ("from .. import layers", "duologue.tokenizer.encoder"),
        ("from .quantizer import Quantizer", "duologue.tokenizer.tokenizer"),
        ("import numpy", "duologue.turns"),
    ],
)
def test_the_reader_lets_pass_what_is_allowed(source: str, module: str) -> None:
    assert faults_of(source, module, known={"duologue.rates", "duologue.layers"}) == []
