"""Whether one thing is related to another: a permutation test on likeness in pairs."""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

NUM_PERMUTATIONS = 199
# So clear after the first permutations, a relation needs no more of them.
_NUM_FIRST, _CLEAR = 39, 7.0
_NUM_NEIGHBOURS = 5
_GRID, _CELLS, _ORIENTATIONS = 8, 4, 8


@dataclasses.dataclass(frozen=True)
class Relation:
    """The outcome of a test.

    Attributes:
        p: How often chance gives as strong a relation, 1/200 at the least; 0 where that is clear
            after a few permutations.
        num: Number of items compared.
        measured, expected: Mean likeness of an item and its 5 nearest neighbours, and of any two.
    """

    p: float
    num: int
    measured: float
    expected: float


def appearance(images: Tensor) -> Tensor:
    """Return the look of images [N, C, H, W] of any kind, float32 [N, D], centred.

    One half is the image at 8x8, the other where edges run in which direction, in 4x4 cells: what
    shows the class of small photographs at all, as in histograms of oriented gradients (Dalal &
    Triggs, CVPR 2005). Both halves have the same variance.
    """
    x = images.to(torch.float32)
    height, width = x.shape[-2:]
    coarse = functional.adaptive_avg_pool2d(x, (min(_GRID, height), min(_GRID, width)))
    parts = [coarse.flatten(1)]
    if min(height, width) >= _CELLS:
        parts.append(_edges(x).flatten(1))
    return torch.cat([_of_unit_variance(part) for part in parts], dim=1)


def _edges(x: Tensor) -> Tensor:
    """Return histograms of the directions of edges, [N, 8, 4, 4], each image's of unit norm."""
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
    """Return features [N, D], centred, of unit mean square length; zeros if they are constant."""
    return _of_unit_variance(values.to(torch.float32).flatten(1))


def likeness(values: Tensor) -> list[Tensor]:
    """Return who resembles whom by features [N, D], as matrices [N, N] without a diagonal.

    One is a linear rule, of ridge regression; the other has a 1 for each of the 5 nearest
    neighbours.
    """
    gram = values @ values.T
    ridge = gram.diagonal().mean().clamp(min=1e-12)  # About as much as all features together.
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
    """Return how items that look alike are alike in another way; None if none differ.

    Args:
        looks: Features of the items [N, D], one tensor for each batch of items of one size.
        others: Likeness of the items of each batch in that other way, [N, N].
        generator: Draws the permutations, each within its batch.

    The statistic is the larger of two, by a linear rule and by nearest neighbours, each in standard
    deviations of what permutations give.
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
    """Return how well the likenesses of items agree, [2], in an order drawn by ``generator``."""
    total = torch.zeros(2, dtype=torch.float64)
    for looks, other in pairs:
        if generator is not None:
            order = torch.randperm(len(other), generator=generator)
            other = other[order[:, None], order]
        total += torch.stack([torch.vdot(look.flatten(), other.flatten()) for look in looks])
    return total


def _deviations(totals: list[Tensor]) -> Tensor:
    """Return the larger statistic of each order in standard deviations, the first in none."""
    values = torch.stack(totals)
    spread = values[1:].std(0).clamp(min=1e-9)
    return ((values - values[1:].mean(0)) / spread).amax(1)
