"""The picture of a conditioning report: bars of each condition's effect, and attention by layer."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from evaluation.conditioning.report import ALL_LEVELS, CHANGES, Report, signed_percent
from torch_utils.charts import new_figure, picture_of

_WIDTH = 1200
_BAR_HEIGHT = 0.26  # As a share of the distance between two conditions.
_PALE = "#828282"
COLOURS = dict(zip(CHANGES, ("#26547c", "#ef8354", "#ffbe5c"), strict=True))
_SEGMENTS = ("#56628c", "#d65d4d", "#67a082", "#beaa5a")
_LEAST_SHOWN = 0.03  # A bar for a smaller share of a layer's attention has no room for a label.


def report_picture(report: Report, title: str) -> Image.Image:
    """Return a report as one picture: changes of output and loss side by side, attention below."""
    conditions = list(dict.fromkeys(row["condition"] for row in report.rows))
    heights = [90 + 66 * len(conditions)]
    if report.attention:
        heights.append(70 + 21 * len(report.attention))
    figure = new_figure(_WIDTH, 90 + sum(heights))
    figure.suptitle(f"{title}\n{report.rows[0]['panel']}", x=0.01, ha="left", fontsize=13)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)

    rows = {
        (row["condition"], row["change"]): row for row in report.rows if row["sigma"] == ALL_LEVELS
    }
    output, loss = (figure.add_subplot(grid[0, column]) for column in range(2))
    _draw_changes(output, rows, conditions, "output_change", "{:.3f}".format)
    output.set_title("Change of the output (1.4: as different as another image)", fontsize=11)
    _draw_changes(loss, rows, conditions, "loss_change", signed_percent)
    loss.set_title("Relative change of the loss", fontsize=11)
    loss.xaxis.set_major_formatter(lambda value, _: f"{100 * value:+.3g}%" if value else "0%")
    handles, names = output.get_legend_handles_labels()
    figure.legend(handles, names, loc="upper right", ncols=len(names), frameon=False)
    if report.attention:
        _draw_attention(figure.add_subplot(grid[1, :]), report)
    return picture_of(figure)


def _draw_changes(
    axes: Any,
    rows: dict[tuple[str, str], dict[str, Any]],
    conditions: Sequence[str],
    name: str,
    text: Callable[[float], str],
) -> None:
    """Draw a bar with its standard error for every condition and change.

    If nothing was measured, the reason is the label.
    """
    for offset, (change, colour) in enumerate(COLOURS.items()):
        values, errors, labels = [], [], []
        for condition in conditions:
            row = rows[condition, change]
            found = row["values"]
            values.append(found[name] if found else 0.0)
            errors.append(found[f"{name}_se"] if found else 0.0)
            labels.append(text(found[name]) if found else row["reason"])
        y = np.arange(len(conditions)) + (offset - 1) * _BAR_HEIGHT
        error_style = dict(elinewidth=1, ecolor="#222222")
        bars = axes.barh(
            y, values, 0.9 * _BAR_HEIGHT, xerr=errors, color=colour, error_kw=error_style
        )
        bars.set_label(change)
        axes.bar_label(bars, labels, padding=4, fontsize=8)
    axes.set_yticks(range(len(conditions)), conditions)
    axes.invert_yaxis()
    axes.axvline(0, color=_PALE, linewidth=1)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_attention(axes: Any, report: Report) -> None:
    """Draw a bar of the whole width for each layer, divided like its attention."""
    axes.set_title("Attention by layer", fontsize=11)
    y = np.arange(len(report.attention))
    done = np.zeros(len(y))
    for name, colour in zip(report.attention[0], _SEGMENTS, strict=False):
        shares = np.array([layer[name] for layer in report.attention])
        bars = axes.barh(y, shares, 0.85, left=done, color=colour, label=name)
        labels = [f"{share:.0%}" if share >= _LEAST_SHOWN else "" for share in shares]
        axes.bar_label(bars, labels, label_type="center", color="white", fontsize=8)
        done += shares
    axes.set_yticks(y, [f"layer {index}" for index in y])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(_SEGMENTS), frameon=False)
