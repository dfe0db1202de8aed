"""The README: its script runs as it stands, and the commands for a fresh clone exist."""

import re
from pathlib import Path

import pytest
import soundfile

from duologue.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_script_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    (tmp_path / "src").symlink_to(ROOT / "src")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(script, "README.md", "exec"), names)
    out = capsys.readouterr().out
    assert out.count("Paris") == 2  # the answer at once, and the one of the conversation
    assert " samples]" in out
    assert soundfile.info("answer.wav").samplerate == 22_050
    assert Path("talk.json").is_file()
    assert len(names["session"].conversation.turns) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_first_commands_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    first = [line.split("#")[0].split() for line in text.split("    make demo", 1)[1].splitlines()[1:3]]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"demo", "serve", "test"} <= set(targets)
    assert first[1] == ["make", "serve"]
    program, command, question, *_ = first[0]
    assert program == ".venv/bin/duologue"  # `make demo` does not put it on the path
    assert command == "chat"
    assert (ROOT / question).is_file()


def test_every_command_of_the_readme_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    block = README.split("## The commands")[1].split("Every command")[0]
    listed = set(re.findall(r"(?:^ {4}| {3})duologue ([a-z-]+)", block, re.MULTILINE))
    assert {"chat", "serve", "doctor", "plot"} <= listed
    with pytest.raises(SystemExit):
        main(["--help"])
    words = capsys.readouterr().out.split()
    assert [command for command in sorted(listed) if command not in words] == []
