"""The grid of a sweep: its axes and its cells."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from dnnlib.axes import Axes, value_text
from evaluation.config import ScoreConfig

STD_AXIS = "ema-std"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One sampling protocol with one average of the weights.

    Attributes:
        values: Value of each axis by its name.
        config: Sampling protocol and detectors.
        std: Relative standard deviation of the average; None for the weights of the snapshot.
    """

    values: Mapping[str, Any]
    config: ScoreConfig
    std: float | None

    @property
    def name(self) -> str:
        """The values as they are typed, such as ``cfg-scale=1.5 steps=8``."""
        return " ".join(f"{axis}={value_text(value)}" for axis, value in self.values.items())


@dataclasses.dataclass(frozen=True)
class Grid:
    """The cells of a sweep, and the values of every axis in order."""

    axes: Mapping[str, Sequence[Any]]
    cells: Sequence[Cell]

    def without(self, refused: Sequence[int]) -> "Grid":
        """Return the grid without these cells, by number, and the values that only they have."""
        kept = [cell for number, cell in enumerate(self.cells) if number not in set(refused)]
        return _grid(kept, self.axes)

    def describe(self) -> str:
        """Return the number of cells and the axes in one line."""
        axes = (f"{name} {_span(values)}" for name, values in self.axes.items())
        return f"{len(self.cells)} cells: {', '.join(axes)}"


def make_grid(axes: Axes, stds: Sequence[float]) -> Grid:
    """Return the grid of the axes and of averages with these stds; without stds, of one snapshot.

    Raises ValueError for fewer than two cells, and for values that are not accepted.
    """
    configs = axes.configs()
    cells = []
    for std, (config, values) in itertools.product(stds or (None,), configs.items()):
        own = dict(values) if std is None else {STD_AXIS: std, **values}
        cells.append(Cell(own, config, std))
    if len(cells) < 2:
        raise ValueError(
            "A sweep compares at least two cells: give an option of sampling or guidance several "
            "values, such as --cfg-scale=1:4:0.5, or --ema-std."
        )
    names = {STD_AXIS: stds} if stds else {}
    order = {axes.name(path): values for path, values in axes.values.items()}
    return _grid(cells, names | order)


def _grid(cells: Sequence[Cell], order: Mapping[str, Sequence[Any]]) -> Grid:
    """Return the grid of ``cells``. Only settings with several values become axes.

    Values are in the order of ``order``, in which they were typed.
    """
    axes = {}
    for name, given in order.items():
        there = dict.fromkeys(cell.values[name] for cell in cells)
        values = [value for value in given if value in there]
        values += [value for value in there if value not in values]
        if len(values) > 1:
            axes[name] = values
    own = [dataclasses.replace(c, values={name: c.values[name] for name in axes}) for c in cells]
    return Grid(axes, own)


def _span(values: Sequence[Any]) -> str:
    shown = list(map(value_text, values))
    return ", ".join(shown) if len(shown) <= 4 else f"{shown[0]} ... {shown[-1]} ({len(shown)})"
