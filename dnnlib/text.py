"""Numbers, durations and lists as people read them."""

from collections.abc import Iterable


def format_time(seconds: float) -> str:
    """Return a duration such as ``42s``, ``3m 05s``, ``2h 07m`` or ``4d 03h``."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m {total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h {total // 60 % 60:02d}m"
    return f"{total // 86400}d {total // 3600 % 24:02d}h"


def format_count(number: float, unit: str = "") -> str:
    """Return a count with a metric prefix: ``15.93M``, ``4.20k``, ``12``."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= scale:
            return f"{number / scale:.2f}{prefix}{unit}"
    return f"{number:g}{unit}"


def format_kimg(kimg: float) -> str:
    """Return a number of thousands of images: ``0.26`` below one, ``154.3`` above."""
    return f"{kimg:.2f}" if 0 < kimg < 1 else f"{kimg:.1f}"


def join_names(names: Iterable[str]) -> str:
    """Return ``a``, ``a and b`` or ``a, b and c``."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
