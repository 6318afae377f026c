"""What a preset is: a whole run by name, with its source."""

import dataclasses
import math

from training.config import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A run's configuration, and what is usually known of its data before it is opened."""

    run: RunConfig
    num_classes: int  # Of the dataset that the preset is named after, used with --cond.
    source: str


def half_life_kimg(beta: float, batch: int) -> float:
    """Return the half-life of a weight average whose decay is ``beta`` a step of ``batch``."""
    return batch * math.log(0.5) / math.log(beta) / 1000
