"""The Prometheus pages of several cells as one page."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?( .*)")


def join_expositions(pages: Mapping[str, str]) -> str:
    """Joins pages in Prometheus's text format; each sample gets the label `cell`.

    Args:
        pages: by the name of the cell.

    Raises:
        ValueError: a line is no sample.
    """
    comments: dict[str, list[str]] = {}  # HELP and TYPE by family
    samples: dict[str, list[str]] = {}
    for cell, page in sorted(pages.items()):
        family = ""
        known = set(comments)
        for line in page.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                if family not in known:
                    comments.setdefault(family, []).append(line)
            elif line and not line.startswith("#"):
                found = _SAMPLE.fullmatch(line)
                if found is None:
                    raise ValueError(f"{line[:100]!r} is not a sample of a metric")
                name, labels, value = found.groups()
                label = f'cell="{cell}"' + (f",{labels}" if labels else "")
                samples.setdefault(family, []).append(f"{name}{{{label}}}{value}")
    lines = [line for family, rows in samples.items() for line in (*comments.get(family, ()), *rows)]
    return "".join(f"{line}\n" for line in lines)
