"""`duologue scale`: the real-time server on several GPUs or machines, as cells of Ray Serve."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from duologue.cli import serve
from duologue.cli.parser import add_command, add_text_model, positive, text_model_options
from duologue.scale.settings import CellSettings
from duologue.serving.session_store import REDIS_SCHEMES
from duologue.serving.settings import Settings

CELL_ARGUMENTS = (
    "model",
    "device",
    "dtype",
    "quantize",
    "engine",
    "decoder_dtype",
    "cached_tokens",
    "engine_url",
    "gguf",
    "text_model",
    "text_model_name",
    "talker",
)


EXAMPLES = (
    "duologue scale --replicas 2",
    "duologue scale --replicas 8 --gpus 1 --device cuda --store redis://127.0.0.1:6379/0",
)


def add(commands: Any) -> None:
    text = "real-time server of several cells, spread by Ray Serve"
    scale = add_command(commands, "scale", _scale, text, model=True, examples=EXAMPLES)
    scale.add_argument(
        "--replicas", type=positive, default=1, metavar="N", help="cells, each with a model (default: 1)"
    )
    scale.add_argument(
        "--max-replicas", type=positive, metavar="N", help="start more cells while conversations are many"
    )
    scale.add_argument("--gpus", type=float, metavar="N", help="GPUs of a cell (default: 1 on CUDA, otherwise 0)")
    scale.add_argument("--cpus", type=float, default=1.0, metavar="N", help="processors of a cell (default: 1)")
    scale.add_argument(
        "--address", metavar="ADDRESS", help="running Ray cluster, such as auto (default: start Ray here)"
    )
    add_text_model(scale)
    serve.add_settings(scale)


def _scale(args: argparse.Namespace) -> None:
    text_model_options(args)  # refuses a talker alone
    settings = Settings(**serve.given_settings(args))
    if args.until_stdin_ends:
        serve.stop_when_stdin_ends()
    given = {name: getattr(args, name) for name in ("replicas", "max_replicas", "gpus", "cpus")}
    cells = cell_settings(settings, given, args.device)
    if settings.store and not settings.store.startswith(REDIS_SCHEMES):  # Ray chooses the folder that a cell runs in
        settings = dataclasses.replace(settings, store=str(Path(settings.store).resolve()))
    if importlib.util.find_spec("ray") is None:
        raise ValueError('ray is not installed: run pip install -e ".[serve,scale]" in the folder of Duologue')
    from duologue.scale.run import run
    from duologue.serving.server import listen, url_of

    # Finds a free port, and a port in use before any slow work. Ray's proxy binds it again.
    with listen(settings) as listening:
        url, port = url_of(listening), listening.getsockname()[1]
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING)

    def announce() -> None:
        if args.json:
            print(json.dumps({"url": url, "replicas": cells.replicas, "pid": os.getpid()}), flush=True)
            return
        print(f"{cells.replicas} cells are ready ({args.device}): open {url} and talk. Ctrl+C stops them.", flush=True)

    arguments = {name: getattr(args, name) for name in CELL_ARGUMENTS}
    build = functools.partial(build_cell, arguments, settings)
    run(build, cells, settings.host, port, args.address, announce)


def cell_settings(settings: Settings, given: Mapping[str, Any], device: str) -> CellSettings:
    """Returns the cells that fit a server's settings.

    Args:
        given: fields of `CellSettings`; None means the default.
    """
    values = {
        "gpus": float(device.startswith("cuda")),
        "capacity": settings.max_sessions,
        "requests": settings.max_requests,
        "drain_s": settings.drain_s,
    }
    return CellSettings(**{**values, **{name: value for name, value in given.items() if value is not None}})


class ServedCell:
    """The app of one cell, as `duologue.scale` uses it (`CellApp`)."""

    def __init__(self, asgi: Any) -> None:
        self.asgi, self._service = asgi, asgi.state.service

    @property
    def gather_metrics(self) -> Callable[[], Awaitable[bytes]] | None:
        gather: Callable[[], Awaitable[bytes]] | None = self._service.gather_metrics
        return gather

    @gather_metrics.setter
    def gather_metrics(self, gather: Callable[[], Awaitable[bytes]] | None) -> None:
        self._service.gather_metrics = gather

    def exposition(self) -> bytes:
        page: bytes = self._service.metrics.exposition()
        return page

    def drain(self) -> None:
        self._service.admission.drain()

    def num_active(self) -> int:
        return int(self._service.admission.num_active)


def build_cell(arguments: Mapping[str, Any], settings: Settings) -> ServedCell:
    """Loads the model and returns the app. Called in the process of the cell."""
    from duologue.conversation.chatbot import load
    from duologue.serving.app import create_app
    from duologue.serving.server import warm_up

    names = {"model": "name", "quantize": "quantization", "cached_tokens": "max_cached_tokens"}
    given: dict[str, Any] = {names.get(name, name): value for name, value in arguments.items()}
    bot = load(**given, max_sessions=settings.max_sessions)
    warm_up(bot)
    return ServedCell(create_app(bot, settings))


def application(arguments: Mapping[str, Any]) -> Any:
    """Builds the Ray Serve application of a configuration file: `import_path: duologue.cli.scale:application`.

    Args:
        arguments: those of `build_cell`, fields of `CellSettings` and fields of `Settings`. API keys come from the
            environment.

    Raises:
        ValueError: an unknown name, or a value out of its range.
    """
    from duologue.scale.cells import application as application_of

    model, cells, settings = read_arguments(arguments)
    return application_of(functools.partial(build_cell, model, settings), cells)


def read_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], CellSettings, Settings]:
    """Returns the arguments of `build_cell`, the cells and the settings. Raises ValueError as `application`."""
    kinds = {name: kind for kind in (CellSettings, Settings) for name in _names(kind)}
    unknown = set(arguments) - set(kinds) - set(CELL_ARGUMENTS)
    if unknown:
        raise ValueError(f"a cell has no argument {', '.join(sorted(unknown))}")
    # Ray's proxy listens for other machines, so that the cells need API keys.
    basis = {"host": "0.0.0.0", "api_keys": serve.read_keys(None)}
    settings = Settings(
        **{**basis, **{name: value for name, value in arguments.items() if kinds.get(name) is Settings}}
    )
    given = {name: value for name, value in arguments.items() if kinds.get(name) is CellSettings}
    model = {"model": "pocket", **{name: value for name, value in arguments.items() if name in CELL_ARGUMENTS}}
    return model, cell_settings(settings, given, str(model.get("device", "cpu"))), settings


def _names(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}
