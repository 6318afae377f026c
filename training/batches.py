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

    A server may not answer for minutes, or not at all. So where data are at an address, all passes
    of a step have their batches before it begins, and what stops a rank from getting them leaves
    the steps before whole; ranks agree on it before each step. Of local data a rank that is alone
    has the first batch before, and several ranks, which would have to agree, have none.

    Args:
        loader: Yields the batch of one pass after the other, without end.
        num_passes: Of a step.
        num_steps: That remain.
        is_remote: Whether the data are at an address.
        stop_signal: By which a rank hears of a stop while it waits.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        num_passes: int,
        num_steps: int,
        is_remote: bool,
        stop_signal: StopSignal,
    ) -> None:
        with stop_signal.deferred():  # An iterator that was half made cannot be dropped.
            self._loader = iter(loader)
        self._stop_signal = stop_signal
        self._is_alone, self._is_remote = distributed.world_size() == 1, is_remote
        self._num_ahead = num_passes if is_remote else int(self._is_alone)
        self._num_left = num_passes * num_steps  # Not taken yet.
        self._ready: collections.deque = collections.deque()
        self._error: Exception | None = None
        self.failure: Exception | None = None

    def await_step(self) -> bool:
        """Return whether a step can begin, on every rank. Collective.

        It cannot after a signal, or if a rank's data cannot be read, which is every rank's
        ``failure`` then.
        """
        self._fetch()
        outcome = 0
        if len(self._ready) < min(self._num_ahead, self._num_left):
            outcome = _STOPPED if self._error is None else _FAILED
        if self._is_remote and not self._is_alone:
            outcome = distributed.BackgroundSum(outcome).wait()
        if outcome >= _FAILED:
            error = self._error and transportable(self._error)
            errors = distributed.gather_objects(error)
            self.failure = self._error or next(filter(None, errors))
        return outcome == 0

    def of_pass(self) -> Any:
        """Return the batch of the next pass."""
        self._num_left -= 1
        if not self._ready:
            return next(self._loader)
        batch = self._ready.popleft()
        if self._is_remote:
            self._fetch()  # One of the next step: else the loader would stand still in this one.
        return batch

    def _fetch(self) -> None:
        """Fetch what is to be ahead, until a signal comes or an error, which is kept."""
        try:
            while not self._error and len(self._ready) < min(self._num_ahead, self._num_left):
                batch = self._stop_signal.wait_for(lambda: next(self._loader))
                if batch is None:
                    return
                self._ready.append(batch)
        except Exception as error:
            self._error = error
