"""The result of a sweep as one page: heat maps, trade-offs and a table of all cells."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dnnlib.axes import value_text
from evaluation.sweep.report import best_where, describe_result, front
from evaluation.sweep.sweep import Compared, Result
from training.run_report.charts import Canvas, Chart, Line
from training.run_report.history import Curve
from training.run_report.markup import Html, details, join, section, table, tag
from training.run_report.page import document

GENERATOR = "SetDiffiT sweep"
_WIDTH, _HEIGHT = 66, 26  # Size of a heat-map tile in pixels.
_MARGIN = 110  # Width in pixels for the values of the vertical axis.
_STRONGEST = 0.6  # Opacity of the best tile; text on it can still be read.
_NOTE = (
    "Each value is that of the best cell on fresh images, plus the difference from it on the "
    "images on which both were compared."
)


def sweep_page(result: Result, commands: Mapping[str, str]) -> str:
    """Return the page as HTML that loads nothing; ``commands`` are shown by what they do."""
    canvas = Canvas()
    head = tag("div", tag("h1", f"Sweep of {len(result.compared)} cells"))
    code = [
        join(tag("p", f"To {what}:"), tag("pre", tag("code", text)))
        for what, text in commands.items()
    ]
    parts = [
        section("best", "Best", tag("pre", tag("code", describe_result(result))), code),
        section("maps", "Heat maps", tag("p", _NOTE), _maps(result)),
        section("charts", "Trade-offs", tag("p", _NOTE), canvas.figures(_charts(result))),
        section("cells", "Cells", details("All cells", _table(result), open_=True)),
    ]
    footer = Html("Written by SetDiffiT.")
    return document("Sweep", head, parts, canvas, footer=footer, generator=GENERATOR)


def _maps(result: Result) -> list[Html]:
    """Return a heat map for each pair of axes, or for the only axis."""
    axes = list(result.grid.axes)
    pairs = list(itertools.combinations(axes, 2)) or [(axes[0], None)]
    return [_map(result, *pair) for pair in pairs]


def _map(result: Result, down: str, across: str | None) -> Html:
    """Return a heat map that shows the best cell, by the first metric, at each pair of values."""
    rows = result.grid.axes[down]
    columns = [None] if across is None else result.grid.axes[across]
    shown: list[Html] = []
    scale = _scale(result)
    for y, row in enumerate(rows):
        shown.append(_text(value_text(row), _MARGIN - 8, (y + 1.65) * _HEIGHT, "end"))
        for x, column in enumerate(columns):
            best = best_where(
                result,
                lambda own, row=row, column=column: (
                    own.cell.values[down] == row
                    and (across is None or own.cell.values[across] == column)
                ),
            )
            if best is not None:
                shown += _tile(result, best, x, y + 1, scale)
    for x, column in enumerate(columns):
        if column is not None:
            shown.append(_text(value_text(column), _MARGIN + (x + 0.5) * _WIDTH, 0.65 * _HEIGHT))
    width, height = _MARGIN + len(columns) * _WIDTH, (len(rows) + 1) * _HEIGHT
    title = f"{result.names[0]} by {down}" + (f" (down) and {across} (across)" if across else "")
    picture = tag(
        "svg",
        *shown,
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_label=title,
    )
    plot = tag("div", tag("div", picture, class_="plot"), class_="scroll")
    return tag("figure", tag("figcaption", tag("h3", title)), plot, class_="chart")


def _scale(result: Result) -> float:
    """Return the difference from the best at which a tile has half the opacity."""
    behind = sorted(own.behind for own in result.compared)
    return max(behind[len(behind) // 4], 1e-12)


def _tile(result: Result, own: Compared, x: int, y: int, scale: float) -> list[Html]:
    strength = _STRONGEST * 2 ** -max(own.behind / scale, 0.0)
    left, top = _MARGIN + x * _WIDTH, y * _HEIGHT
    box = dict(x=left + 1, y=top + 1, width=_WIDTH - 2, height=_HEIGHT - 2)
    if own is result.winner:
        box |= dict(stroke="currentColor", stroke_width=2)
    words = f"{own.cell.name}: {result.sign * own.behind:+.4g} +- {own.error:.2g}"
    tile = tag("rect", tag("title", words), class_="fill c0", fill_opacity=f"{strength:.3f}", **box)
    value = f"{own.values[result.names[0]]:.4g}"
    return [tile, _text(value, left + _WIDTH / 2, top + 0.65 * _HEIGHT)]


def _text(text: str, x: float, y: float, anchor: str = "middle") -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _charts(result: Result) -> list[Chart]:
    """Return charts of the first metric against each numeric axis, and of precision over recall."""
    charts = []
    name = result.names[0]
    for axis, values in result.grid.axes.items():
        numbers = sorted(value for value in values if _is_number(value))
        if len(numbers) == len(values):
            best = [_best_at(result, axis, value) for value in numbers]
            y = [own.values[name] for own in best]
            low = [value - own.error for value, own in zip(y, best, strict=True)]
            high = [value + own.error for value, own in zip(y, best, strict=True)]
            curve = Curve(list(map(float, numbers)), y, low, high)
            title = f"{name} against {axis}, the best of the other axes"
            lines = [Line(name, curve, points=True)]
            band = "one standard error of the difference from the best cell"
            charts.append(Chart(title, lines, x=axis, band=band))
    if {"precision", "recall"} <= set(result.names):
        kept = front(result, "recall", "precision")[::-1]
        x, y = ([own.values[key] for own in kept] for key in ("recall", "precision"))
        lines = [Line("precision", Curve(x, y), points=True)]
        note = "Cells that no other cell beats in both."
        charts.append(Chart("Precision against recall", lines, x="recall", note=note))
    return charts


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _best_at(result: Result, axis: str, value: Any) -> Compared:
    return best_where(result, lambda own: own.cell.values[axis] == value)


def _table(result: Result) -> Html:
    """Return a table of all cells, the winner first and the others from best to worst."""
    heading = ["cell", *result.names, "from the best", "error", "images", "told apart"]
    order = sorted(result.compared, key=lambda own: (own is not result.winner, own.behind))
    return table(heading, [_row(result, own) for own in order], label="Cells", class_="numbers")


def _row(result: Result, own: Compared) -> Sequence[str]:
    values = [f"{own.values[name]:.5g}" for name in result.names]
    behind = f"{result.sign * own.behind:+.4g}"
    apart = "no" if own.is_alike else "yes"
    return [own.cell.name, *values, behind, f"{own.error:.2g}", f"{own.num_images:,}", apart]
