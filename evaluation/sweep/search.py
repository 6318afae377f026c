"""The search for the best cell of a grid: successive halving on paired images, with intervals.

It knows nothing of networks, images or metrics: a function gives it the scores of cells on their
first images. All cells of a round are compared on the same seeds and at the same number of them.
A distance depends on that number, and more so where images vary more: cells are compared by what
their scores would be with all images. Source: Jamieson and Talwalkar, "Non-stochastic best arm
identification" (arXiv 1502.07943), Algorithm 1, with the number of cells that go on limited by
intervals too.
"""

import dataclasses
from collections.abc import Callable, Sequence

from evaluation.sweep.jackknife import NUM_GROUPS, Estimate, t_quantile

# Scores of some cells on as many images each, of which less is better.
Estimates = Callable[[Sequence[int], int], list[Estimate]]
_GROWTH = 2  # From round to round, of the images of a cell.
_FINALISTS = 2  # As many can always be compared on all images.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a search may spend.

    Attributes:
        counts: Images of a cell in each round, ascending.
        budget: Images of all cells in all rounds, at most.
        confidence: That no cell of a round is told apart from the best by chance.
    """

    counts: tuple[int, ...]
    budget: int
    confidence: float = 0.95

    @classmethod
    def of(cls, num_cells: int, num_images: int, share: float, confidence: float = 0.95) -> "Plan":
        """Return the plan to end with ``num_images`` a cell, for a share of the grid's images.

        The first round takes half of them. The share is exceeded where it does not give four cells
        all of their images, or every cell two for each group of the jackknife.
        """
        whole = num_cells * num_images
        budget = min(max(int(share * whole), 2 * _FINALISTS * num_images), whole)
        first = num_images
        if budget < whole:
            first = min(max(budget // 2 // num_cells, 2 * NUM_GROUPS), num_images)
            budget = max(budget, num_cells * first + _FINALISTS * (num_images - first))
        counts = [first]
        while counts[-1] < num_images:
            counts.append(min(_GROWTH * counts[-1], num_images))
        return cls(counts=tuple(counts), budget=budget, confidence=confidence)


@dataclasses.dataclass(frozen=True)
class Round:
    """What was found with ``num_images`` images of each cell.

    Attributes:
        estimates: By cell, as with the number of images of the last round.
        best: The cell with the best score.
        alike: Cells that cannot be told apart from it, the best first; it is one of them.
        followed: Those of them that go on to the next round, or came to the end.
    """

    num_images: int
    estimates: dict[int, Estimate]
    best: int
    alike: tuple[int, ...]
    followed: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Found:
    """The end of a search."""

    plan: Plan
    rounds: tuple[Round, ...]

    @property
    def winner(self) -> int:
        return self.rounds[-1].best

    @property
    def num_images(self) -> int:
        """Number of images of all cells."""
        before, total = 0, 0
        for found in self.rounds:
            total += len(found.estimates) * (found.num_images - before)
            before = found.num_images
        return total

    def last_round(self, cell: int) -> Round:
        """Return the last round in which a cell was compared."""
        return next(found for found in reversed(self.rounds) if cell in found.estimates)

    def behind(self, cell: int) -> tuple[float, float]:
        """Return how much worse a cell is than the winner on the images of both, and the error."""
        estimates = self.last_round(cell).estimates
        return estimates[cell].minus(estimates[self.winner])

    def alike(self) -> list[int]:
        """Return the cells that cannot be told apart from the winner, the best first.

        Some of them were not followed to the end, as the images did not suffice for all.
        """
        cells = self.rounds[0].estimates.keys() - {self.winner}
        return sorted(filter(self.is_alike, cells), key=self.behind)

    def is_alike(self, cell: int) -> bool:
        """Return whether a cell was not told apart from the winner where both were last in."""
        last = self.last_round(cell)
        return not is_apart(*self.behind(cell), len(last.estimates), self.plan.confidence)


def is_apart(difference: float, error: float, num_cells: int, confidence: float) -> bool:
    """Return whether one of ``num_cells`` is worse than the best by more than chance.

    All comparisons of a round hold together with the ``confidence`` (Bonferroni).
    """
    limit = t_quantile(1 - (1 - confidence) / max(num_cells - 1, 1))
    return difference > limit * error


def search(
    num_cells: int,
    plan: Plan,
    estimate: Estimates,
    report: Callable[[Round], None] = lambda found: None,
) -> Found:
    """Return what a search over cells 0 to ``num_cells`` - 1 finds; ``report`` hears of each round.

    A round leaves out the cells that are told apart from its best one, and those beyond its share
    of the images that are left, the worst first. The search ends when all images of a cell were
    compared, or when no other cell is left.
    """
    cells: Sequence[int] = range(num_cells)
    rounds, left, before = [], plan.budget, 0
    for index, count in enumerate(plan.counts):
        scores = [own.at(plan.counts[-1] / count) for own in estimate(cells, count)]
        estimates = dict(zip(cells, scores, strict=True))
        left -= len(cells) * (count - before)
        order = sorted(cells, key=lambda cell: (estimates[cell].value, cell))
        alike = [
            cell
            for cell in order
            if not is_apart(
                *estimates[cell].minus(estimates[order[0]]), len(order), plan.confidence
            )
        ]
        counts = plan.counts[index:]
        cells = alike[: _room(counts, left)] if len(counts) > 1 else alike
        rounds.append(Round(count, estimates, order[0], tuple(alike), tuple(cells)))
        report(rounds[-1])
        before = count
        if len(cells) < 2:
            break
    return Found(plan, tuple(rounds))


def _room(counts: Sequence[int], left: int) -> int:
    """Return how many cells can go on from the first of the ``counts`` to the next.

    Every round to come has an equal share of the images that are ``left``, but for those that the
    finalists need.
    """
    added = counts[1] - counts[0]
    spare = left - _FINALISTS * (counts[-1] - counts[0])
    share = spare / (len(counts) - 1) + _FINALISTS * added
    return max(_FINALISTS, int(share // added))
