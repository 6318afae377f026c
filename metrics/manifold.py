"""Nearest neighbours among vectors: precision and recall, density and coverage.

Distances are Euclidean. They are first computed in float32 (for float32 vectors), in blocks of
fixed size, with a proven bound on the error of every squared distance. Only the few pairs for which
that bound leaves open which is nearer, or whether one lies within a radius, are computed again in
float64. The results thus depend on nothing but the vectors.

Two computations of the same distance may differ in the last digits. Where a distance is compared
with a radius, differences within that rounding therefore count as equality.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike

from metrics.vectors import Vectors, check_vectors

_ROWS, _COLUMNS = 1024, 8192
_MAX_VALUES = 2**26  # Values in a block of vectors.
_MAX_PAIR_VALUES = 2**22  # Values on either side of the pairs that float64 handles at a time.
# Bound on the float64 error of |a - b|^2, relative to |a|^2 + |b|^2; 2e-14 was observed with 12,288
# values.
_ROUNDING = 1e-13
_MAX_WIDTH = 4096  # Number of float32 products that are summed in float32.
_TINY = 1e-36  # Error that float32 underflow can add, relative to the largest value squared.
_SPARE = 8  # Neighbours kept beyond the k asked for, in case the bound leaves their order open.


@dataclasses.dataclass(frozen=True)
class _Set:
    """Vectors as given, and a centred and scaled copy on the device that computes distances.

    |a - b|^2 = |a|^2 + |b|^2 - 2 a.b loses digits far from the origin, hence the centring.
    """

    vectors: torch.Tensor  # [N, D], as given.
    unit: torch.Tensor  # (vectors - center) / scale, float32 or float64 [N, D].
    sizes: torch.Tensor  # Squared lengths of ``unit``, float64 [N].
    scale: float  # A power of two, equal for sets that are compared with each other.

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def rounding(self) -> float:
        """Bound on the error of :func:`_blocks_of_pairs`, relative to the sum of two sizes.

        The sum of n float32 products, in any order, has an error of at most n 2^-24 |a| |b|
        (Higham, "Accuracy and stability of numerical algorithms", section 3.1). An extra tenth
        covers the rounding of the vectors, of the sum with the sizes, and of the comparison.
        """
        if self.unit.dtype == torch.float64:
            return _ROUNDING
        return 1.1 * (min(self.unit.shape[1], _MAX_WIDTH) + 16) * 2.0**-24

    def errors(self, part: slice, others: "_Set", beside: slice) -> torch.Tensor:
        """Return for each vector in ``part`` a bound on its squared distances' error, float64 [N].

        It holds for the distances to all vectors in the slice ``beside`` of ``others``.
        """
        return self.rounding * (self.sizes[part] + others.sizes[beside].max()) + _TINY


def _prepare(
    first: torch.Tensor, second: torch.Tensor, device: torch.device | str
) -> tuple[_Set, _Set]:
    """Return both sets, centred on the mean of the first and scaled alike."""
    total = torch.zeros(first.shape[1], dtype=torch.float64, device=first.device)
    for _, block in _blocks(first, _COLUMNS):
        total += block.to(torch.float64).sum(dim=0)
    center = total / len(first)
    largest = max(
        float((block - center.to(block.device)).abs().max())
        for vectors in (first, second)
        for _, block in _blocks(vectors, _COLUMNS)
    )
    scale = 2.0 ** np.frexp(largest)[1] if 0 < largest < np.inf else 1.0
    single = torch.float64 not in (first.dtype, second.dtype)
    made: dict[int, _Set] = {}
    for vectors in (first, second):
        if id(vectors) not in made:
            dtype = torch.float32 if single else torch.float64
            unit = torch.empty(vectors.shape, dtype=dtype, device=device)
            sizes = torch.empty(len(vectors), dtype=torch.float64, device=device)
            for start, block in _blocks(vectors, _COLUMNS):
                centred = (block.to(torch.float64) - center.to(block.device)).div_(scale).to(device)
                unit[start : start + len(block)] = centred
                sizes[start : start + len(block)] = centred.square().sum(dim=1)
            made[id(vectors)] = _Set(vectors, unit, sizes, scale)
    return made[id(first)], made[id(second)]


def _blocks(vectors: torch.Tensor, size: int) -> Iterator[tuple[int, torch.Tensor]]:
    size = max(1, min(size, _MAX_VALUES // vectors.shape[1]))
    for start in range(0, len(vectors), size):
        yield start, vectors[start : start + size]


def _blocks_of_pairs(rows: _Set, points: _Set) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield a slice of rows, one of points, and their squared distances up to :meth:`_Set.errors`.

    Distances are [rows in the slice, points in the slice], in units of ``scale``. Blocks of the
    same rows are consecutive.
    """
    for first, x in _blocks(rows.unit, _ROWS):
        own = slice(first, first + len(x))
        for start, y in _blocks(points.unit, _COLUMNS):
            part = slice(start, start + len(y))
            squared = rows.sizes[own, None].to(x.dtype) + points.sizes[part].to(x.dtype)
            if x.shape[1] <= _MAX_WIDTH:
                squared.addmm_(x, y.T, alpha=-2)
            else:
                total = squared.double()
                parts = (vectors.split(_MAX_WIDTH, dim=1) for vectors in (x, y))
                for part_x, part_y in zip(*parts, strict=True):
                    total.sub_(part_x @ part_y.T, alpha=2)
                squared.copy_(total)
            yield own, part, squared


