"""Nearest neighbours in feature space: precision and recall, density and coverage.

Distances are Euclidean, in float64, and taken block by block of fixed size, so that 50,000 against
200,000 vectors fit in memory and the results depend on nothing but the vectors.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike

_ROWS, _COLUMNS = 1024, 8192
_ROUNDING = 1e-13
Vectors = ArrayLike | torch.Tensor


def nearest_neighbours(
    queries: Vectors,
    points: Vectors,
    k: int,
    *,
    device: torch.device | str = "cpu",
    exclude_self: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Return distances [N, k], ascending, and indices [N, k] of the k nearest points.

    Args:
        queries: [N, D].
        points: [M, D].
        k: Number of neighbours, at most M.
        device: Where distances are computed.
        exclude_self: Queries are the points, and none is its own neighbour. An exact duplicate
            is, at distance 0.

    Raises ValueError for widths that differ and for too few points.
    """
    queries, points = _checked(queries, points)
    available = len(points) - exclude_self
    if k > available:
        raise ValueError(
            f"{k} nearest neighbours of each vector need more than the {len(points)} vectors that "
            "there are."
        )
    distances = torch.empty(len(queries), k, dtype=torch.float64)
    indices = torch.empty(len(queries), k, dtype=torch.int64)
    for first, rows in _blocks(queries, _ROWS):
        best: list[tuple[torch.Tensor, torch.Tensor]] = []
        for start, squared in _squared_distances(rows, points, device):
            if exclude_self:
                own = torch.arange(first, first + len(squared), device=device) - start
                inside = (own >= 0) & (own < squared.shape[1])
                squared[inside.nonzero()[:, 0], own[inside]] = torch.inf
            number = min(k, squared.shape[1])
            values, places = squared.topk(number, largest=False)
            best.append((values, places + start))
        values = torch.cat([pair[0] for pair in best], dim=1)
        places = torch.cat([pair[1] for pair in best], dim=1)
        values, order = values.topk(k, largest=False)
        distances[first : first + len(values)] = values.sqrt().cpu()
        indices[first : first + len(values)] = places.gather(1, order).cpu()
    return distances.numpy(), indices.numpy()


def precision_recall(
    real: Vectors, fake: Vectors, *, k: int = 3, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Return the share of generated images among the real ones, and of real among generated.

    A set's manifold is the union of balls around its vectors, each with the distance to the k-th
    nearest other vector as radius. Precision is the share of generated vectors on the manifold of
    the real ones; recall is the reverse.

    Args:
        real: [N, D].
        fake: [M, D].
        k: Neighbours that a radius reaches to.
        device: Where distances are computed.

    Raises ValueError unless there are more than k vectors of either. Source: Kynkäänniemi et al.,
    "Improved precision and recall metric", arXiv:1904.06991, Eq. 1 and 2.
    """
    real, fake = _checked(real, fake)
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
        for start, squared in _squared_distances(rows, points, device, center):
            reach = squared_radii[start : start + squared.shape[1]]
            inside |= (squared <= reach).any(dim=1)
        num_inside += int(inside.sum())
    return num_inside / len(queries)


def density_coverage(
    real: Vectors, fake: Vectors, *, k: int = 5, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Return how many real neighbourhoods a generated image lies in, and the share of them visited.

    A neighbourhood is the open ball around a real vector that reaches to its k-th nearest other
    real vector. Density is the mean number of neighbourhoods that a generated vector lies in,
    divided by k; it may exceed 1. Coverage is the share of neighbourhoods that hold any.

    Args:
        real: [N, D].
        fake: [M, D].
        k: Neighbours that a ball reaches to.
        device: Where distances are computed.

    Raises ValueError unless there are more than k real vectors. Source: Naeem et al., "Reliable
    fidelity and diversity metrics for generative models", arXiv:2002.09797, Eq. 3 and 4.
    """
    real, fake = _checked(real, fake)
    center = _center(real)
    squared_radii = _squared_radii(real, k, device, center)
    num_inside = 0
    visited = torch.zeros(len(real), dtype=torch.bool, device=device)
    for _, rows in _blocks(fake, _ROWS):
        for start, squared in _squared_distances(rows, real, device, center):
            part = slice(start, start + squared.shape[1])
            inside = squared < squared_radii[part]
            num_inside += int(inside.sum())
            visited[part] |= inside.any(dim=0)
    return num_inside / (k * len(fake)), visited.double().mean().item()


def _squared_radii(
    points: torch.Tensor, k: int, device: torch.device | str, center: torch.Tensor
) -> torch.Tensor:
    """Return the squared distance of each point to its k-th nearest other point, [N]."""
    if len(points) <= k:
        raise ValueError(
            f"The distance to neighbour number {k} needs more than {k} images of either kind; got "
            f"{len(points)}."
        )
    radii = []
    for _, rows in _blocks(points, _ROWS):
        best: list[torch.Tensor] = []
        for _, squared in _squared_distances(rows, points, device, center):
            # The point itself is among them, at distance 0.
            best.append(squared.topk(min(k + 1, squared.shape[1]), largest=False).values)
        radii.append(torch.cat(best, dim=1).topk(k + 1, largest=False).values[:, -1])
    return torch.cat(radii)


def _checked(first: Vectors, second: Vectors) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = torch.as_tensor(first), torch.as_tensor(second)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or not len(first):
        raise ValueError(
            f"Got vectors of shapes {list(first.shape)} and {list(second.shape)}; expected [N, D] "
            "and [M, D]."
        )
    return first, second


def _center(points: torch.Tensor) -> torch.Tensor:
    return points.mean(dim=0, dtype=torch.float64)


def _blocks(vectors: torch.Tensor, size: int) -> Iterator[tuple[int, torch.Tensor]]:
    for start in range(0, len(vectors), size):
        yield start, vectors[start : start + size]


def _squared_distances(
    rows: torch.Tensor,
    points: torch.Tensor,
    device: torch.device | str,
    center: torch.Tensor | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (index of the first point, squared distances [rows, points]) for blocks of points.

    Both are centred, because |a - b|^2 = |a|^2 + |b|^2 - 2 ab loses digits far from the origin.
    """
    center = (_center(points) if center is None else center).to(device)
    x = rows.to(device, torch.float64) - center
    x_squared = x.square().sum(1)[:, None]
    for start, block in _blocks(points, _COLUMNS):
        y = block.to(device, torch.float64) - center
        sizes = x_squared + y.square().sum(1)
        squared = torch.addmm(sizes, x, y.T, alpha=-2)
        # What is left of equal vectors is rounding; float32 features tell no such distances apart.
        yield start, squared.masked_fill_(squared < _ROUNDING * sizes, 0)
