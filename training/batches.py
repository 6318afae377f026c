"""The batches that a rank trains on, fetched before the step that needs them begins."""

import collections
from collections.abc import Iterable
from typing import Any

from dnnlib.errors import transportable
from torch_utils import distributed
from torch_utils.stop_signal import StopSignal

_STOPPED, _FAILED = 1, 1 << 16  # What ranks add up; there are fewer ranks than the latter.


class Batches:
    """The batches of one pass after the other.

    A server may not answer for minutes, or not at all. So all passes of a step have their batches
    before it begins, and what stops a rank from getting them leaves the steps before whole. Ranks
    agree on it before each step if their data are at an address; else several ranks do not spend
    the time, and read what a pass needs when it begins.

    Args:
        loader: Yields the batch of one pass after the other, without end.
        num_passes: Of a step.
        is_remote: Whether the data are at an address.
        stop_signal: By which a rank hears of a stop while it waits.
    """

    def __init__(
        self, loader: Iterable[Any], num_passes: int, is_remote: bool, stop_signal: StopSignal
    ) -> None:
        self._loader, self._num_passes = iter(loader), num_passes
        self._stop_signal = stop_signal
        self._is_alone = distributed.world_size() == 1
        self._is_ahead = self._is_alone or is_remote
        self._ready: collections.deque = collections.deque()
        self.failure: Exception | None = None

    def await_step(self) -> bool:
        """Return whether a step can begin, on every rank. Collective.

        It cannot after a signal, or if a rank's data cannot be read, which is every rank's
        ``failure`` then.
        """
        if not self._is_ahead:
            return True
        outcome = self._fetch()
        if self._is_alone:
            return outcome == 0
        outcomes = distributed.BackgroundSum(outcome).wait()
        if outcomes >= _FAILED:
            error = self.failure and transportable(self.failure)
            errors = distributed.gather_objects(error)
            self.failure = self.failure or next(filter(None, errors))
        return outcomes == 0

    def _fetch(self) -> int:
        try:
            while len(self._ready) < self._num_passes:
                batch = self._stop_signal.wait_for(lambda: next(self._loader))
                if batch is None:
                    return _STOPPED
                self._ready.append(batch)
        except Exception as error:
            self.failure = error
            return _FAILED
        return 0

    def of_pass(self) -> Any:
        """Return the batch of the next pass."""
        return self._ready.popleft() if self._ready else next(self._loader)
