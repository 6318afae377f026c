"""Scores of cells with standard errors from paired images, by the delete-a-group jackknife.

Image i of every cell has the same seed. Images are divided into groups of consecutive seeds, the
same in all cells, and the score is computed for all images and without each group in turn. What two
cells have in common cancels in the differences of their scores. Source: Kott, "The delete-a-group
jackknife" (2001), Eq. 1.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np
import torch

from metrics.metric import Comparison, MetricSpec
from metrics.reference import Reference

NUM_GROUPS = 20


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A score of the first images of a cell.

    Attributes:
        value: Score of all of these images.
        without: Scores without each group, [G], NUM_GROUPS by default.
    """

    value: float
    without: np.ndarray

    @property
    def error(self) -> float:
        """Standard error of the value."""
        return _error(self.without)

    def minus(self, other: "Estimate") -> tuple[float, float]:
        """Return the difference to another cell's score of the same seeds, and its error."""
        return self.value - other.value, _error(self.without - other.without)

    def at(self, times: float) -> "Estimate":
        """Return the estimated score of ``times`` as many images, to first order.

        The bias of a score of n images falls as 1 / n; the scores without a group show how large it
        is (Quenouille, "Notes on bias in estimation", 1956; for FID, Chong and Forsyth, arXiv
        1911.07023). The error stays that of n images.
        """
        bias = (len(self.without) - 1) * (self.without.mean() - self.value)
        return Estimate(float(self.value - (1 - 1 / times) * bias), self.without)

    def interval(self, confidence: float) -> tuple[float, float]:
        """Return the ends of a two-sided interval by Student's t distribution."""
        half = self.error * t_quantile(1 - (1 - confidence) / 2)
        return self.value - half, self.value + half


def _error(without: np.ndarray) -> float:
    num = len(without)
    return float(np.sqrt((num - 1) / num * np.sum((without - without.mean()) ** 2)))


def jackknife(
    metric: MetricSpec,
    vectors: np.ndarray,
    reference: Reference | None,
    device: torch.device | str = "cpu",
    num_groups: int = NUM_GROUPS,
) -> Estimate:
    """Return the first value of a metric with its error.

    ``vectors`` [N, D] are a detector's outputs in the order of the seeds, for at least two images
    per group.
    """
    compute = _of_moments if metric.needs == "moments" else _of_vectors
    parts = compute(vectors, reference, num_groups)
    first, *others = (
        next(iter(metric.compute(dataclasses.replace(part, device=device)).values()))
        for part in parts
    )
    return Estimate(first, np.array(others))


def _groups(num_images: int, num_groups: int) -> Iterator[slice]:
    """Yield the groups as slices of the images; their lengths differ by at most one."""
    edges = np.arange(num_groups + 1) * num_images // num_groups
    for start, stop in itertools.pairwise(edges.tolist()):
        yield slice(start, stop)


def _of_vectors(
    vectors: np.ndarray, reference: Reference | None, num_groups: int
) -> Iterator[Comparison]:
    """Yield all vectors, then those without each group, with the real ones to compare."""
    real = None if reference is None else reference.of("vectors").vectors
    yield Comparison(fake=vectors, real=real)
    for own in _groups(len(vectors), num_groups):
        yield Comparison(fake=np.delete(vectors, own, axis=0), real=real)


def _of_moments(
    vectors: np.ndarray, reference: Reference | None, num_groups: int
) -> Iterator[Comparison]:
    """Yield the moments of all vectors, then of those without each group, with the real ones."""
    real = reference.mu, reference.sigma
    x = vectors.astype(np.float64)
    shift = x.mean(axis=0)
    x -= shift  # Centred, no covariance is the difference of two large numbers.
    total, second = x.sum(axis=0), x.T @ x

    def part(num: int, total: np.ndarray, second: np.ndarray) -> Comparison:
        mean = total / num
        covariance = (second - num * np.outer(mean, mean)) / (num - 1)
        return Comparison(fake_moments=(mean + shift, covariance), real_moments=real)

    yield part(len(x), total, second)
    for own in _groups(len(x), num_groups):
        group = x[own]
        yield part(len(x) - len(group), total - group.sum(axis=0), second - group.T @ group)


@functools.cache
def t_quantile(probability: float, num_groups: int = NUM_GROUPS) -> float:
    """Return a quantile of Student's t distribution with v = ``num_groups`` - 1 degrees of freedom.

    ``probability`` is above 1/2. With t = sqrt(v) tan(a), the density of a is proportional to
    cos(a)^(v - 1), which is integrated numerically.
    """
    degrees = num_groups - 1
    angles = np.linspace(-np.pi / 2, np.pi / 2, 400_001)
    density = np.cos(angles) ** (degrees - 1)
    shares = np.cumsum(density)
    angle = np.interp(probability, shares / shares[-1], angles)
    return float(np.sqrt(degrees) * np.tan(angle))
