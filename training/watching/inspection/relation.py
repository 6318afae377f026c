"""A permutation test of whether items that are alike in one way are alike in another."""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

NUM_PERMUTATIONS = 199
# A relation of 7 standard deviations after 39 permutations needs no more of them.
_NUM_FIRST, _CLEAR = 39, 7.0
_NUM_NEIGHBOURS = 5
_GRID, _CELLS, _ORIENTATIONS = 8, 4, 8


@dataclasses.dataclass(frozen=True)
class Relation:
    """The outcome of a test.

    Attributes:
        p: Probability that chance gives as strong a relation, 1/200 or more; 0 if a few
            permutations made the relation clear.
        num: Number of items compared.
        measured, expected: Mean likeness of items to their 5 nearest neighbours, and of any two.
    """

    p: float
    num: int
    measured: float
    expected: float


def appearance(images: Tensor) -> Tensor:
    """Return descriptors of how images look, float32 [N, D], centred.

    ``images`` are pixels or latents [N, C, H, W] in any range. One half of a descriptor is the
    image reduced to 8x8. The other is a histogram of edge directions in each of 4x4 cells, as in
    histograms of oriented gradients (Dalal & Triggs, CVPR 2005), without which the class of small
    photographs would not show. Both halves have the same variance.
    """
    x = images.to(torch.float32)
    height, width = x.shape[-2:]
    coarse = functional.adaptive_avg_pool2d(x, (min(_GRID, height), min(_GRID, width)))
    parts = [coarse.flatten(1)]
    if min(height, width) >= _CELLS:
        parts.append(_edges(x).flatten(1))
    return torch.cat([_of_unit_variance(part) for part in parts], dim=1)


def _edges(x: Tensor) -> Tensor:
    """Return histograms of edge directions, [N, 8 * 4 * 4], of unit norm for each image."""
    x = functional.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = x[:, :, 1:-1, 2:] - x[:, :, 1:-1, :-2]
    down = x[:, :, 2:, 1:-1] - x[:, :, :-2, 1:-1]
    strength = torch.hypot(across, down)
    turn = torch.atan2(down, across) / torch.pi + 1  # In [0, 2].
    which = (turn * (_ORIENTATIONS / 2)).long() % _ORIENTATIONS
    one_hot = functional.one_hot(which[:, 0], _ORIENTATIONS).permute(0, 3, 1, 2)
    histogram = functional.adaptive_avg_pool2d(strength * one_hot, (_CELLS, _CELLS)).sqrt()
    return functional.normalize(histogram.flatten(1), dim=1)


def _of_unit_variance(values: Tensor) -> Tensor:
    centred = values - values.mean(0)
    scale = centred.square().sum(1).mean().sqrt()
    return centred / scale if scale > 1e-6 else torch.zeros_like(centred)


def standardised(values: Tensor) -> Tensor:
    """Return values [N, ...] as float32 [N, D], centred and of unit mean squared length.

    Constant values become zeros.
    """
    return _of_unit_variance(values.to(torch.float32).flatten(1))


def likeness(values: Tensor) -> list[Tensor]:
    """Return two matrices [N, N], with zero diagonals, of how alike items of features [N, D] are.

    The first is the hat matrix of ridge regression. The second is the graph of the 5 nearest
    neighbours of each item: the mean of its 0/1 adjacency matrix and the transpose.
    """
    gram = values @ values.T
    ridge = gram.diagonal().mean().clamp(min=1e-12)  # The variance of all features together.
    identity = torch.eye(len(gram))
    linear = torch.linalg.solve(gram + ridge * identity, gram)
    lengths = gram.diagonal()
    distances = lengths[:, None] + lengths[None] - 2 * gram
    distances.fill_diagonal_(torch.inf)
    nearest = distances.topk(min(_NUM_NEIGHBOURS, len(gram) - 1), largest=False).indices
    graph = torch.zeros_like(gram).scatter_(1, nearest, 1.0)
    return [linear * (1 - identity), (graph + graph.T) / 2]


def relation(
    looks: list[Tensor], others: list[Tensor], generator: torch.Generator
) -> Relation | None:
    """Return whether items that look alike are alike in another way too; None if none differ.

    The test statistic is the larger of two, for each of the matrices of :func:`likeness`, in
    standard deviations over the permutations.

    Args:
        looks: Features of the items [N, D], one tensor for each batch of items of one size.
        others: How alike the items of each batch are in the other way, [N, N].
        generator: Draws the permutations, which stay within a batch.
    """
    pairs = [
        (likeness(look), other.clone().fill_diagonal_(0.0))
        for look, other in zip(looks, others, strict=True)
        if len(look) > 2 and look.any()
    ]
    num = sum(len(other) for _, other in pairs)
    totals = [_statistics(pairs, None)]
    for index in range(NUM_PERMUTATIONS):
        if index == _NUM_FIRST and float(_deviations(totals)[0]) > _CLEAR:
            break
        totals.append(_statistics(pairs, generator))
    if not num or not (torch.stack(totals[1:]).std(0) > 1e-9).any():
        return None
    strongest = _deviations(totals)
    p = float((strongest >= strongest[0] - 1e-9).sum() / len(strongest))
    shares = [
        torch.tensor(
            [(graph * other).sum() / graph.sum(), other.sum() / (len(other) ** 2 - len(other))]
        )
        * len(other)
        for (_, graph), other in pairs
    ]
    measured, expected = (torch.stack(shares).sum(0) / num).tolist()
    is_clear = len(totals) <= NUM_PERMUTATIONS
    return Relation(0.0 if is_clear else p, num, measured, expected)


def _statistics(
    pairs: list[tuple[list[Tensor], Tensor]], generator: torch.Generator | None
) -> Tensor:
    """Return how well both likenesses agree, [2], with the other one permuted by ``generator``."""
    total = torch.zeros(2, dtype=torch.float64)
    for looks, other in pairs:
        if generator is not None:
            order = torch.randperm(len(other), generator=generator)
            other = other[order[:, None], order]
        total += torch.stack([torch.vdot(look.flatten(), other.flatten()) for look in looks])
    return total


def _deviations(totals: list[Tensor]) -> Tensor:
    """Return the larger of both statistics of each order, in standard deviations, [orders].

    The first order, that of the data, does not enter the mean and the deviation.
    """
    values = torch.stack(totals)
    spread = values[1:].std(0).clamp(min=1e-9)
    return ((values - values[1:].mean(0)) / spread).amax(1)
