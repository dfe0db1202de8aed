"""The worker owns a device: work on its models is done one piece at a time, away from the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Worker:
    """One thread in which all steps of tokenizer and decoder run, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "worker")

    def submit(self, work: Callable[[], Result]) -> asyncio.Future[tuple[Result, float]]:
        """Starts work from inside an event loop; gives its result and the seconds it took."""
        return asyncio.get_running_loop().run_in_executor(self._executor, _timed, work)


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    start = time.perf_counter()
    with torch.inference_mode():
        result = work()
    return result, time.perf_counter() - start
