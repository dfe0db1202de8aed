"""Progress of long commands on standard error: the step, the number of steps, and the time that is left."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

FORMAT = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} so far, {remaining} left"
_REDRAW_S = 1.0


def bar(total: float, name: str, unit: str = "steps") -> tqdm[Any]:
    """Returns a line that shows "NAME: 3 of 20 steps, 00:06 so far, 00:34 left" at once, and on each `update(1)`."""
    return tqdm(total=total, desc=name, unit=unit, bar_format=FORMAT, mininterval=_REDRAW_S, file=sys.stderr)


def steps(items: Collection[Item], name: str, unit: str = "steps") -> Iterator[Item]:
    """Yields the items of a long loop and shows `bar`."""
    with bar(len(items), name, unit) as line:
        for item in items:
            yield item
            line.update(1)
