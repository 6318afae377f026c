"""Bands that contain a further run with a given probability, from a few runs of different seeds.

Curves are positive, and their logarithms are assumed to be normally distributed over seeds at each
point. The variance changes smoothly along a curve, so it is pooled over neighbouring points: at a
single point, a few runs would hardly determine it.
"""

import dataclasses
import functools
import math

import numpy as np

_NEIGHBOURS = 3  # A variance is pooled over up to 1/3 of the points on either side.
_GRID = 40_001  # Points of the numerical integral of Student's density.


@dataclasses.dataclass(frozen=True)
class Band:
    """The band of a curve at T points.

    Attributes:
        mean: [T], geometric mean of the runs.
        spread: [T], standard deviation of the logarithm over runs, pooled along the curve.
        low, high: [T], bounds of the band.
        dof: Degrees of freedom of the pooled variance.
        factor: Half-width of the band's logarithm, in spreads.
    """

    mean: np.ndarray
    spread: np.ndarray
    low: np.ndarray
    high: np.ndarray
    dof: float
    factor: float


def tolerance_band(values: np.ndarray, coverage: float, num_points: int) -> Band:
    """Return the band in which a further run lies with probability ``coverage``.

    Args:
        values: [S, T], positive: S runs at T points, in order.
        coverage: Probability that the further run is inside at all of ``num_points`` points.
        num_points: T, or more if the run is also compared at points of other curves.

    At each point it is a tolerance interval of expected coverage (a prediction interval: Student's
    quantile times sqrt(1 + 1/S)), with Bonferroni's correction for ``num_points``. Because the
    points of a curve are correlated, it is wider than necessary.
    """
    num_runs, length = values.shape
    logs = np.log(values)
    mean = logs.mean(axis=0)
    rest = logs - mean
    variance, dof = _pooled_variance(rest, max(round(length / _NEIGHBOURS), 1))
    near, _ = _pooled_variance(rest, min(1, length - 1))
    # Pooling widely would hide a place where a curve suddenly varies more than around it.
    spread = np.sqrt(np.maximum(variance, near))
    tail = (1 - coverage) / (2 * num_points)
    factor = student_quantile(tail, dof) * math.sqrt(1 + 1 / num_runs)
    low, high = np.exp(mean - factor * spread), np.exp(mean + factor * spread)
    return Band(np.exp(mean), spread, low, high, dof, factor)


def _pooled_variance(rest: np.ndarray, reach: int) -> tuple[np.ndarray, float]:
    """Return the variance [T] of residuals [S, T], pooled over neighbours, and its least dof."""
    num_runs, length = rest.shape
    variance = (rest**2).sum(axis=0) / (num_runs - 1)
    distance = np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
    weight = np.maximum(1 - distance / (reach + 1), 0.0)  # [T, T], triangular.
    weight /= weight.sum(axis=1, keepdims=True)
    # Correlated neighbours add less. The squares of an autoregressive process are correlated by the
    # square of its own correlation.
    square = _correlation(rest) ** 2
    own = 1 / (weight**2).sum(axis=1)  # Effective number of points if they were independent.
    shared = 1 + (own - 1) * (1 - square) / (1 + square)
    return weight @ variance, float((num_runs - 1) * shared.min())


def _correlation(rest: np.ndarray) -> float:
    """Return the correlation of neighbouring residuals [S, T] along the curve, in [0, 0.99]."""
    scaled = rest / np.maximum(np.sqrt((rest**2).mean(axis=0)), 1e-300)
    if scaled.shape[1] < 2:
        return 0.0
    return float(np.clip((scaled[:, 1:] * scaled[:, :-1]).mean(), 0.0, 0.99))


@functools.lru_cache(maxsize=256)
def student_quantile(tail: float, dof: float) -> float:
    """Return what Student's t with ``dof`` degrees of freedom exceeds with probability ``tail``.

    In terms of the angle in t = sqrt(dof) tan(angle), the density is proportional to
    cos(angle) ** (dof - 1).
    """
    angle = np.linspace(0, math.pi / 2, _GRID)
    density = np.cos(angle) ** (dof - 1)
    steps = (density[1:] + density[:-1]) / 2
    above = np.append(np.cumsum(steps[::-1])[::-1], 0.0)
    above *= 0.5 / above[0]
    found = np.interp(-math.log(tail), -np.log(np.maximum(above[:-1], 1e-300)), angle[:-1])
    return math.sqrt(dof) * math.tan(found)
