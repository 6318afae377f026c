"""Nearest neighbours in feature space: precision and recall, density and coverage.

Distances are Euclidean, in float64, and taken block by block of fixed size, so that 50,000 against
200,000 vectors fit in memory and the results depend on nothing but the vectors.

The same distance comes out of a matrix product with other last digits at another place. Distances
that differ by less than such rounding are therefore equal wherever they are compared with a radius.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike

from metrics.vectors import Vectors, check_vectors

_ROWS, _COLUMNS = 1024, 8192
_MAX_VALUES = 2**26  # Of a block of vectors: 512 MiB.
# Bound on the error of |a - b|^2 relative to |a|^2 + |b|^2; up to 2e-14 is seen at 12,288 values.
_ROUNDING = 1e-13


def nearest_neighbours(
    queries: Vectors,
    points: Vectors,
    k: int,
    *,
    device: torch.device | str = "cpu",
    own: ArrayLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return distances [N, k], ascending, and indices [N, k] of the k nearest points.

    Of equal distances, the lower index comes first.

    Args:
        queries, points: [N, D] and [M, D].
        k: Number of neighbours, at most M.
        device: Where distances are computed.
        own: Index of each query among the points, [N], if they are points themselves: none is
            its own neighbour then. An exact duplicate is, at distance 0.

    Raises ValueError for widths that differ and for too few points.
    """
    queries, points = check_vectors(queries, points)
    if k > len(points) - (own is not None):
        but = f"need more than the {len(points)} vectors that there are"
        raise ValueError(f"{k} nearest neighbours of each vector {but}.")
    center = _center(points)
    distances = torch.empty(len(queries), k, dtype=torch.float64)
    indices = torch.empty(len(queries), k, dtype=torch.int64)
    for first, rows in _blocks(queries, _ROWS):
        best: list[tuple[torch.Tensor, torch.Tensor]] = []
        for start, squared, _ in _squared_distances(rows, points, device, center):
            if own is not None:
                columns = torch.as_tensor(own)[first : first + len(squared)].to(device) - start
                inside = (columns >= 0) & (columns < squared.shape[1])
                squared[inside.nonzero()[:, 0], columns[inside]] = torch.inf
            values, places = _smallest(squared, min(k, squared.shape[1]))
            best.append((values, places + start))
        values, places = (torch.cat(blocks, dim=1) for blocks in zip(*best, strict=True))
        values, order = _smallest(values, k)
        distances[first : first + len(values)] = values.sqrt().cpu()
        indices[first : first + len(values)] = places.gather(1, order).cpu()
    return distances.numpy(), indices.numpy()


