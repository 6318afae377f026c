"""A file of reference curves: what it holds, and how it is read and written (docs/formats.md)."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from dnnlib.errors import refusal
from dnnlib.files import atomic_write, check_source, read_file
from dnnlib.typed import JsonFormat, typed
from training.reference_curves.settings import DataFacts

RUN_FILE = "reference.json"  # In the folder of a run: the reference that it is compared with.
_FORMAT = JsonFormat(
    "setdiffit-reference-curves",
    1,
    "fid.py curves",
    "make it again with fid.py curves, or take the file from where it came",
)
_MAX_BYTES = 20_000_000
_DIGITS = 5  # Significant digits of a number in a file.


@dataclasses.dataclass(frozen=True)
class Curve:
    """A curve at T points, with its band.

    Attributes:
        kind: ``window`` if each value is the mean since the previous point, the first since
            ``start``; ``point`` if it is measured at the point.
        start: Kimg at which the first window begins; 0 for points.
        kimg: [T], ascending.
        mean, spread, low, high: [T], see :class:`~training.reference_curves.bands.Band`.
        values: [S][T], values of each run.
        protocol: How a score is measured; None for statistics.
    """

    kind: str
    start: float
    kimg: list[float]
    mean: list[float]
    spread: list[float]
    low: list[float]
    high: list[float]
    values: list[list[float]]
    protocol: dict[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Published:
    """A figure that others have published and that was not measured here."""

    metric: str
    name: str  # Which of the metric's values.
    value: float
    settings: str
    source: str


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """How many of the runs lie in the bands that the other runs give."""

    num_inside: int
    num_runs: int


@dataclasses.dataclass(frozen=True)
class Reference:
    """The content of a file.

    Attributes:
        preset: The preset of the runs.
        settings: What the curves depend on, by name; see ``deciding_settings``.
        data: What the runs were trained on.
        kimg: Where the longest curves of means over ticks end.
        total_kimg: Configured duration of the runs.
        coverage: Probability that a further run lies in all bands, from the first point to the
            last.
        left_out: Result of judging each run by the bands of the others; None if not tried.
        curves: By name: a statistic of ``stats.jsonl``, or METRIC/VALUE of a score.
        published: Figures that others have published.
        command: Command that trained the first run.
        packages: Versions of the packages that it ran with.
        note: Further remarks.
    """

    preset: str
    settings: dict[str, str]
    data: DataFacts
    kimg: float
    total_kimg: float
    num_runs: int
    coverage: float
    left_out: LeftOut | None
    curves: dict[str, Curve]
    published: list[Published]
    command: str = ""
    packages: dict[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""


def read_reference(path: Path, where: str = "") -> Reference:
    """Return the reference in a file; ``where`` is the option that named the file.

    Raises ValueError with one sentence for any other file, or a damaged one.
    """
    check_source(path, where=where, folder=False)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise refusal(path, but="is far too large for a file of reference curves")
        content = read_file(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}.") from error
    return _FORMAT.parse(content, path, _made)


def _made(values: dict[str, Any]) -> Reference:
    found = typed(Reference, values)
    for name, curve in found.curves.items():
        columns = (curve.mean, curve.spread, curve.low, curve.high, *curve.values)
        if not curve.kimg or any(len(column) != len(curve.kimg) for column in columns):
            raise ValueError(f"curves.{name} has columns of several lengths")
        if sorted({curve.start, *curve.kimg})[-len(curve.kimg) :] != curve.kimg:
            raise ValueError(f"curves.{name}.kimg does not ascend")
        if curve.kind not in ("window", "point"):
            raise ValueError(f"curves.{name}.kind is {curve.kind!r}")
        if not all(low > 0 for low in curve.low):
            raise ValueError(f"curves.{name}.low is not positive")
    return found


def is_reference(path: Path) -> bool:
    """Return True for a file of reference curves; raises ValueError for any other file."""
    return bool(read_reference(path))


def write_reference(path: Path, reference: Reference) -> None:
    """Write a reference to a file atomically, with one line per column of a curve."""
    values = dict(format=_FORMAT.name, version=_FORMAT.version, **dataclasses.asdict(reference))
    curves = values.pop("curves")
    text = json.dumps(values, indent=1)[: -len("\n}")]
    parts = []
    for name, curve in curves.items():
        lines = [f"   {json.dumps(key)}: {_compact(value)}" for key, value in curve.items()]
        parts.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    text += ',\n "curves": {\n' + ",\n".join(parts) + "\n }\n}\n"
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(text)


def _compact(value: Any) -> str:
    return json.dumps(_rounded(value))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    return [_rounded(item) for item in value] if isinstance(value, list) else value
