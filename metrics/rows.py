"""Score rows as ``metric-<name>.jsonl`` keeps them: reading, and comparing side by side."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What a comparison is about, as opposed to the protocol that ought to agree. Software versions are
# on record, but two of them are no two protocols.
SUBJECT_FIELDS = frozenset(
    {"source", "metric", "value", "values", "per_class", "noise_band", "seconds", "timestamp"}
    | {"snapshot", "snapshot_hash", "network", "kimg", "images", "images_hash", "reference"}
    | {"warnings", "packages", "per_item", "missing", "reason"}
)
_FIRST_COLUMNS = ("source", "snapshot", "network", "images", "kimg")


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
    if not rows:
        raise ValueError(f"{path}: holds no score rows.")
    return rows


def _one_row_a_line(lines: list[str]) -> list[str]:
    try:
        whole = json.loads("\n".join(lines))
    except ValueError:
        return lines
    if isinstance(whole, dict) and isinstance(whole.get("rows"), list):
        return [json.dumps(row) for row in whole["rows"]]
    return lines


def compare_rows(rows: Sequence[Mapping[str, Any]], *, anyway: bool = False) -> str:
    """Return a table for each metric in ``rows``.

    A protocol field that is equal in all rows of a metric is printed once below its table.

    Args:
        rows: Score rows, as :func:`read_rows` returns them.
        anyway: Also compare rows whose protocols differ; each field in which they do becomes a
            column whose heading starts with ``*``.

    Raises ValueError, naming those fields and their values, for rows of one metric whose protocols
    differ, unless ``anyway``.
    """
    by_metric = {
        str(row["metric"]): [r for r in rows if r["metric"] == row["metric"]] for row in rows
    }
    if not anyway:
        for metric, own in by_metric.items():
            _refuse_differences(metric, own)
    return "\n\n".join(
        _table(metric, [_flat(row) for row in own]) for metric, own in by_metric.items()
    )


def _refuse_differences(metric: str, rows: Sequence[Mapping[str, Any]]) -> None:
    flat = [_flat(row) for row in rows]
    differences = []
    for name in differing_fields(rows):
        values = dict.fromkeys(_short(name, row.get(name, "unknown")) for row in flat)
        differences.append(f"{name} ({' | '.join(values)})")
    if differences:
        raise ValueError(
            f"{metric}: the rows cannot be compared, because their protocols differ in "
            f"{', '.join(differences)}; score them alike, or print them side by side with --anyway."
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
        elif isinstance(value, float) and (prefix + name).startswith(("value", "noise_band.")):
            result[prefix + name] = f"{value:.6g}"
        else:
            result[prefix + name] = json.dumps(value)
    return result


def _table(metric: str, rows: list[dict[str, str]]) -> str:
    differing = differing_fields(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    values = [name for name in names if name.startswith("values.")]
    values = values if len(values) > 1 else ["value"]
    shown = (".mean", ".std", ".min")
    values += [name for name in names if name.startswith("noise_band.") and name.endswith(shown)]
    columns = [name for name in _FIRST_COLUMNS if name in names] + values + differing
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
        for text in _texts(row.get("warnings", "[]"))
    ]
    return "\n".join(lines + warnings)


def _texts(field: str) -> list[str]:
    """Return the texts of a list in a row, or the one text that another program wrote there."""
    try:
        found = json.loads(field)
    except ValueError:
        return [field]
    return [str(text) for text in found] if isinstance(found, list) else [field]


def _short(name: str, value: str) -> str:
    return value[:12] if name.endswith("hash") else value
