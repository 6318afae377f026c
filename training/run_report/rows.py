"""Reading the JSON files of a run, even if one is cut off or damaged."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dnnlib.files import read_file
from dnnlib.typed import parse_json

_MAX_BYTES = 200_000_000  # Only stats.jsonl, which is not read here, can become larger in a run.
_COUNT = re.compile(r"-(\d+)(?:\.(\d{3}))?(?=[-.]|$)")


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the JSON objects of a file, one per line, and the number of other non-empty lines."""
    rows, num_damaged = [], 0
    for line in read_text(path).splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip():
            num_damaged += 1
    return rows, num_damaged


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if it has none or cannot be read."""
    try:
        found = parse_json(read_text(path))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def read_text(path: Path) -> str:
    """Return the text of a file; an empty one if it cannot be read or exceeds 200 MB."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            return ""
        return read_file(path).decode("utf-8", errors="replace")
    except OSError:
        return ""


def kimg_of_name(name: str) -> float | None:
    """Return the kimg in a file name, such as 8 for ``fakes-000008.png``; None if it has none.

    Three decimals, as names of less than 1 kimg have them, count single images.
    """
    found = _COUNT.search(name)
    return int(found[1]) + int(found[2] or 0) / 1000 if found else None


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the plain values in nested objects by dotted names, such as ``training.batch``."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from flat(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, values


def is_finite(value: Any) -> bool:
    """Return whether a value read from JSON is a number of magnitude below 1e300, fit to draw."""
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
