"""Reads score rows, as in ``metric-<name>.jsonl`` files, and compares them side by side."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dnnlib.errors import refusal
from dnnlib.files import check_source
from dnnlib.typed import parse_json

# Fields that say what was scored and with what result. All others are the protocol, which must
# agree for a comparison. Package versions are recorded, but do not count as protocol.
SUBJECT_FIELDS = frozenset(
    {"source", "metric", "value", "values", "per_class", "noise_band", "seconds", "timestamp"}
    | {"snapshot", "snapshot_hash", "network", "kimg", "images", "images_hash", "reference"}
    | {"warnings", "packages", "per_item", "missing", "reason", "spread"}
)
_FIRST_COLUMNS = ("source", "snapshot", "network", "images", "kimg")


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the score rows of a file, each with its ``source``: the file and the row's line.

    The file holds one JSON row per line, or one JSON object with a list ``rows``, whose positions
    then stand for lines. Raises ValueError for a file that cannot be read or holds no score rows,
    and for a line that is not a score row, which it names.
    """
    path = Path(path)
    check_source(path, folder=False)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"{path}: cannot be read as a file of score rows: {reason}.") from error
    whole = _parsed("\n".join(lines))
    if isinstance(whole, dict) and isinstance(whole.get("rows"), list):
        found = whole["rows"]
    else:
        found = [_parsed(line) if line.strip() else "" for line in lines]
    rows = []
    for number, row in enumerate(found, start=1):
        if row == "":
            continue
        if not isinstance(row, dict) or not {"metric", "value"} <= row.keys():
            but = "not a score row (a JSON object with 'metric' and 'value')"
            raise ValueError(f"{path}:{number}: {but}.")
        rows.append({**row, "source": f"{path}:{number}"})
    if not rows:
        raise ValueError(f"{path}: holds no score rows.")
    return rows


def _parsed(text: str) -> Any:
    """Return the value of a JSON text; None if the text is not valid JSON."""
    try:
        return parse_json(text)
    except ValueError:
        return None


def compare_rows(rows: Sequence[Mapping[str, Any]], *, anyway: bool = False) -> str:
    """Return a text with one table for each metric in ``rows``.

    Protocol fields that are equal in all rows of a metric are listed once below its table. If the
    protocols of its rows differ, raises ValueError with the differing fields and their values; with
    ``anyway``, each of those fields becomes a column whose heading starts with ``*`` instead.
    """
    by_metric: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_metric.setdefault(str(row["metric"]), []).append(_flat(row))
    if not anyway:
        for metric, own in by_metric.items():
            _refuse_differences(metric, own)
    return "\n\n".join(_table(metric, own) for metric, own in by_metric.items())


def _refuse_differences(metric: str, rows: Sequence[Mapping[str, str]]) -> None:
    differences = []
    for name in differing_fields(rows):
        values = dict.fromkeys(_short(name, row.get(name, "unknown")) for row in rows)
        differences.append(f"{name} ({' | '.join(values)})")
    if differences:
        but = "the rows cannot be compared, because their protocols differ in"
        remedy = "score them alike, or print them side by side with --anyway"
        raise refusal(metric, but=f"{but} {', '.join(differences)}", remedy=remedy)


def differing_fields(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the protocol fields in which rows of one metric differ.

    Fields of nested objects have dotted names like ``sampling.steps``. A field that only some rows
    have counts as different.
    """
    flat = [_flat(row) for row in rows]
    names = filter(_is_protocol, dict.fromkeys(name for row in flat for name in row))
    return [name for name in names if len({row.get(name, "-") for row in flat}) > 1]


def protocol_of(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the protocol fields of a row as text, by dotted name."""
    return {name: text for name, text in _flat(row).items() if _is_protocol(name)}


def _is_protocol(name: str) -> bool:
    return name.partition(".")[0] not in SUBJECT_FIELDS


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return every field of a row as text, by dotted name."""
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
    hidden = [name for name in names if name not in columns and _is_protocol(name)]
    equal = [f"{name}={_short(name, rows[0][name])}" for name in hidden]
    if equal:
        lines.append(f"  equal in all rows: {', '.join(equal)}")
    if differing:
        lines.append(f"  not comparable: the rows differ in {', '.join(differing)}")
    for row in rows:
        field = row.get("warnings", "[]")
        found = _parsed(field)  # Other programs may have written something else than a list.
        texts = found if isinstance(found, list) else [field]
        lines += [f"  {row.get('source', metric)}: {text}" for text in texts]
    return "\n".join(lines)


def _short(name: str, value: str) -> str:
    return value[:12] if name.endswith("hash") else value
