"""Detects spikes of the loss, from the losses of single steps."""

import collections
import math
import statistics
from typing import Any

FACTOR = 5.0  # A loss is high above this multiple of the median of the usual losses.
NUM_STEPS = 5  # So many high losses in a row are a spike; unusual batches cause single ones.
_NUM_USUAL = 200
_NUM_KNOWN = 50  # No loss counts as high before so many are known.


class SpikeDetector:
    """Finds :data:`NUM_STEPS` losses in a row above :data:`FACTOR` times the usual loss.

    The usual loss is the median of the last 200 losses that were not high. Non-finite losses belong
    to steps that the optimizer skips, and are ignored. A high level that persists becomes the usual
    one.
    """

    def __init__(self) -> None:
        self._usual: collections.deque[float] = collections.deque(maxlen=_NUM_USUAL)
        self._in_a_row = 0
        self._age = 0  # Steps since the first of the high losses in a row.

    def first(self, losses: list[float]) -> int | None:
        """Return the index in the next ``losses`` at which a spike begins, None without one.

        It is negative for a spike whose first loss was passed in an earlier call.
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
        """Begin anew, because the losses from here on are not comparable with those before."""
        self._usual.clear()
        self._in_a_row = self._age = 0

    def state_dict(self) -> dict[str, Any]:
        """Return plain values that :meth:`load_state_dict` restores."""
        return dict(usual=list(self._usual), in_a_row=self._in_a_row, age=self._age)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._usual.clear()
        self._usual.extend(state["usual"])
        self._in_a_row, self._age = state["in_a_row"], state["age"]
