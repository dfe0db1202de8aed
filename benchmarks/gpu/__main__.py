"""Runs the sections, see `benchmarks.gpu`.

A lost device, or a section that does not end, costs the rest of that section: the process starts again with the
sections after it, and appends to the same file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.gpu.decoder import decoder
from benchmarks.gpu.facts import facts
from benchmarks.gpu.finetuning import finetuning
from benchmarks.gpu.language import engine, model
from benchmarks.gpu.record import Record, Run
from benchmarks.gpu.streams import streams
from benchmarks.gpu.training import training
from benchmarks.gpu.variants import variants
from benchmarks.gpu.whole import sessions
from benchmarks.gpu.works import does_it_run
from duologue.cuda import set_float32_precision

# Sections in order, with their seconds. Those after `model` use its language model.
SECTIONS: dict[str, tuple[Callable[[Run], None], float]] = {
    "facts": (facts, 12),
    "does_it_run": (does_it_run, 40),
    "training": (training, 45),
    "model": (model, 20),
    "engine": (engine, 35),
    "decoder": (decoder, 70),
    "streams": (streams, 20),
    "sessions": (sessions, 85),
    "variants": (variants, 70),
    "finetuning": (finetuning, 40),
}
NEED_MODEL = ("engine", "streams", "sessions", "variants", "finetuning")
GRACE_S = 25.0  # after a section's deadline, before the process is given up
LIMIT_S = 300.0
TINY_PATIENCE = 20  # small models test the sections themselves, on machines that may be busy


def main(arguments: Sequence[str] | None = None) -> Record:
    """Runs the benchmark and returns its record."""
    args = _parser().parse_args(arguments)
    chosen = _chosen(args.only)
    device = torch.device(args.device)
    start = time.time()
    record = Record(args.output, start)
    run = Run(device, args.tiny, record)
    record.section = "run"
    record.add("device", torch.cuda.get_device_name(device) if run.on_cuda else "cpu", torch=torch.__version__)
    record.add("commit", _commit(), sections=chosen, limit_s=args.limit)
    for number, name in enumerate(chosen):
        work, seconds = SECTIONS[name]
        record.section = name
        left = start + args.limit - time.time()
        if left < 3:
            record.add("left out", None, reason="no time")
            continue
        run.ends_at = time.time() + min(seconds * (TINY_PATIENCE if run.tiny else 1), left)
        rest = chosen[number + 1 :]
        set_float32_precision(device)
        guard = threading.Timer(
            run.ends_at - time.time() + GRACE_S, _start_again, (args, rest, start, "the section did not end", record)
        )
        guard.daemon = True
        if run.on_cuda:
            guard.start()
        began = time.time()
        with record.attempt(name):
            work(run)
        guard.cancel()
        try:
            run.sync()
            if run.on_cuda:
                torch.cuda.empty_cache()
        except RuntimeError as error:
            _start_again(args, rest, start, f"the device is lost: {' '.join(str(error).split())[:200]}", record)
        record.add("section", time.time() - began, "s")
    print("\n" + record.table(), flush=True)
    return record


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Benchmark of a CUDA device.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="small models and few repetitions")
    parser.add_argument("--only", default="", help=f"sections, with commas: {', '.join(SECTIONS)}")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help=f"seconds in all (default: {LIMIT_S:g})")
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu.jsonl"), help="figures (default: gpu.jsonl)")
    return parser


def _chosen(only: str) -> list[str]:
    """Returns the sections in order, with the model if one of them needs it.

    Raises:
        ValueError: an unknown section.
    """
    names = only.split(",") if only else list(SECTIONS)
    if unknown := set(names) - set(SECTIONS):
        raise ValueError(f"unknown sections {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if set(names) & set(NEED_MODEL):
        names.append("model")
    return [name for name in SECTIONS if name in names]


def _commit() -> str:
    """Returns the commit of the working tree, or "unknown"."""
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or os.environ.get("COMMIT", "unknown")


def _start_again(args: argparse.Namespace, rest: Sequence[str], start: float, reason: str, record: Record) -> None:
    """Replaces the process by one that runs the remaining sections."""
    record.add("given up", None, error=reason)
    print("\n" + record.table(), flush=True)
    left = start + args.limit - time.time()
    if not rest or left < 10:
        os._exit(1)
    os.closerange(3, 65536)  # the memory of the device belongs to open files
    again = [sys.executable, "-m", "benchmarks.gpu", "--only", ",".join(rest), "--limit", f"{left:.0f}"]
    again += ["--device", args.device, "-o", str(args.output), *(["--tiny"] if args.tiny else [])]
    os.execv(sys.executable, again)


if __name__ == "__main__":
    main()
