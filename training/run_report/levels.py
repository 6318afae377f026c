"""Losses by noise level, identified by the names of statistics: ``Loss/sigma_0.1-0.2``."""

import dataclasses
import math
import re
from typing import NamedTuple

import numpy as np

from training.run_report.history import VALIDATION, Curve, History

_NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_LARGEST = 1e9  # A larger noise level stands for infinity.
_NAME = re.compile(rf"(.*(?:sigma_|_t))({_NUMBER})-({_NUMBER}|inf)")


class Kind(NamedTuple):
    """A group of statistics with a common prefix, one for each range of noise levels."""

    start: str

    @property
    def is_log(self) -> bool:
        """Whether levels are standard deviations of noise, not times of a flow in [0, 1]."""
        return self.start.endswith("sigma_")

    @property
    def loss(self) -> str:
        return "Validation loss" if self.start.startswith(VALIDATION) else "Loss"

    @property
    def symbol(self) -> str:
        return "sigma" if self.is_log else "t"

    @property
    def axis(self) -> str:
        return "noise level sigma" if self.is_log else "time t of the flow"


class Range(NamedTuple):
    """The range of noise levels of one statistic."""

    kind: Kind
    low: float
    high: float

    @property
    def text(self) -> str:
        if self.high > _LARGEST:
            return f"{self.kind.symbol} above {self.low:g}"
        if self.low == 0:
            return f"{self.kind.symbol} below {self.high:g}"
        return f"{self.kind.symbol} {self.low:g} to {self.high:g}"


def range_of(name: str) -> Range | None:
    """Return the range of noise levels in a statistic's name; None if it has none."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    kind, low, high = Kind(found[1]), float(found[2]), float(found[3])
    if low > _LARGEST or (high > _LARGEST and not kind.is_log):
        return None
    return Range(kind, low, high)


def kinds_of(history: History) -> list[Kind]:
    """Return the kinds of losses by noise level that a run has."""
    ranges = filter(None, map(range_of, history.names))
    return list(dict.fromkeys(found.kind for found in ranges))


@dataclasses.dataclass(frozen=True)
class Levels:
    """The losses of a run by noise level, of one kind."""

    history: History
    ranges: dict[str, Range]  # By statistic, the lowest noise level first.

    @classmethod
    def of(cls, history: History, kind: Kind) -> "Levels":
        found = {name: range_of(name) for name in history.names}
        own = {name: r for name, r in found.items() if r is not None and r.kind == kind}
        return cls(history, dict(sorted(own.items(), key=lambda item: item[1][1:])))

    def texts(self) -> dict[str, str]:
        """Return the range of each statistic that has a value, as text."""
        return {n: r.text for n, r in self.ranges.items() if self.history.last(n) is not None}

    def profile(self, tick: int) -> Curve:
        """Return the loss over the noise level at tick number ``tick``; no points if negative."""
        if tick < 0:
            return Curve([], [])
        values = [self.history.values(name)[tick] for name in self.ranges]
        y = [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
        return Curve(self._centres(), y)

    def some_ticks(self) -> list[int]:
        """Return the first and last tick with a value, and those at 10% and 33% of kimg so far."""
        values = np.array([self.history.values(name) for name in self.ranges])
        ticks = np.flatnonzero(np.isfinite(values).any(axis=0))
        if not len(ticks):
            return []
        kimg = np.array(self.history.kimg)[ticks]
        wanted = kimg[-1] * np.array([0.1, 0.33, 1.0])
        places = {0, *np.searchsorted(kimg, wanted).clip(max=len(kimg) - 1).tolist()}
        return ticks[sorted(places)].tolist()

    def _centres(self) -> list[float]:
        """Return the centres of the ranges, geometric for sigma.

        Open ranges count as wide as the closed ones are on average.
        """
        ranges = list(self.ranges.values())
        if not all(found.kind.is_log for found in ranges):
            return [(found.low + found.high) / 2 for found in ranges]
        inner = [r.high / r.low for r in ranges if r.low > 0 and r.high <= _LARGEST]
        width = float(np.mean(inner)) if inner else 2.0
        found = []
        for one in ranges:
            high = one.high if one.high <= _LARGEST else max(one.low, 1e-3) * width
            low = one.low if one.low > 0 else high / width
            found.append(float(f"{low**0.5 * high**0.5:.4g}"))
        return found
