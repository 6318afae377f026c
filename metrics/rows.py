"""Score rows as ``metric-<name>.jsonl`` keeps them: reading, and comparing side by side."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What a comparison is about, as opposed to the protocol that ought to agree.
SUBJECT_FIELDS = frozenset(
    {"source", "metric", "value", "seconds", "timestamp", "kimg", "warnings"}
    | {"snapshot", "snapshot_hash", "network", "images", "reference"}
)
_FIRST_COLUMNS = ("source", "snapshot", "network", "images", "kimg", "value")


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the rows of a file, each with its ``source`` (file and line).

    The file holds one JSON row a line, or one JSON object with a list ``rows``. Raises ValueError
    that names the line which is no score row.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a file of score rows: {error}.") from error
    lines = _one_row_a_line(lines)
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or "metric" not in row or "value" not in row:
            raise ValueError(
                f"{path}:{number}: not a score row (a JSON object with 'metric' and 'value')."
            )
        rows.append({**row, "source": f"{path}:{number}"})
    return rows


def _one_row_a_line(lines: list[str]) -> list[str]:
    try:
        whole = json.loads("\n".join(lines))
    except ValueError:
        return lines
    if isinstance(whole, dict) and isinstance(whole.get("rows"), list):
        return [json.dumps(row) for row in whole["rows"]]
    return lines


def compare_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table for each metric in ``rows``, with the protocol fields that differ marked.

    A field that is equal in all rows of a metric is printed once below its table; one that is not
    becomes a column whose heading starts with ``*``.
    """
    metrics = dict.fromkeys(str(row["metric"]) for row in rows)
    return "\n\n".join(
        _table(metric, [_flat(row) for row in rows if row["metric"] == metric])
        for metric in metrics
    )


def differing_fields(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the protocol fields in which rows of one metric differ.

    Fields of nested objects are named like ``sampling.steps``; a missing one differs from a value.
    """
    flat = [_flat(row) for row in rows]
    return [
        name
        for name in dict.fromkeys(name for row in flat for name in row)
        if name.partition(".")[0] not in SUBJECT_FIELDS
        and len({row.get(name, "-") for row in flat}) > 1
    ]


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a row as text by dotted name."""
    result: dict[str, str] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            result.update(_flat(value, f"{prefix}{name}."))
        elif isinstance(value, str):
            result[prefix + name] = value
        elif name == "value" and isinstance(value, float):
            result[prefix + name] = f"{value:.6g}"
        else:
            result[prefix + name] = json.dumps(value)
    return result


def _table(metric: str, rows: list[dict[str, str]]) -> str:
    differing = differing_fields(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in _FIRST_COLUMNS if name in names] + differing
    heading = [f"*{name}" if name in differing else name for name in columns]
    cells = [[_short(name, row.get(name, "-")) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(heading, *cells, strict=True)]
    lines = [metric]
    for line in [heading, *cells]:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        lines.append("  " + "  ".join(padded).rstrip())
    equal = [
        f"{name}={_short(name, rows[0][name])}"
        for name in names
        if name not in columns and name.partition(".")[0] not in SUBJECT_FIELDS
    ]
    if equal:
        lines.append(f"  equal in all rows: {', '.join(equal)}")
    if differing:
        lines.append(f"  not comparable: the rows differ in {', '.join(differing)}")
    warnings = [
        f"  {row.get('source', metric)}: {text}"
        for row in rows
        for text in json.loads(row.get("warnings", "[]"))
    ]
    return "\n".join(lines + warnings)


def _short(name: str, value: str) -> str:
    return value[:12] if name.endswith("hash") else value