def _smallest(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k smallest of each row, ascending, and their columns; of equal ones, the first."""
    kth = values.topk(k, largest=False).values[:, -1:]
    near = ~(values > kth)  # At least k of each row, NaN among them.
    rows, columns = near.nonzero(as_tuple=True)
    found = values[rows, columns]
    # By row, then value, then column: a stable sort keeps the order that it meets.
    order = found.argsort(stable=True)
    order = order[rows[order].argsort(stable=True)]
    counts = near.sum(dim=1)
    first = counts.cumsum(0) - counts
    chosen = order[first[:, None] + torch.arange(k, device=values.device)]
    return found[chosen], columns[chosen]


def precision_recall(
    real: Vectors, fake: Vectors, *, k: int = 3, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Return the share of generated images among the real ones, and of real among generated.

    A set's manifold is the union of balls around its vectors, each with the distance to the k-th
    nearest other vector as radius. Precision is the share of generated vectors on the manifold of
    the real ones; recall is the reverse.

    Vectors are [N, D] and [M, D]; ``device`` is where distances are computed. Raises ValueError
    unless there are more than k vectors of either. Source: Kynkäänniemi et al., "Improved precision
    and recall metric", arXiv:1904.06991, Eq. 1 and 2.
    """
    real, fake = check_vectors(real, fake)
    center = _center(real)
    precision, recall = (
        _in_balls(queries, points, _squared_radii(points, k, device, center), device, center)
        for queries, points in ((fake, real), (real, fake))
    )
    return precision, recall


def _in_balls(
    queries: torch.Tensor,
    points: torch.Tensor,
    squared_radii: torch.Tensor,
    device: torch.device | str,
    center: torch.Tensor,
) -> float:
    """Return the share of queries in the ball of any of the points."""
    num_inside = 0
    for _, rows in _blocks(queries, _ROWS):
        inside = torch.zeros(len(rows), dtype=torch.bool, device=device)
        for start, squared, slack in _squared_distances(rows, points, device, center):
            reach = squared_radii[start : start + squared.shape[1]]
            inside |= (squared <= reach + slack).any(dim=1)
        num_inside += int(inside.sum())
    return num_inside / len(queries)


def density_coverage(
    real: Vectors, fake: Vectors, *, k: int = 5, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Return how many real neighbourhoods a generated image lies in, and the share of them visited.

    A neighbourhood is the open ball around a real vector that reaches to its k-th nearest other
    real vector. Density is the mean number of neighbourhoods that a generated vector lies in,
    divided by k; it may exceed 1. Coverage is the share of neighbourhoods that hold any.

    Vectors are [N, D] and [M, D]; ``device`` is where distances are computed. Raises ValueError
    unless there are more than k real vectors. Source: Naeem et al., "Reliable fidelity and
    diversity metrics for generative models", arXiv:2002.09797, Eq. 3 and 4.
    """
    real, fake = check_vectors(real, fake)
    center = _center(real)
    squared_radii = _squared_radii(real, k, device, center)
    num_inside = 0
    visited = torch.zeros(len(real), dtype=torch.bool, device=device)
    for _, rows in _blocks(fake, _ROWS):
        for start, squared, slack in _squared_distances(rows, real, device, center):
            part = slice(start, start + squared.shape[1])
            inside = squared < squared_radii[part] - slack
            num_inside += int(inside.sum())
            visited[part] |= inside.any(dim=0)
    return num_inside / (k * len(fake)), visited.double().mean().item()


def _squared_radii(
    points: torch.Tensor, k: int, device: torch.device | str, center: torch.Tensor
) -> torch.Tensor:
    """Return the squared distance of each point to its k-th nearest other point, [N]."""
    if len(points) <= k:
        needs = f"needs more than {k} images of either kind; got {len(points)}"
        raise ValueError(f"The distance to neighbour number {k} {needs}.")
    radii = []
    for _, rows in _blocks(points, _ROWS):
        best: list[torch.Tensor] = []
        for _, squared, _ in _squared_distances(rows, points, device, center):
            # The point itself is among them, at distance 0.
            best.append(squared.topk(min(k + 1, squared.shape[1]), largest=False).values)
        radii.append(torch.cat(best, dim=1).topk(k + 1, largest=False).values[:, -1])
    return torch.cat(radii)


def _center(points: torch.Tensor) -> torch.Tensor:
    """Return the mean in float64; by blocks, as ``mean`` would convert all points at once."""
    total = torch.zeros(points.shape[1], dtype=torch.float64, device=points.device)
    for _, block in _blocks(points, _COLUMNS):
        total += block.to(torch.float64).sum(dim=0)
    return total / len(points)


def _blocks(vectors: torch.Tensor, size: int) -> Iterator[tuple[int, torch.Tensor]]:
    size = max(1, min(size, _MAX_VALUES // vectors.shape[1]))
    for start in range(0, len(vectors), size):
        yield start, vectors[start : start + size]


def _squared_distances(
    rows: torch.Tensor, points: torch.Tensor, device: torch.device | str, center: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (index of the first point, squared distances, bounds on their error) for blocks.

    Distances and bounds are [rows, points of the block]. Rows and points are centred, because
    |a - b|^2 = |a|^2 + |b|^2 - 2 ab loses digits far from the origin.
    """
    center = center.to(device)
    x = rows.to(device, torch.float64) - center
    x_squared = x.square().sum(1)[:, None]
    for start, block in _blocks(points, _COLUMNS):
        y = block.to(device, torch.float64) - center
        sizes = x_squared + y.square().sum(1)
        squared = torch.addmm(sizes, x, y.T, alpha=-2)
        slack = _ROUNDING * sizes
        # What is left of equal vectors is rounding; float32 features tell no such distances apart.
        yield start, squared.masked_fill_(squared < slack, 0), slack
