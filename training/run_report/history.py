"""The curves in ``stats.jsonl``: read while a run writes them, and thinned for drawing."""

import math
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dnnlib.typed import parse_json

_MAX_BUCKETS = 660  # Points of a curve, each with three numbers: mean, minimum and maximum.
_MAX_CURVES = 1_000
VALIDATION = "Validation/"  # Prefix of statistics that only ticks with a validation have.


class Curve(NamedTuple):
    """Points of a curve; ``low`` and ``high`` are the range around each, if it has one.

    In a thinned curve, a point is the mean of several, with their range.
    """

    x: list[float]
    y: list[float | None]
    low: list[float | None] | None = None
    high: list[float | None] | None = None


class History:
    """The statistics of a run, tick by tick; :meth:`read` adds the rows written since.

    A row that cannot be read is left out and counted. If kimg goes back, as after a kill, a row
    replaces all earlier rows of the same or higher kimg.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self._offset = self.num_damaged = 0
        self.kimg, self.timestamps = array("d"), array("d")
        self._means: dict[str, array] = {}

    def read(self) -> None:
        """Add the rows that were completed since the last call."""
        try:
            with open(self._path, "rb") as file:
                if file.seek(0, 2) < self._offset:  # A restart has dropped rows.
                    self._forget()
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return
        whole = text.rpartition(b"\n")[0]  # The last row may be half-written.
        if whole:
            self._offset += len(whole) + 1
        for line in whole.splitlines():
            if line.strip():
                self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            row = parse_json(line.decode("utf-8", errors="replace"))
            kimg = number(row["Progress/kimg"]["mean"])
            if not 0 <= kimg < math.inf:
                raise ValueError(kimg)
        except (ValueError, KeyError, TypeError):
            self.num_damaged += 1
            return
        while self.kimg and self.kimg[-1] >= kimg:
            for column in (self.kimg, self.timestamps, *self._means.values()):
                column.pop()
        num_rows = len(self.kimg)
        self.kimg.append(kimg)
        self.timestamps.append(number(row.get("timestamp")))
        for name, mean in _means_of(row):
            if name not in self._means and len(self._means) < _MAX_CURVES:
                self._means[name] = array("d", [math.nan]) * num_rows
            if name in self._means:
                self._means[name].append(mean)
        for column in self._means.values():
            if len(column) == num_rows:
                column.append(math.nan)

    @property
    def names(self) -> list[str]:
        """Names of the statistics, in the order in which they appeared."""
        return list(self._means)

    def values(self, name: str) -> np.ndarray:
        """Return the means of a statistic, float64 [ticks]; NaN at ticks without one."""
        if name not in self._means:
            return np.full(len(self.kimg), np.nan)
        return np.array(self._means[name])

    def last(self, name: str) -> float | None:
        """Return the newest finite mean of a statistic; None if there is none."""
        return next((v for v in reversed(self._means.get(name, ())) if math.isfinite(v)), None)

    def curve(self, name: str) -> Curve:
        """Return a statistic over kimg as a curve of at most 660 points.

        Of validation statistics, only the ticks at which they were measured are included.
        """
        kimg, values = np.array(self.kimg), self.values(name)
        if name.startswith(VALIDATION):
            measured = np.isfinite(values)
            kimg, values = kimg[measured], values[measured]
        return thin(kimg, values)


def thin(x: np.ndarray, y: np.ndarray, max_buckets: int = _MAX_BUCKETS) -> Curve:
    """Return a curve of at most ``max_buckets`` points, of which the first and last are unchanged.

    Each other point is the mean of about equally many points of ``x`` and ``y`` [N] in succession,
    with their minimum and maximum. Values that are not finite are ignored; without others, the mean
    is None.
    """
    if len(x) <= max_buckets:
        return Curve(_rounded(x), _rounded(y))
    starts = np.linspace(1, len(x) - 1, max_buckets - 1).round().astype(int)
    starts = np.unique([0, *starts])
    counts = np.diff([*starts, len(x)])
    finite = np.isfinite(y)
    nums = np.add.reduceat(finite, starts, dtype=int)
    with np.errstate(invalid="ignore", over="ignore"):
        mean = np.add.reduceat(np.where(finite, y, 0.0), starts) / np.where(nums, nums, np.nan)
    low = np.minimum.reduceat(np.where(finite, y, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, y, -np.inf), starts)
    return Curve(_rounded(np.add.reduceat(x, starts) / counts), *map(_rounded, (mean, low, high)))


def _rounded(values: np.ndarray) -> list[float | None]:
    """Return numbers rounded to 6 significant digits; None for those that are not finite."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def _means_of(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, stat in row.items():
        if isinstance(stat, dict) and "mean" in stat:
            yield name, number(stat["mean"])


def number(value: Any) -> float:
    """Return a number read from JSON as a float; NaN for anything else."""
    try:
        return float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        return math.nan