def _exact(
    rows: _Set, i: torch.Tensor, points: _Set, j: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the squared distances of the pairs (i, j), float64, and bounds on their rounding."""
    squared = torch.empty(len(i), dtype=torch.float64, device=rows.sizes.device)
    step = max(1, _MAX_PAIR_VALUES // rows.vectors.shape[1])
    for start in range(0, len(i), step):
        pairs = []
        for values, index in ((rows, i), (points, j)):
            chosen = values.vectors[index[start : start + step].to(values.vectors.device)]
            pairs.append(chosen.to(squared.device, torch.float64))
        difference = pairs[0].sub_(pairs[1]).div_(rows.scale)
        squared[start : start + step] = difference.square_().sum(dim=1)
    slack = _ROUNDING * (rows.sizes[i] + points.sizes[j])
    # A distance below its rounding counts as 0: detector outputs in float32 cannot resolve it.
    return squared.masked_fill_(squared < slack, 0), slack


def nearest_neighbours(
    queries: Vectors,
    points: Vectors,
    k: int,
    *,
    device: torch.device | str = "cpu",
    own: ArrayLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return distances [N, k], ascending, and indices [N, k] of the k nearest points.

    Of points at equal distances, the one with the lower index comes first.

    Args:
        queries, points: Vectors [N, D] and [M, D].
        k: Number of neighbours, at most M, or M - 1 with ``own``.
        device: Where distances are computed.
        own: Index of each query among the points, [N], if the queries are points themselves. No
            query is then its own neighbour, though an exact duplicate of it is, at distance 0.

    Raises ValueError for widths that differ, too few points, and values that are not finite.
    """
    queries, points = check_vectors(queries, points)
    if k > len(points) - (own is not None):
        but = f"need more than the {len(points)} vectors that there are"
        raise ValueError(f"{k} nearest neighbours of each vector {but}.")
    columns, rows = _prepare(points, queries, device)
    own = None if own is None else torch.as_tensor(own)
    squared, indices = _nearest(rows, columns, k, own)
    return (squared.sqrt() * rows.scale).cpu().numpy(), indices.cpu().numpy()


def _nearest(
    rows: _Set, points: _Set, k: int, own: torch.Tensor | None, *, only_last: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return squared distances [N, k] and indices [N, k] of the k nearest points, exactly.

    With ``only_last``, only the k-th neighbour is exact: those before it are in no order, and some
    of their distances are -inf.
    """
    device, num_others = rows.sizes.device, len(points) - (own is not None)
    num_kept = min(k + _SPARE, num_others)
    found = torch.empty(len(rows), k, dtype=torch.float64, device=device)
    indices = torch.empty(len(rows), k, dtype=torch.int64, device=device)
    for block, values, places in _candidates(rows, points, num_kept, own):
        # Two distances that differ by no more than twice the error may be in the wrong order.
        bound = 2 * rows.errors(block, points, slice(None))[:, None]
        kth = values[:, k - 1 : k]
        unsure = values <= kth + bound
        exact = torch.full(values.shape, torch.inf, dtype=torch.float64, device=device)
        if only_last:
            exact[values < kth - bound] = -torch.inf
            unsure &= values >= kth - bound
        i, column = unsure.nonzero(as_tuple=True)
        exact[i, column], _ = _exact(rows, i + block.start, points, places[i, column])
        # Sort by distance, then by index: the second sort is stable.
        by_index = places.argsort(dim=1)
        order = exact.gather(1, by_index).argsort(dim=1, stable=True)[:, :k]
        chosen = by_index.gather(1, order)
        found[block], indices[block] = exact.gather(1, chosen), places.gather(1, chosen)
        if num_kept < num_others:
            # If even the last one kept is uncertain, a nearer one may have been left out.
            for row in unsure[:, -1].nonzero()[:, 0].tolist():
                row += block.start
                alone = None if own is None else int(own[row])
                found[row], indices[row] = _nearest_of_one(rows, row, points, k, alone)
    return found, indices


def _candidates(
    rows: _Set, points: _Set, num: int, own: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield slices of rows with the ``num`` smallest approximate squared distances and indices.

    Distances are ascending, float64 [rows in the slice, num]; indices of points are int64 alike.
    """
    best: list[tuple[torch.Tensor, torch.Tensor]] = []
    for block, part, squared in _blocks_of_pairs(rows, points):
        if own is not None:
            columns = own[block].to(squared.device) - part.start
            inside = (columns >= 0) & (columns < squared.shape[1])
            squared[inside.nonzero()[:, 0], columns[inside]] = torch.inf
        values, places = squared.topk(min(num, squared.shape[1]), largest=False)
        best.append((values.double(), places + part.start))
        if part.stop >= len(points):
            values, places = (torch.cat(blocks, dim=1) for blocks in zip(*best, strict=True))
            values, order = values.topk(num, largest=False)
            yield block, values, places.gather(1, order)
            best = []


def _nearest_of_one(
    rows: _Set, row: int, points: _Set, k: int, own: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result of :func:`_nearest` for one row, from float64 distances to all points."""
    j = torch.arange(len(points), device=rows.sizes.device)
    squared, _ = _exact(rows, torch.full_like(j, row), points, j)
    if own is not None:
        squared[own] = torch.inf
    values, order = squared.sort(stable=True)
    return values[:k], order[:k]


def precision_recall(
    real: Vectors, fake: Vectors, *, k: int = 3, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Return precision and recall: how much of either side lies on the manifold of the other.

    The manifold of a set is the union of balls around its vectors; the radius of each is the
    distance to its k-th nearest other vector. Precision is the share of generated vectors on the
    manifold of the real ones, recall the share of real vectors on that of the generated ones.

    Vectors are [N, D] and [M, D]; ``device`` is where distances are computed. Raises ValueError
    unless all are finite and there are more than k of either. Source: Kynkäänniemi et al.,
    "Improved precision and recall metric", arXiv:1904.06991, Eq. 1 and 2.
    """
    x, y = _prepare(*check_vectors(real, fake), device)
    of_real, of_fake = _squared_radii(x, k), _squared_radii(y, k)
    precise = torch.zeros(len(y), dtype=torch.bool, device=of_real.device)
    recalled = torch.zeros(len(x), dtype=torch.bool, device=of_real.device)
    # One pass computes both: each distance is compared with the radii of its two vectors.
    for rows, part, squared in _blocks_of_pairs(y, x):
        by_real, by_fake = x.errors(part, y, rows), y.errors(rows, x, part)
        for radii, errors, inside, dim in (
            (of_real[part], by_real, precise[rows], 1),
            (of_fake[rows], by_fake, recalled[part], 0),
        ):
            sure, reach = (radii - errors).to(squared.dtype), (radii + errors).to(squared.dtype)
            inside |= (squared <= sure.unsqueeze(1 - dim)).any(dim=dim)
            is_open = (squared <= reach.unsqueeze(1 - dim)) & ~inside.unsqueeze(dim)
            i, j = is_open.nonzero(as_tuple=True)
            exact, slack = _exact(y, i + rows.start, x, j + part.start)
            within = exact <= radii[j if dim == 1 else i] + slack
            inside[(i if dim == 1 else j)[within]] = True
    return precise.double().mean().item(), recalled.double().mean().item()


def density_coverage(
    real: Vectors, fake: Vectors, *, k: int = 5, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Return density and coverage of the real vectors' neighbourhoods by the generated vectors.

    A neighbourhood is the open ball around a real vector that extends to its k-th nearest other
    real vector. Density is the mean number of neighbourhoods that a generated vector lies in,
    divided by k; it may exceed 1. Coverage is the share of neighbourhoods that contain a generated
    vector.

    Vectors are [N, D] and [M, D]; ``device`` is where distances are computed. Raises ValueError
    unless all are finite and more than k are real. Source: Naeem et al., "Reliable fidelity and
    diversity metrics for generative models", arXiv:2002.09797, Eq. 3 and 4.
    """
    x, y = _prepare(*check_vectors(real, fake), device)
    radii = _squared_radii(x, k)
    num_inside = 0
    visited = torch.zeros(len(x), dtype=torch.bool, device=radii.device)
    for rows, part, squared in _blocks_of_pairs(y, x):
        own, errors = radii[part], x.errors(part, y, rows)
        inside = squared < (own - errors).to(squared.dtype)
        i, j = ((squared <= (own + errors).to(squared.dtype)) & ~inside).nonzero(as_tuple=True)
        exact, slack = _exact(y, i + rows.start, x, j + part.start)
        inside[i, j] = exact < own[j] - slack
        num_inside += int(inside.sum())
        visited[part] |= inside.any(dim=0)
    return num_inside / (k * len(y)), visited.double().mean().item()


def _squared_radii(points: _Set, k: int) -> torch.Tensor:
    """Return the squared distance of each point to its k-th nearest other point, float64 [N].

    Distances are in units of ``points.scale``. Raises ValueError unless there are more than k.
    """
    if len(points) <= k:
        needs = f"needs more than {k} images of either kind; got {len(points)}"
        raise ValueError(f"The distance to neighbour number {k} {needs}.")
    own = torch.arange(len(points))
    return _nearest(points, points, k, own, only_last=True)[0][:, -1]
