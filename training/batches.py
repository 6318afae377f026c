"""The batches that a rank trains on, with those of remote data fetched before their step begins."""

import collections
from collections.abc import Iterable
from typing import Any

from dnnlib.errors import transportable
from torch_utils import distributed
from torch_utils.stop_signal import StopSignal

_STOPPED, _FAILED = 1, 1 << 16  # Summed over ranks; there are fewer than 1 << 16 of them.


class Batches:
    """The batches of a rank, pass by pass.

    A server may not answer for minutes, or not at all. With remote data, a rank therefore fetches
    the batches of all passes before a step begins, and the ranks agree before each step that all
    have them: if one does not, the steps so far are whole. With local data, a single rank fetches
    the first batch ahead, and several ranks, which would have to agree, fetch none.

    Args:
        loader: Yields the batch of one pass after another, without end.
        num_passes: Passes per step.
        num_steps: Steps that remain.
        is_remote: Whether the data are at an address.
        stop_signal: Ends the wait for a batch if a signal comes.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        num_passes: int,
        num_steps: int,
        is_remote: bool,
        stop_signal: StopSignal,
    ) -> None:
        with stop_signal.deferred():  # A half-made iterator cannot be cleaned up.
            self._loader = iter(loader)
        self._stop_signal = stop_signal
        self._is_alone, self._is_remote = distributed.world_size() == 1, is_remote
        self._num_ahead = num_passes if is_remote else int(self._is_alone)
        self._num_left = num_passes * num_steps  # Batches not taken yet.
        self._ready: collections.deque = collections.deque()
        self._error: Exception | None = None
        self.failure: Exception | None = None

    def await_step(self) -> bool:
        """Return whether a step can begin, the same on every rank. Collective.

        It cannot after a signal, or if a rank cannot read its data: then ``failure`` is the error,
        on every rank.
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
            self._fetch()  # One of the next step's, or the loader would be idle during this one.
        return batch

    def _fetch(self) -> None:
        """Fetch the batches that are due ahead, until a signal or an error, which is kept."""
        try:
            while not self._error and len(self._ready) < min(self._num_ahead, self._num_left):
                batch = self._stop_signal.wait_for(lambda: next(self._loader))
                if batch is None:
                    return
                self._ready.append(batch)
        except Exception as error:
            self._error = error
