"""Charts drawn by matplotlib, without its global state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import PIL.Image

_DPI = 100


def check_charts(option: str) -> None:
    """Raise ValueError if matplotlib, which ``option`` needs, is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        problem = f"charts need the package {error.name}, which is not installed"
        remedy = 'pip install matplotlib, or pip install -e ".[charts]"'
        raise ValueError(f"{option}: {problem}: {remedy}.") from None


def new_figure(width: int, height: int) -> Any:
    """Return an empty matplotlib Figure of the given size in pixels, with automatic layout."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def picture_of(figure: Any) -> PIL.Image.Image:
    """Return a figure made by :func:`new_figure` as an RGB picture."""
    import PIL.Image

    figure.canvas.draw()
    return PIL.Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
