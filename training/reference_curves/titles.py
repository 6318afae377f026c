"""Titles of curves for use in sentences, and the order in which they are shown."""

from training.run_report.levels import range_of

LOSS, VALIDATION, GRADIENT = "Loss/loss", "Validation/loss", "Loss/grad_norm"
_STATISTICS = {LOSS: "the loss", VALIDATION: "the validation loss", GRADIENT: "the gradient norm"}


def title_of(name: str) -> str:
    """Return what a sentence calls a statistic or METRIC/VALUE, such as ``the loss``."""
    if name in _STATISTICS:
        return _STATISTICS[name]
    level = range_of(name)
    if level is not None:
        return f"the loss at {level.text}"
    metric, _, value = name.partition("/")
    return metric if metric == value else f"{metric} ({value})"


def order_of(name: str) -> tuple[int, float]:
    """Return a sort key for curves: losses, gradient norm, losses by noise level, scores."""
    first = (LOSS, VALIDATION, GRADIENT)
    if name in first:
        return first.index(name), 0.0
    level = range_of(name)
    return (4, 0.0) if level is None else (3, level.low)
