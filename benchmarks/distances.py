"""Fréchet distance, KID, precision and recall, timed against other implementations."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.measure import (
    TIME_COLUMNS,
    Spent,
    interleave,
    median_ratio,
    spent_by,
    table,
    time_cells,
    walls,
)
from metrics.frechet import frechet_distance
from metrics.manifold import precision_recall
from metrics.mmd import kernel_distance

_OWN = "this code"
_NUM_SUBSETS, _SUBSET_SIZE = 100, 1000
_NEEDS_SCIPY = "This comparison needs SciPy, which is not installed: pip install scipy."


def benchmark_distances(dim: int, num: int, num_rounds: int) -> str:
    """Return a table for each distance between two sets of ``num`` vectors with ``dim`` dimensions.

    A table compares this code with other implementations: their times, and the difference between
    the results. Raises ValueError if SciPy is missing.
    """
    frechet = _frechet_sides(dim)
    real, fake = _vectors(num, dim, seed=1), _vectors(num, dim, seed=2)
    kid, neighbours = _kid_sides(real, fake), _neighbour_sides(real, fake)
    titles = {
        f"Fréchet distance of {dim} dimensions": frechet,
        f"KID of {num} vectors, {_NUM_SUBSETS} subsets of up to {_SUBSET_SIZE}": kid,
        f"Precision and recall of {num} vectors": neighbours,
    }
    return "\n".join(_compare(title, sides, num_rounds) for title, sides in titles.items())


def _compare(title: str, sides: dict[str, Callable[[], Any]], num_rounds: int) -> str:
    """Return a table of the sides' times and results, relative to those of this code."""
    values: dict[str, Any] = {}

    def compute(name: str) -> None:
        values[name] = np.asarray(sides[name]())

    def turn(name: str) -> Spent:
        return spent_by(functools.partial(compute, name), torch.device("cpu"))

    times = interleave({name: functools.partial(turn, name) for name in sides}, num_rounds)
    rows = [[title, *TIME_COLUMNS, "wall ratio", "CPU ratio", "differs by"]]
    for name, turns in times.items():
        ratios = [median_ratio(walls(turns), walls(times[_OWN]))]
        ratios.append(median_ratio(*([turn.cpu for turn in times[n]] for n in (name, _OWN))))
        apart = np.abs(values[name] - values[_OWN]).max()
        rows.append([name, *time_cells(turns), *(f"{r:.2f}" for r in ratios), f"{apart:.1e}"])
    return table(rows)


def _vectors(num: int, dim: int, seed: int) -> np.ndarray:
    """Return vectors like a detector's: float32 [num, dim], >= 0, with a decaying spectrum."""
    directions = np.random.default_rng(0).standard_normal((64, dim))
    rng = np.random.default_rng(seed)
    scales = np.arange(1, 65)[:, None] ** -0.5
    parts = rng.standard_normal((num, 64)) @ (directions * scales)
    return np.abs(parts + 0.3 * rng.standard_normal((num, dim))).astype(np.float32)


def _frechet_sides(dim: int) -> dict[str, Callable[[], float]]:
    """Return implementations of the Fréchet distance, for two covariances of full rank."""
    try:
        from scipy.linalg import cholesky, eigvalsh, sqrtm
    except ModuleNotFoundError:
        raise ValueError(_NEEDS_SCIPY) from None
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    scales = np.arange(1, dim + 1) ** -0.5

    def moments(shift: float, stretch: float) -> tuple[np.ndarray, np.ndarray]:
        samples = rng.standard_normal((2 * dim, dim)) * scales**stretch
        samples = samples @ basis.T + shift * rng.standard_normal(dim)
        return samples.mean(0), np.cov(samples, rowvar=False)

    (mu1, sigma1), (mu2, sigma2) = moments(0.0, 1.0), moments(0.02, 1.1)
    rest = float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2))

    def factored() -> float:
        root = cholesky(sigma1, lower=True)
        return rest - 2 * float(np.sqrt(eigvalsh(root.T @ sigma2 @ root)).sum())

    return {
        _OWN: lambda: frechet_distance(mu1, sigma1, mu2, sigma2),
        "scipy.linalg.sqrtm": lambda: rest - 2 * float(np.trace(np.real(sqrtm(sigma1 @ sigma2)))),
        "a Cholesky factor, scipy.linalg.eigvalsh": factored,
    }


def _kid_sides(real: np.ndarray, fake: np.ndarray) -> dict[str, Callable[[], float]]:
    """Return implementations of the mean KID over subsets; all use the same subsets."""
    size = min(len(real), len(fake), _SUBSET_SIZE)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def plain() -> float:
        rng, total = np.random.default_rng(0), 0.0
        for _ in range(_NUM_SUBSETS):
            x = fake[rng.choice(len(fake), size, replace=False)]
            y = real[rng.choice(len(real), size, replace=False)]
            within = kernel(x, x) + kernel(y, y)
            total += (within.sum() - np.diag(within).sum()) / (size * (size - 1))
            total -= 2 * kernel(x, y).mean()
        return total / _NUM_SUBSETS

    settings = dict(num_subsets=_NUM_SUBSETS, subset_size=_SUBSET_SIZE)
    own = {_OWN: lambda: kernel_distance(real, fake, **settings)[0]}
    return {**own, "plain NumPy, float32": plain}


def _neighbour_sides(
    real: np.ndarray, fake: np.ndarray, k: int = 3
) -> dict[str, Callable[[], Sequence[float]]]:
    """Return implementations of precision and recall; scikit-learn's only if it is installed."""
    sides = {_OWN: lambda: precision_recall(real, fake, k=k)}
    try:
        from sklearn.metrics import pairwise_distances
        from sklearn.neighbors import NearestNeighbors
    except ModuleNotFoundError:
        return sides

    def radii(x: np.ndarray) -> np.ndarray:
        found = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(x)
        return found.kneighbors(x)[0][:, -1]

    def others() -> Sequence[float]:
        of_real, of_fake = radii(real), radii(fake)
        pairs = pairwise_distances(fake, real)
        return (pairs <= of_real).any(1).mean(), (pairs <= of_fake[:, None]).any(0).mean()

    return {**sides, "scikit-learn": others}
