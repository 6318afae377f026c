"""What a watcher knows of a tick, and how the statistics of ticks are read back."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

from training.watching.finding import Finding


@dataclasses.dataclass(frozen=True)
class Tick:
    """The statistics of one tick of a run.

    Attributes:
        step: Optimizer steps so far.
        num_steps: Those of the whole run.
        phase: Changes where the loss becomes another one.
        stats: A row of ``stats.jsonl``: by name ``num``, ``mean`` and ``std``.
    """

    step: int
    num_steps: int
    phase: tuple[int, ...]
    stats: Mapping[str, Any]

    @property
    def is_probed(self) -> bool:
        """Whether a probe was made at the end of the tick."""
        return "Watch/loss" in self.stats

    def mean(self, name: str) -> float | None:
        """Return the mean of a statistic; None where it is absent or not finite."""
        return self._number(name, "mean")

    def standard_error(self, name: str) -> float | None:
        """Return the standard error of the mean of a statistic; None where it is unknown."""
        num, std = self._number(name, "num"), self._number(name, "std")
        return std / math.sqrt(num) if num and std is not None else None

    def by_block(self, kind: str) -> dict[str, float]:
        """Return the means of the statistics ``Watch/KIND/BLOCK`` by block, in their order."""
        prefix = f"Watch/{kind}/"
        means = {
            name.removeprefix(prefix): self.mean(name)
            for name in self.stats
            if name.startswith(prefix)
        }
        return {name: value for name, value in means.items() if value is not None}

    def _number(self, name: str, key: str) -> float | None:
        stat = self.stats.get(name)
        value = stat.get(key) if isinstance(stat, Mapping) else None
        is_number = isinstance(value, int | float) and math.isfinite(value)
        return float(value) if is_number else None


class Watcher(Protocol):
    """Judges the statistics of a run, tick by tick.

    What it keeps is a function of the ticks so far alone: a run that continues shows it the rows
    of ``stats.jsonl`` again.
    """

    def look(self, tick: Tick) -> list[Finding] | None:
        """Return what is wrong at this tick; None if the tick does not show it."""
        ...
