"""The statistics of a tick, and the protocol of the watchers that judge them."""

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
        num_steps: Optimizer steps of the whole run.
        phase: The stage of the run, and a number that changes when the objective's loss does.
        stats: A row of ``stats.jsonl``: ``num``, ``mean`` and ``std`` by name.
    """

    step: int
    num_steps: int
    phase: tuple[int, ...]
    stats: Mapping[str, Any]

    @property
    def is_probed(self) -> bool:
        """Whether a probe ran at the end of the tick."""
        return "Watch/loss" in self.stats

    def mean(self, name: str) -> float | None:
        """Return the mean of a statistic; None if it is absent or not finite."""
        return self._number(name, "mean")

    def standard_error(self, name: str) -> float | None:
        """Return the standard error of the mean of a statistic; None if it is unknown."""
        num, std = self._number(name, "num"), self._number(name, "std")
        return std / math.sqrt(num) if num and std is not None else None

    def by_block(self, kind: str) -> dict[str, float]:
        """Return the finite means of the statistics ``Watch/KIND/BLOCK``, by block, in order."""
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

    Its state must be a function of the ticks so far alone, because a resumed run replays the rows
    of ``stats.jsonl``.
    """

    def look(self, tick: Tick) -> list[Finding] | None:
        """Return what is wrong at this tick; None if the tick cannot be judged."""
        ...
