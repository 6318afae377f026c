"""Nearest neighbours in feature space: precision and recall, density and coverage.

Distances are Euclidean. Products of float32 vectors are taken in float32, block by block of fixed
size, which leaves every squared distance within a proven bound. Only the few pairs for which that
bound leaves open what is nearer, or who lies within a radius, are computed again in float64, so
that the results depend on nothing but the vectors.

The same distance comes out of another computation with other last digits. Distances that differ by
less than such rounding are therefore equal wherever they are compared with a radius.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike

from metrics.vectors import Vectors, check_vectors

_ROWS, _COLUMNS = 1024, 8192
_MAX_VALUES = 2**26  # Of a block of vectors.
_MAX_PAIR_VALUES = 2**22  # Of the pairs whose distances are computed exactly at a time.
# Bound on the error of |a - b|^2 in float64 relative to |a|^2 + |b|^2; 2e-14 is seen at 12,288
# values.
_ROUNDING = 1e-13
_MAX_WIDTH = 4096  # Number of float32 products that are added in float32.
_TINY = 1e-36  # What underflow can add in float32, relative to the largest value squared.
_SPARE = 8  # Neighbours kept beyond those asked for, in case the bound leaves their order open.


@dataclasses.dataclass(frozen=True)
class _Set:
    """Vectors as they are, and centred and scaled on the device, where distances are taken.

    |a - b|^2 = |a|^2 + |b|^2 - 2 ab loses digits far from the origin, which centring saves.
    """

    vectors: torch.Tensor  # [N, D], as given.
    unit: torch.Tensor  # (vectors - center) / scale, float32 or float64 [N, D].
    sizes: torch.Tensor  # Squared lengths of ``unit``, float64 [N].
    scale: float  # A power of two, the same for sets that are compared.

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def rounding(self) -> float:
        """Bound on the error of :func:`_blocks_of_pairs`, relative to the sum of two sizes.

        n float32 products that are added in any order have an error of at most n 2^-24 |a| |b|
        (Higham, "Accuracy and stability of numerical algorithms", section 3.1). A tenth more leaves
        room for the rounding of the vectors, of the sum with the sizes, and of the comparison.
        """
        if self.unit.dtype == torch.float64:
            return _ROUNDING
        return 1.1 * (min(self.unit.shape[1], _MAX_WIDTH) + 16) * 2.0**-24

    def errors(self, part: slice, others: "_Set", beside: slice) -> torch.Tensor:
        """Return a bound on the error of the distances of each vector of ``part``, float64 [N].

        They are the distances to any of the vectors ``beside`` of the other set.
        """
        return self.rounding * (self.sizes[part] + others.sizes[beside].max()) + _TINY


def _prepare(
    first: torch.Tensor, second: torch.Tensor, device: torch.device | str
) -> tuple[_Set, _Set]:
    """Return two sets with the mean of the first as their origin."""
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
    """Yield slices of rows and points with their squared distances, within :meth:`_Set.errors`.

    Distances are [rows of the block, points of the block], in units of ``scale``. All blocks of the
    same rows follow each other.
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
    """Return the squared distances of pairs of vectors in float64, and what is rounding of them."""
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
    # What is left of equal vectors is rounding; float32 features tell no such distances apart.
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
    columns, rows = _prepare(points, queries, device)
    own = None if own is None else torch.as_tensor(own)
    squared, indices = _nearest(rows, columns, k, own)
    return (squared.sqrt() * rows.scale).cpu().numpy(), indices.cpu().numpy()


def _nearest(
    rows: _Set, points: _Set, k: int, own: torch.Tensor | None, *, only_last: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return squared distances [N, k] and indices [N, k] of the k nearest points, exactly.

    With ``only_last`` those before the last are in no order, and some of the distances -inf.
    """
    device, num_others = rows.sizes.device, len(points) - (own is not None)
    num_kept = min(k + _SPARE, num_others)
    found = torch.empty(len(rows), k, dtype=torch.float64, device=device)
    indices = torch.empty(len(rows), k, dtype=torch.int64, device=device)
    for block, values, places in _candidates(rows, points, num_kept, own):
        # Two distances within the bound of each other are in any order.
        bound = 2 * rows.errors(block, points, slice(None))[:, None]
        kth = values[:, k - 1 : k]
        unsure = values <= kth + bound
        exact = torch.full(values.shape, torch.inf, dtype=torch.float64, device=device)
        if only_last:
            exact[values < kth - bound] = -torch.inf
            unsure &= values >= kth - bound
        i, column = unsure.nonzero(as_tuple=True)
        exact[i, column], _ = _exact(rows, i + block.start, points, places[i, column])
        # By distance, then index: a stable sort keeps the order that it meets.
        by_index = places.argsort(dim=1)
        order = exact.gather(1, by_index).argsort(dim=1, stable=True)[:, :k]
        chosen = by_index.gather(1, order)
        found[block], indices[block] = exact.gather(1, chosen), places.gather(1, chosen)
        if num_kept < num_others:
            # Where more are that near than were kept, all are measured.
            for row in unsure[:, -1].nonzero()[:, 0].tolist():
                row += block.start
                alone = None if own is None else int(own[row])
                found[row], indices[row] = _nearest_of_one(rows, row, points, k, alone)
    return found, indices


def _candidates(
    rows: _Set, points: _Set, num: int, own: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield, for blocks of rows, the ``num`` smallest distances within the bound and their places.

    Ascending, float64 and int64 [rows of the block, num].
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
    """Return what :func:`_nearest` does for a single row, from all its distances in float64."""
    j = torch.arange(len(points), device=rows.sizes.device)
    squared, _ = _exact(rows, torch.full_like(j, row), points, j)
    if own is not None:
        squared[own] = torch.inf
    values, order = squared.sort(stable=True)
    return values[:k], order[:k]


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
    x, y = _prepare(*check_vectors(real, fake), device)
    of_real, of_fake = _squared_radii(x, k), _squared_radii(y, k)
    precise = torch.zeros(len(y), dtype=torch.bool, device=of_real.device)
    recalled = torch.zeros(len(x), dtype=torch.bool, device=of_real.device)
    # One pass for both: a distance is held against the radius on either side.
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
    """Return how many real neighbourhoods a generated image lies in, and the share of them visited.

    A neighbourhood is the open ball around a real vector that reaches to its k-th nearest other
    real vector. Density is the mean number of neighbourhoods that a generated vector lies in,
    divided by k; it may exceed 1. Coverage is the share of neighbourhoods that hold any.

    Vectors are [N, D] and [M, D]; ``device`` is where distances are computed. Raises ValueError
    unless there are more than k real vectors. Source: Naeem et al., "Reliable fidelity and
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
    """Return the squared distance of each point to its k-th nearest other point, [N]."""
    if len(points) <= k:
        needs = f"needs more than {k} images of either kind; got {len(points)}"
        raise ValueError(f"The distance to neighbour number {k} {needs}.")
    own = torch.arange(len(points))
    return _nearest(points, points, k, own, only_last=True)[0][:, -1]
