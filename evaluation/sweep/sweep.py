"""A whole sweep: the search, the winner's scores on fresh seeds, and all cells compared with it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dnnlib.progress import progress
from evaluation.sweep.grid import Cell, Grid
from evaluation.sweep.jackknife import Estimate
from evaluation.sweep.run import Cells, Images
from evaluation.sweep.search import Found, Plan, Round, search
from torch_utils import distributed
from training.run_report.scores import is_spread


@dataclasses.dataclass(frozen=True)
class Compared:
    """A cell compared with the winner, on the images of its last round.

    Attributes:
        cell: The cell.
        num_images: Number of these images.
        behind: How much worse its first metric is; 0 for the winner.
        error: Standard error of ``behind``.
        is_alike: Whether the cell cannot be told apart from the winner.
        values: All scores, moved to fresh images: the winner's there plus the difference from it.
    """

    cell: Cell
    num_images: int
    behind: float
    error: float
    is_alike: bool
    values: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a sweep.

    Attributes:
        names: Names of the values of all metrics; cells are ranked by the first.
        score: The winner's first metric on fresh seeds, where lower is better.
        winner_rows: The winner's score rows on fresh seeds.
        rows: Score rows of all cells, each on the images of its last round.
        compared: All cells compared with the winner, in the order of the grid.
    """

    grid: Grid
    found: Found
    names: Sequence[str]
    higher_is_better: bool
    score: Estimate
    winner_rows: Sequence[dict[str, Any]]
    rows: Sequence[dict[str, Any]]
    compared: Sequence[Compared]

    @property
    def winner(self) -> Compared:
        return self.compared[self.found.winner]

    @property
    def sign(self) -> int:
        return -1 if self.higher_is_better else 1

    def interval(self) -> tuple[float, float]:
        """Return the interval of the winner's first metric on fresh seeds."""
        ends = self.score.interval(self.found.plan.confidence)
        low, high = sorted(self.sign * end for end in ends)
        return low, high


def run_sweep(cells: Cells, plan: Plan, report: Callable[[Round], None]) -> Result:
    """Return the result of a sweep by ``plan``; ``report`` is called after each round. Collective.

    The winner is scored again on as many images from seeds that no cell was compared on, because
    the best of many scores is biased in its favour.
    """
    found = search(len(cells.grid.cells), plan, cells.estimates, report)
    winner, num = found.winner, plan.counts[-1]
    fresh = Images(winner, num, cells.first_seed + num)
    cells.make([fresh])
    (score,) = cells.scores([fresh])
    winner_rows = cells.rows(fresh)
    rows, of_winner = _all_rows(cells, found)
    values, higher = _values(winner_rows), cells.scoring.metrics[0].higher_is_better
    names = [name for name in values if not is_spread(name)]
    compared = []
    for number, cell in enumerate(cells.grid.cells):
        count, own = found.last_round(number).num_images, _values(rows[number])
        beside = of_winner[count]
        moved = {name: values[name] + own[name] - beside[name] for name in values}
        behind, error = found.behind(number)
        moved[names[0]] = values[names[0]] + (-behind if higher else behind)
        is_alike = found.is_alike(number)
        compared.append(Compared(cell, count, behind, error, is_alike, moved))
    flat = [row for own in rows for row in own]
    return Result(cells.grid, found, names, higher, score, winner_rows, flat, compared)


def _all_rows(
    cells: Cells, found: Found
) -> tuple[list[list[dict[str, Any]]], dict[int, dict[str, float]]]:
    """Return the rows of each cell in its last round, and the winner's values by image count."""
    numbers = range(len(cells.grid.cells))
    of_cells = [
        Images(number, found.last_round(number).num_images, cells.first_seed) for number in numbers
    ]
    counts = {images.num for images in of_cells}
    of_winner = [Images(found.winner, count, cells.first_seed) for count in counts]
    rows = {}
    is_main = distributed.is_main()
    wanted = dict.fromkeys([*of_cells, *of_winner])
    with progress(total=len(wanted), label="Rows", unit="cells", disable=not is_main) as bar:
        for images in wanted:
            rows[images] = cells.rows(images)
            bar.update()
    return [rows[images] for images in of_cells], {
        images.num: _values(rows[images]) for images in of_winner
    }


def _values(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the values of rows by name, preceded by that of the metric if the name is taken."""
    found: dict[str, float] = {}
    for row in rows:
        for name, value in row["values"].items():
            found[f"{row['metric']} {name}" if name in found else name] = value
    return found
