"""The search for the best cell of a grid: successive halving on paired images, with intervals.

It knows nothing about networks, images or metrics: a function returns the scores of cells on their
first images. All cells of a round are compared on the same seeds, and on equally many of them. As
scores such as FID are biased by the number of images, more so if images vary more, cells are
compared by what their scores are estimated to be with all images.

Source: Jamieson and Talwalkar, "Non-stochastic best arm identification" (arXiv 1502.07943),
Algorithm 1. Deviation: intervals, too, limit the number of cells that go on to the next round.
"""

import dataclasses
from collections.abc import Callable, Sequence

from evaluation.sweep.jackknife import NUM_GROUPS, Estimate, t_quantile

# Returns the scores of cells on the given number of first images each; lower is better.
Estimates = Callable[[Sequence[int], int], list[Estimate]]
_GROWTH = 2  # Factor from round to round of the number of images of a cell.
_FINALISTS = 2  # Images are kept back to compare this many cells on all of theirs.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a search may spend.

    Attributes:
        counts: Images of a cell in each round, ascending.
        budget: Most images of all cells in all rounds.
        confidence: Probability that no cell of a round is told apart from the best by chance.
    """

    counts: tuple[int, ...]
    budget: int
    confidence: float = 0.95

    @classmethod
    def of(cls, num_cells: int, num_images: int, share: float, confidence: float = 0.95) -> "Plan":
        """Return a plan whose last round has ``num_images`` per cell.

        The budget is a ``share`` of the images of the whole grid, and the first round takes half of
        it. The budget is larger if the share is too small to give four cells all their images, and
        every cell two images for each group of the jackknife.
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
    """The result of a round with ``num_images`` images of each cell.

    Attributes:
        estimates: Estimated scores by cell, as with the number of images of the last round.
        best: The cell with the best score.
        alike: The cells that cannot be told apart from it, the best first, including itself.
        followed: Those of them that go on to the next round; in the last round, all of them.
    """

    num_images: int
    estimates: dict[int, Estimate]
    best: int
    alike: tuple[int, ...]
    followed: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of a search."""

    plan: Plan
    rounds: tuple[Round, ...]

    @property
    def winner(self) -> int:
        return self.rounds[-1].best

    @property
    def num_images(self) -> int:
        """Number of images of all cells in all rounds."""
        before, total = 0, 0
        for found in self.rounds:
            total += len(found.estimates) * (found.num_images - before)
            before = found.num_images
        return total

    def last_round(self, cell: int) -> Round:
        """Return the last round in which a cell was compared."""
        return next(found for found in reversed(self.rounds) if cell in found.estimates)

    def behind(self, cell: int) -> tuple[float, float]:
        """Return how much worse a cell is than the winner in its last round, and the error."""
        estimates = self.last_round(cell).estimates
        return estimates[cell].minus(estimates[self.winner])

    def alike(self) -> list[int]:
        """Return the other cells that cannot be told apart from the winner, the best first.

        Some of them may not have been followed to the end, because there were too few images.
        """
        cells = self.rounds[0].estimates.keys() - {self.winner}
        return sorted(filter(self.is_alike, cells), key=self.behind)

    def is_alike(self, cell: int) -> bool:
        """Return whether a cell could not be told apart from the winner in its last round."""
        last = self.last_round(cell)
        return not is_apart(*self.behind(cell), len(last.estimates), self.plan.confidence)


def is_apart(difference: float, error: float, num_cells: int, confidence: float) -> bool:
    """Return whether one of ``num_cells`` is worse than the best by more than chance.

    ``difference`` and its standard ``error`` are those of the scores. All comparisons of a round
    hold jointly with the ``confidence`` (Bonferroni correction).
    """
    limit = t_quantile(1 - (1 - confidence) / max(num_cells - 1, 1))
    return difference > limit * error


def search(
    num_cells: int,
    plan: Plan,
    estimate: Estimates,
    report: Callable[[Round], None] = lambda found: None,
) -> Found:
    """Return the result of a search over cells 0 to ``num_cells`` - 1.

    A round drops the cells that are worse than its best one by more than chance and, the worst
    first, those for which the images left do not suffice. The search ends when cells were compared
    on all of their images, or when a single one is left. ``report`` is called after each round.
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

    Of the images that are ``left``, those that the finalists need are kept back; every round to
    come has an equal share of the others.
    """
    added = counts[1] - counts[0]
    spare = left - _FINALISTS * (counts[-1] - counts[0])
    share = spare / (len(counts) - 1) + _FINALISTS * added
    return max(_FINALISTS, int(share // added))
