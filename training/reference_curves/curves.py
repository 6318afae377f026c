"""The curves of a run that can be compared, and their values at the points of a reference."""

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np

from metrics.rows import protocol_of
from training.reference_curves.titles import GRADIENT, LOSS, VALIDATION
from training.run_report import history as statistics
from training.run_report.history import History
from training.run_report.levels import range_of
from training.run_report.scores import IN_RUN, better, read_score_rows, scores_of

_WINDOWS, _POINTS = (LOSS, GRADIENT), (VALIDATION,)
_SAME_POINT = 0.05  # Values are of the same point if their kimg differ by less than this share.
_AS_WIDE = 1.05  # Ticks count as equally wide up to this ratio.


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve of one run; fields as in :class:`~training.reference_curves.reference.Curve`."""

    kind: str
    start: float
    kimg: np.ndarray  # [T]
    values: np.ndarray  # [T]
    protocol: dict[str, str] | None = None


def curves_of(run_dir: Path, history: History) -> dict[str, Series]:
    """Return the curves of a run that can be compared, by name.

    Each ends before its first value that is not positive and finite. The first tick, which is a
    single step, is left out.
    """
    found = {}
    for name in history.names:
        series = _of_statistic(history, name)
        if series is not None:
            found[name] = series
    return {name: one for name, one in (found | _scores(run_dir, history)).items() if len(one.kimg)}


def _of_statistic(history: History, name: str) -> Series | None:
    """Return the curve of a statistic in ``stats.jsonl``; None for one that is not compared."""
    kimg, values = np.array(history.kimg), history.values(name)
    level = range_of(name)
    if name in _POINTS:
        measured = np.isfinite(values) & (np.arange(len(values)) > 0)
        kimg, values = kimg[measured], values[measured]
        kind, start = "point", 0.0
    elif name in _WINDOWS or (level is not None and not name.startswith(statistics.VALIDATION)):
        kind, start = "window", float(kimg[0]) if len(kimg) else 0.0
        kimg, values = kimg[1:], values[1:]
    else:
        return None
    good = _num_positive(values)
    return Series(kind, start, kimg[:good], values[:good])


def _num_positive(values: np.ndarray) -> int:
    """Return how many values come before the first that is not positive and finite."""
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    return int(bad[0]) if len(bad) else len(values)


def _scores(run_dir: Path, history: History) -> dict[str, Series]:
    """Return the scores recorded after the first tick as curves, if lower or higher is better."""
    rows = [row for row in read_score_rows(run_dir)[0] if row[0] == IN_RUN]
    protocols = {row["metric"]: protocol_of(row) for _, row in rows}  # Of each metric's newest row.
    first, found = min(history.kimg, default=0.0), {}
    for (metric, name), scores in scores_of(rows).items():
        own = [s for s in scores if s.kimg is not None and s.kimg > first]
        if better(name) is None or not own:
            continue
        kimg, values = np.array([s.kimg for s in own]), np.array([s.value for s in own])
        good = _num_positive(values)
        series = Series("point", 0.0, kimg[:good], values[:good], protocols.get(metric, {}))
        found[f"{metric}/{name}"] = series
    return found


@dataclasses.dataclass(frozen=True)
class Aligned:
    """Values of a run beside those of a reference, at P points.

    Attributes:
        kimg: [P], position of each point.
        values: [P], values of the run.
        groups: For each point, the first and the last index of the reference's points in it.
    """

    kimg: np.ndarray
    values: np.ndarray
    groups: list[tuple[int, int]]


def align(own: Series, kind: str, start: float, kimg: np.ndarray) -> Aligned:
    """Return a run's curve at the points of a reference, ``kimg`` [T], as far as both go.

    Means over ticks are compared with means over the same images. Shorter ticks of the run are
    merged; for longer ones, several points of the reference form a group. Where ticks do not end at
    the same images, a curve counts as constant within a tick, and the first interval is left out,
    because the loss falls steeply there.
    """
    if kind == "point":
        return _align_points(own, kimg)
    edges = np.concatenate([[own.start], own.kimg])
    ends = np.concatenate([[start], kimg])
    num = min(len(edges), len(ends)) - 1
    if np.allclose(ends[: num + 1], edges[: num + 1], rtol=1e-6):
        return Aligned(own.kimg[:num], own.values[:num], [(i, i) for i in range(num)])
    widest = np.max(np.diff(edges), initial=0.0) / _AS_WIDE
    places = [0]
    for index in range(1, len(ends)):
        if ends[index] - ends[places[-1]] >= widest:
            places.append(index)
    places = [i for i in places if edges[0] - 1e-6 <= ends[i] <= edges[-1] * (1 + 1e-6)][1:]
    total = np.concatenate([[0.0], np.cumsum(own.values * np.diff(edges))])
    sums = np.interp(ends[places], edges, total)
    values = np.diff(sums) / np.diff(ends[places])
    groups = [(first, last - 1) for first, last in itertools.pairwise(places)]
    return Aligned(ends[places][1:], values, groups)


def _align_points(own: Series, kimg: np.ndarray) -> Aligned:
    found = {}
    for value, at in zip(own.values, own.kimg, strict=True):
        nearest = int(np.argmin(np.abs(kimg - at)))
        if math.isclose(kimg[nearest], at, rel_tol=_SAME_POINT):
            found[nearest] = at, value
    places = sorted(found)
    return Aligned(
        np.array([found[i][0] for i in places]),
        np.array([found[i][1] for i in places]),
        [(i, i) for i in places],
    )
