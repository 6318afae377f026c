"""The chart of docs/scaling.md: efficiency against the number of GPUs."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch_utils.charts import new_figure, picture_of


def efficiency_chart(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> Any:
    """Return a picture with one panel per title, and in it a line of (GPUs, efficiency) per preset.

    An efficiency of 1 is drawn as 100%.
    """
    figure = new_figure(1300, 520)
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, points in lines.items():
            numbers, shares = zip(*points, strict=True)
            axis.plot(numbers, [100 * share for share in shares], marker="o", ms=3, label=name)
        axis.axhline(80, color="grey", lw=1, ls="--")
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4,096"])
        axis.set(title=title, xlabel="GPUs", ylim=(0, 105))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("efficiency, %")
    axes[0].legend(fontsize=8)
    return picture_of(figure)
