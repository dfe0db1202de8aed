"""Checks of this machine: what works, what is missing, and the command that fixes it."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from duologue import machine

MIN_PYTHON = (3, 11)
MIN_MEMORY_GB = 2.0
MIN_DISK_GB = 1.0

# extra -> (purpose, distributions)
EXTRAS = {
    "serve": (
        "duologue serve",
        ("fastapi", "uvicorn", "websockets", "python-multipart", "prometheus-client", "onnxruntime"),
    ),
    "talk": ("duologue talk", ("websockets", "sounddevice", "rich", "livekit")),
    "train": ("training", ("tensorboard", "matplotlib", "pyarrow", "whisper_normalizer")),
    "eval": (
        "evaluation",
        ("faster_whisper", "whisper_normalizer", "speechmos", "librosa", "onnxruntime", "matplotlib"),
    ),
    "dev": ("tests and checks", ("pytest", "hypothesis", "schemathesis", "httpx", "ruff", "mypy")),
}
# program -> (purpose, Debian packages)
PROGRAMS = {
    "flite": ("the corpus of pocket", "flite"),
    "text2wave": ("the corpus of pocket", "festival festvox-us-slt-hts festvox-kallpc16k festvox-kdlpc16k"),
    "espeak-ng": ("the corpus of pocket", "espeak-ng"),
    "make": ("make demo, make test", "make"),
}


class CheckState(StrEnum):
    OK = "ok"
    MISSING = "missing"  # optional part
    BROKEN = "broken"  # required part


@dataclass(frozen=True)
class Check:
    """The result of one check. `mend` is the command that fixes a problem, or empty."""

    name: str
    state: CheckState
    found: str
    mend: str = ""


def examine(model: str | Path = "pocket") -> list[Check]:
    """Checks the machine, the libraries and one model. Changes nothing."""
    return [*_machine(), *_torch(), *_extras(), *_sound(), *_programs(), *_model(model)]


def format_checks(checks: list[Check]) -> str:
    """Formats the results as aligned lines, each fix below its check."""
    width = max(len(check.name) for check in checks)
    marks = {CheckState.OK: "ok     ", CheckState.MISSING: "missing", CheckState.BROKEN: "BROKEN "}
    lines = []
    for check in checks:
        lines.append(f"{marks[check.state]}  {check.name:{width}}  {check.found}".rstrip())
        if check.mend:
            lines.append(f"{'':9}{'':{width}}  -> {check.mend}")
    return "\n".join(lines)


def _machine() -> Iterator[Check]:
    version = platform.python_version()
    new_enough = sys.version_info >= MIN_PYTHON
    minimum = ".".join(map(str, MIN_PYTHON))
    yield Check(
        "Python",
        CheckState.OK if new_enough else CheckState.BROKEN,
        version,
        "" if new_enough else f"install Python {minimum} or newer, then: make PYTHON=/path/to/python3 demo",
    )
    flags = machine.processor_flags()
    fast = [
        name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-bf16"), ("avx2", "AVX2")) if flag in flags
    ]
    yield Check(
        "processor",
        CheckState.OK,
        f"{machine.processor_name()}, {machine.num_cores()} cores, {', '.join(fast) or 'no vector extensions found'}",
    )
    memory = machine.free_memory_gb()
    if memory is not None:
        enough = memory >= MIN_MEMORY_GB
        note = "" if enough else f"close other programs: pocket needs {MIN_MEMORY_GB:.0f} GB of free memory"
        yield Check("memory", CheckState.OK if enough else CheckState.MISSING, f"{memory:.1f} GB free", note)
    disk = shutil.disk_usage(Path.cwd()).free / 1e9
    enough = disk >= MIN_DISK_GB
    note = "" if enough else f"free at least {MIN_DISK_GB:.0f} GB here; trainings need more"
    yield Check("disk", CheckState.OK if enough else CheckState.MISSING, f"{disk:.1f} GB free here", note)


def _torch() -> Iterator[Check]:
    try:
        import torch
    except ImportError:
        yield Check("torch", CheckState.BROKEN, "not installed", "pip install -c constraints.txt -e .")
        return
    yield Check("torch", CheckState.OK, f"{torch.__version__}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        yield Check(
            "GPU", CheckState.OK, f"{torch.cuda.get_device_name(0)}, {memory:.0f} GB; use it with --device cuda"
        )
    else:
        yield Check("GPU", CheckState.OK, "none usable by torch; models run on the processor")


def _extras() -> Iterator[Check]:
    for extra, (purpose, names) in EXTRAS.items():
        missing = [name for name in names if _version(name) is None]
        if missing:
            mend = f'pip install -c constraints.txt -e ".[{extra}]"'
            yield Check(f"extra {extra}", CheckState.MISSING, f"for {purpose}: without {', '.join(missing)}", mend)
        else:
            yield Check(f"extra {extra}", CheckState.OK, f"for {purpose}: complete")


def _sound() -> Iterator[Check]:
    """Loads PortAudio and asks it for the default devices, which an installed package alone does not prove."""
    try:
        import sounddevice
    except ImportError:
        return  # reported as a part of its extra
    except OSError as error:
        mend = "sudo apt-get install libportaudio2 (macOS: brew install portaudio)"
        yield Check("PortAudio", CheckState.MISSING, f"for duologue talk: {error}", mend)
        return
    yield Check("PortAudio", CheckState.OK, sounddevice.get_portaudio_version()[1])
    for name, kind, open_default in (
        ("microphone", "input", sounddevice.check_input_settings),
        ("loudspeaker", "output", sounddevice.check_output_settings),
    ):
        try:
            device = sounddevice.query_devices(kind=kind)
            open_default(samplerate=device["default_samplerate"], channels=1, dtype="int16")
        except (ValueError, sounddevice.PortAudioError) as error:
            mend = "talk through the page of duologue serve, or give duologue talk audio files"
            yield Check(name, CheckState.MISSING, f"for duologue talk: none can be opened ({error})", mend)
        else:
            yield Check(name, CheckState.OK, f"{device['name']}, {device['default_samplerate']:.0f} Hz")


def _programs() -> Iterator[Check]:
    for program, (purpose, packages) in PROGRAMS.items():
        path = shutil.which(program)
        if path:
            yield Check(program, CheckState.OK, f"for {purpose}")
        else:
            yield Check(program, CheckState.MISSING, f"for {purpose}", f"sudo apt-get install {packages}")


def _model(name: str | Path) -> Iterator[Check]:
    """Checks that the model exists, is trained and is consistent (the hashes of its parts match)."""
    label = f"model {name}"
    mend = "make pocket" if str(name) == "pocket" else ""
    try:
        from duologue.conversation.chatbot import model_folder
        from duologue.models import CARD_FILE, Models

        folder = model_folder(name)
        if not (folder / CARD_FILE).exists():
            yield from _released(folder)
            return
        card = Models.load(folder).card  # checks every part
    except ImportError as error:
        yield Check(label, CheckState.BROKEN, f"cannot be checked: {error}", "pip install -c constraints.txt -e .")
        return
    except ValueError as error:
        mend = f"git checkout -- {_shown(Path(__file__).parent / 'pocket')} or: make pocket" if mend else ""
        yield Check(label, CheckState.BROKEN, str(error), mend)
        return
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6
    if card.trained:
        yield Check(label, CheckState.OK, f"{card.name}, trained, {size:.0f} MB of weights, consistent parts")
    else:
        yield Check(label, CheckState.MISSING, f"{card.name}, random weights, meaningless answers", mend)


def _released(folder: Path) -> Iterator[Check]:
    """Checks a released set or part from its headers alone. Raises ValueError for a bad folder."""
    import torch

    from duologue.memory import estimate
    from duologue.quantization import check_available
    from duologue.released.folder import ReleasedFolder

    needed_memory = estimate(folder)
    released = ReleasedFolder.find(folder)
    if released is not None:
        released.check()
    for part in needed_memory.parts:
        needed = f"{part.needed_gb('float32'):.2f} GB"
        if part.is_language:
            in_schemes = (f"{part.needed_gb(scheme):.2f} GB in {scheme}" for scheme in ("bfloat16", "int8", "int4"))
            needed = f"{', '.join(in_schemes)}, {part.max_positions} tokens of conversation included"
        yield Check(f"part {part.name}", CheckState.OK, f"{part.num_parameters / 1e6:.1f} million parameters: {needed}")
    gpu_gb = torch.cuda.mem_get_info()[0] / 1e9 if torch.cuda.is_available() else 0.0
    advice = needed_memory.advise(machine.free_memory_gb() or 0.0, gpu_gb)
    if not advice.device:
        found = f"at least {advice.needed_gb:.1f} GB are needed, {advice.available_gb:.1f} GB are free"
        mend = f"duologue doctor --model {folder}  on a machine with more memory"
        yield Check("model fits", CheckState.BROKEN, found, mend)
        return
    if released is None:
        found = f"{advice.needed_gb:.1f} of {advice.available_gb:.1f} free GB ({advice.device}, {advice.scheme})"
        yield Check("part fits", CheckState.MISSING, found, "put tokenizer, language model and decoder into one folder")
        return
    command = f"duologue chat QUESTION.wav -o ANSWER.wav --model {folder}"
    command += f" --device {advice.device}" if advice.device != "cpu" else ""
    mend = ""
    if advice.scheme in ("int8", "int4"):
        command += f" --quantize {advice.scheme}"
        try:
            check_available(advice.scheme, torch.device(advice.device))
        except ValueError as error:
            mend = str(error).rpartition(": ")[2]
    found = f"{advice.needed_gb:.1f} of {advice.available_gb:.1f} free GB ({advice.device}, {advice.scheme}): {command}"
    yield Check("model fits", CheckState.MISSING if mend else CheckState.OK, found, mend)


def _shown(path: Path) -> str:
    """Returns the path relative to the working directory, if it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
