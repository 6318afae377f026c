"""Charts of a page: data for its script to draw, and the same as a table for screen readers."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from training.run_report.history import Curve
from training.run_report.markup import Html, details, table, tag

_NUM_ROWS = 12  # Most rows in the table of a chart.
_MAX_COLUMNS = 12
_OF_TEXT = ("note", "band", "y")  # Fields that become HTML and are not passed to the script.


@dataclasses.dataclass(frozen=True)
class Line:
    """One line, or one series of bars, of a chart."""

    name: str
    curve: Curve
    points: bool = False  # Whether every point is marked.
    colour: int | None = None  # Number of the colour; by default the line's place in the chart.


@dataclasses.dataclass(frozen=True)
class Chart:
    """The contents of a chart.

    Attributes:
        kind: ``line``, ``bars`` side by side, or ``stack`` of bars.
        x: Name of the horizontal axis; all ``kimg`` axes of a page zoom together.
        y: Unit of the vertical axis, if it has any.
        log, log_x: Whether the vertical or horizontal axis is logarithmic at first.
        names: Labels below the groups of bars.
        percent: Whether values are shares, shown in percent.
        note: A sentence below the chart.
        band: Meaning of the range around a line or bar, for a note.
    """

    title: str
    lines: Sequence[Line]
    kind: str = "line"
    x: str = "kimg"
    y: str = ""
    log: bool = False
    log_x: bool = False
    names: Sequence[str] = ()
    percent: bool = False
    note: Any = None
    band: str = "range of the ticks that a point stands for"


class Canvas:
    """Collects the charts of a page; :attr:`content` is the data for the script."""

    def __init__(self) -> None:
        self.content: dict[str, list[Any]] = dict(xs=[], charts=[])
        self._places: dict[tuple[Any, ...], int] = {}

    def figures(self, charts: Iterable[Chart]) -> Html | None:
        """Return a grid of charts; None if none of them has a line."""
        found = [self.figure(chart) for chart in charts if chart.lines]
        return tag("div", found, class_="charts") if found else None

    def figure(self, chart: Chart) -> Html:
        """Return the figure of a chart: an empty plot, which the script fills, and a table."""
        number = len(self.content["charts"])
        lines = [self._line(index, line) for index, line in enumerate(chart.lines)]
        own = (field.name for field in dataclasses.fields(chart) if field.name not in _OF_TEXT)
        fields = {name: getattr(chart, name) for name in own}
        self.content["charts"].append({**fields, "lines": lines})
        has_band = any(line.curve.low is not None for line in chart.lines)
        marks = "Shaded" if chart.kind == "line" else "Whiskers"
        note = chart.note or (f"{marks}: {chart.band}." if has_band else None)
        return tag(
            "figure",
            tag("figcaption", tag("h3", chart.title, chart.y and f" ({chart.y})")),
            tag("div", class_="plot"),
            note and tag("p", note, class_="note"),
            details("Values", _values(chart), class_="values"),
            class_="chart",
            data_chart=number,
            aria_label=chart.title,
        )

    def _line(self, index: int, line: Line) -> dict[str, Any]:
        key = tuple(line.curve.x)  # Curves of a run share their kimg, which is stored once.
        if key not in self._places:
            self._places[key] = len(self.content["xs"])
            self.content["xs"].append(line.curve.x)
        found: dict[str, Any] = dict(name=line.name, x=self._places[key], y=line.curve.y)
        if line.curve.low is not None:
            found.update(low=line.curve.low, high=line.curve.high)
        colour = index if line.colour is None else line.colour
        return dict(found, points=line.points, colour=colour)


def _values(chart: Chart) -> Html:
    """Return a chart as a table of at most 12 rows, including its first and last point."""
    lines = chart.lines[:_MAX_COLUMNS]
    xs = sorted({x for line in lines for x in line.curve.x})
    if len(xs) > _NUM_ROWS:
        step = (len(xs) - 1) / (_NUM_ROWS - 1)
        xs = [xs[round(i * step)] for i in range(_NUM_ROWS)]
    columns = [dict(zip(line.curve.x, line.curve.y, strict=True)) for line in lines]
    rows = []
    for x in xs:
        first = chart.names[int(x)] if chart.names else f"{x:.6g}"
        rows.append([first, *(_cell(column.get(x), chart.percent) for column in columns)])
    heading = [chart.x, *(line.name for line in lines)]
    return table(heading, rows, label=f"Values of: {chart.title}", class_="numbers")


def _cell(value: float | None, percent: bool) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if percent else f"{value:.4g}"
