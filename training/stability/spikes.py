"""Detects when the loss leaves its usual range, from the losses of single steps."""

import collections
import math
import statistics
from typing import Any

FACTOR = 5.0  # Of the median of the usual losses.
NUM_STEPS = 5  # So many in a row are a spike; single ones come with unusual batches.
_NUM_USUAL = 200
_NUM_KNOWN = 50  # Nothing is said before so many losses are known.


class SpikeDetector:
    """Finds :data:`NUM_STEPS` losses in a row above :data:`FACTOR` times the usual one.

    The usual loss is the median of the last 200 that were not above. Losses that are not finite
    belong to steps that the optimizer skips, and count for nothing. A level that stays becomes
    the usual one.
    """

    def __init__(self) -> None:
        self._usual: collections.deque[float] = collections.deque(maxlen=_NUM_USUAL)
        self._in_a_row = 0
        self._age = 0  # Steps since the first of those in a row.

    def first(self, losses: list[float]) -> int | None:
        """Return where in the next ``losses`` a spike begins, None without one.

        A spike that began before them is at a negative place.
        """
        found = None
        for place, loss in enumerate(losses):
            self._age += 1
            if not math.isfinite(loss):
                continue
            is_high = len(self._usual) >= _NUM_KNOWN
            is_high = is_high and loss > FACTOR * statistics.median(self._usual)
            self._in_a_row = self._in_a_row + 1 if is_high else 0
            if self._in_a_row <= 1:
                self._age = 0
            if self._in_a_row == NUM_STEPS and found is None:
                found = place - self._age
            if not is_high or self._in_a_row > NUM_STEPS:
                self._usual.append(loss)
        return found

    def forget(self) -> None:
        """Begin anew, as the loss is another one from here on."""
        self._usual.clear()
        self._in_a_row = self._age = 0

    def state_dict(self) -> dict[str, Any]:
        """Return plain values that :meth:`load_state_dict` restores."""
        return dict(usual=list(self._usual), in_a_row=self._in_a_row, age=self._age)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._usual.clear()
        self._usual.extend(state["usual"])
        self._in_a_row, self._age = state["in_a_row"], state["age"]
