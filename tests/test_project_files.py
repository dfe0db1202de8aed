"""Files around the package that no program of ours reads: versions, the workflow, the container of the server."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

import duologue
from duologue import cli
from duologue.serving.middleware import OPEN_PATHS
from duologue.serving.settings import Settings

ROOT = Path(__file__).parent.parent


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_stands_alike_in_three_places() -> None:
    assert f"\nversion: {duologue.__version__}\n" in read("CITATION.cff")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", read("CHANGELOG.md"), re.MULTILINE)
    assert released[0] == duologue.__version__
    assert released == sorted(released, key=lambda version: [int(part) for part in version.split(".")], reverse=True)


def test_the_workflow_runs_make_test_on_every_supported_python() -> None:
    job = yaml.safe_load(read(".github/workflows/test.yml"))["jobs"]["test"]
    assert any(step.get("run", "").startswith("make test") for step in job["steps"])
    head = "Programming Language :: Python :: "
    classifiers = tomllib.loads(read("pyproject.toml"))["project"]["classifiers"]
    assert job["strategy"]["matrix"]["python"] == [one.removeprefix(head) for one in classifiers if head in one]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (word, arguments)."""
    lines = [line for line in read("Dockerfile").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def test_the_container_is_built_from_files_that_are_there_for_a_user_without_rights() -> None:
    steps = instructions()
    words = [word for word, _ in steps]
    assert words[:2] == ["ARG", "FROM"]
    assert steps[0][1].startswith("BASE=")
    assert steps[1][1] == "${BASE}"
    copied = [path for word, rest in steps if word == "COPY" for path in rest.split()[:-1]]
    kept = {line.removeprefix("!") for line in read(".dockerignore").splitlines() if line.startswith("!")}
    assert {path.removeprefix("./") for path in copied} == kept
    assert all((ROOT / path).exists() for path in copied)
    user = words.index("USER")
    assert "RUN" not in words[user:], "what needs rights comes before"
    assert int(steps[user][1]) > 0


def test_the_container_starts_a_server_that_needs_keys_and_is_asked_for_its_health() -> None:
    steps = dict(instructions())
    command = json.loads(steps["ENTRYPOINT"])
    args = cli.argument_parser().parse_command(command[1:])
    assert command[0] == "duologue"
    assert args.port == int(steps["EXPOSE"])
    with pytest.raises(ValueError, match="needs API keys"):
        Settings(host=args.host, port=args.port)
    assert not Settings(host=args.host, port=args.port, api_keys=("a-key-of-the-container",)).is_loopback
    asked = re.search(
        r"http://127\.0\.0\.1:(\d+)(/\w+)", shlex.join(json.loads(steps["HEALTHCHECK"].split("CMD", 1)[1]))
    )
    assert asked is not None
    assert int(asked[1]) == args.port
    assert asked[2] in OPEN_PATHS
