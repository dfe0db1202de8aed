"""Independent jobs in the workers of a Ray cluster (extra `scale`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Item = TypeVar("Item")
Recipe = TypeVar("Recipe", bound="DataclassInstance")
THIS_MACHINE = "local"
MAX_RETRIES = 5


def run_on_ray(
    job: Callable[[Item], object], items: Sequence[Item], address: str, num_gpus: float = 0.0, description: str = ""
) -> None:
    """Runs `job` once for every item. A job whose worker died is run again.

    A job must write its result atomically and must skip a result that exists. Each result then exists exactly once,
    whatever worker died when.

    Args:
        job: importable in the workers; its files must be on a disk that all machines share.
        address: of a running cluster, such as "auto" or "ray://HOST:10001"; "local" starts Ray on this machine.
        num_gpus: GPUs of one job.

    Raises:
        RuntimeError: Ray is missing or cannot be reached, or a job lost its worker more than `MAX_RETRIES` times.
    """
    try:
        import ray
        from ray.exceptions import WorkerCrashedError
    except ImportError:
        raise RuntimeError('ray is not installed: run pip install -e ".[scale]"') from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"include_dashboard": False} if address == THIS_MACHINE else {"address": address}
    try:
        ray.init(log_to_driver=False, **options)
    except ConnectionError as error:
        raise RuntimeError(f"the Ray cluster {address} cannot be reached: {error}") from None

    def run(item: Item) -> None:
        job(item)

    try:
        remote = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=MAX_RETRIES)(run)
        waiting = {remote.remote(item): item for item in items}
        with tqdm(total=len(items), desc=description, unit="shard") as bar:
            while waiting:
                (done,), _ = ray.wait(list(waiting))
                item = waiting.pop(done)
                try:
                    ray.get(done)
                except WorkerCrashedError:
                    raise RuntimeError(f"{item}: its worker died {MAX_RETRIES + 1} times") from None
                bar.update()
    finally:
        ray.shutdown()


def run_jobs(job: Callable[[Item], object], items: Sequence[Item], address: str, device: str, description: str) -> None:
    """Runs `job` for every item: here one after another, or on the Ray cluster of an address.

    Raises:
        RuntimeError: as `run_on_ray`.
    """
    if address:
        run_on_ray(job, items, address, num_gpus=float(device.startswith("cuda")), description=description)
        return
    for item in items:
        job(item)


def with_absolute_paths(recipe: Recipe, *names: str) -> Recipe:
    """The recipe with absolute paths under these keys, a path or several each: workers have other working folders."""

    def absolute(value: str | Sequence[str]) -> str | tuple[str, ...]:
        return (
            str(Path(value).resolve()) if isinstance(value, str) else tuple(str(Path(one).resolve()) for one in value)
        )

    return replace(recipe, **{name: absolute(getattr(recipe, name)) for name in names})
