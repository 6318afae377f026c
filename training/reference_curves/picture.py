"""The picture of a run inside the bands of its reference."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from torch_utils.charts import new_figure, picture_of
from training.reference_curves.judge import Placed, Verdict
from training.reference_curves.titles import title_of

if TYPE_CHECKING:
    import PIL.Image

_COLUMNS = 3
_WIDTH, _HEIGHT = 460, 320  # Of a panel, in pixels.


def draw_verdict(verdict: Verdict, name: str) -> "PIL.Image.Image":
    """Return a picture with a panel for each reference curve, and the run's curve if judged."""
    reference = verdict.reference
    placed = {one.name: one for one in verdict.placed}
    columns = min(_COLUMNS, len(reference.curves))
    rows = math.ceil(len(reference.curves) / columns)
    figure = new_figure(_WIDTH * columns, _HEIGHT * rows + 60)
    axes = np.atleast_1d(figure.subplots(rows, columns)).flatten()
    for axis, (curve_name, curve) in zip(axes, reference.curves.items(), strict=False):
        marker = "o" if curve.kind == "point" else None
        label = f"{reference.coverage:.0%} band of {reference.num_runs} seeds"
        axis.fill_between(curve.kimg, curve.low, curve.high, color="0.85", label=label)
        axis.plot(curve.kimg, curve.mean, color="0.55", lw=1, marker=marker, ms=3)
        if curve_name in placed:
            _draw_run(axis, placed[curve_name], marker, name)
        axis.set_title(title_of(curve_name).removeprefix("the ").capitalize(), fontsize=10)
        axis.set_yscale("log")
        axis.set_xlabel("kimg")
        axis.grid(alpha=0.3, which="both")
    for axis in axes[len(reference.curves) :]:
        axis.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", fontsize=9)
    return picture_of(figure)


def _draw_run(axis: Any, one: Placed, marker: str | None, name: str) -> None:
    axis.plot(one.kimg, one.values, color="tab:blue", lw=1.3, marker=marker, ms=4, label=name)
    outside = one.side != 0
    axis.scatter(one.kimg[outside], one.values[outside], color="tab:red", s=18, zorder=3)
