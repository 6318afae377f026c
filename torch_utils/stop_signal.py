"""Signals that ask a run to stop, and the agreement of all ranks on the step to stop at."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from dnnlib.streams import Stream
from torch_utils import distributed

T = TypeVar("T")
_AGAIN_SEC = 0.01  # Until a stop that Python discarded is raised again.


class StopRequested(BaseException):  # No Exception, so that handlers of errors let it pass.
    """A signal asked the run to stop at a point where it loses nothing by stopping at once."""


class StopSignal:
    """Turns a signal, or the loss of whoever reads the output, into a stop of all ranks.

    A training run stops at a step on which all ranks agree. Each step starts an asynchronous sum of
    the ranks' flags on the CPU group and reads the sum that the previous step started. Every rank
    sees the same sums, so all stop at the same step, and neither the device nor the step waits for
    communication.

    Within :meth:`at_once`, where everything of value is in a state on disk or still in memory, a
    signal raises :class:`StopRequested` between any two instructions, in each rank independently.
    If that has no effect, because Python discards what finalisers raise, it is raised again.

    After the first signal, further ones are ignored until the process ends, as launcher and
    scheduler often send one each. Only a second Ctrl-C ends the process at once.
    """

    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: int | None = None
        self.cut = False  # Whether StopRequested was raised, so that ranks may be out of step.
        self._at_once = self._is_pipe = self._is_lost = False
        self._pid = os.getpid()
        self._stop = False
        self._asked: distributed.BackgroundSum | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in self.signals:
            # nohup, and shells that run a command in the background, ignore these two on purpose.
            kept = number in (signal.SIGINT, signal.SIGHUP)
            if not (kept and signal.getsignal(number) == signal.SIG_IGN):
                self._previous[number] = signal.signal(number, self._receive)
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (Stream(stream, self._hang_up) for stream in self._streams)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._see_lost
        return self

    def __exit__(self, *exc: object) -> None:
        sys.stdout, sys.stderr = self._streams
        sys.unraisablehook = self._hook
        ending = self._stop or self.received is not None
        for number, handler in self._previous.items():
            at_end = signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN
            signal.signal(number, at_end if ending else handler)
        if self._asked is not None and exc[0] is None and not self.cut:
            self._asked.wait()

    def _hang_up(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._receive(signal.SIGPIPE, None)
        elif os.getpid() == self._pid:  # Only the main thread may raise it.
            self._is_pipe = True
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    def _see_lost(self, found: Any) -> None:
        if not isinstance(found.exc_value, StopRequested):
            self._hook(found)
            return
        self._is_lost = True
        # Not right here, where Python would discard it again.
        arguments = (threading.main_thread().ident, signal.SIGUSR1)
        threading.Timer(_AGAIN_SEC, signal.pthread_kill, arguments).start()

    def _receive(self, number: int, frame: object) -> None:
        if os.getpid() != self._pid:
            return
        if self.received is not None:
            if self._is_lost and self._at_once:
                self._is_lost = False
                self.check()
            return
        self.received = signal.SIGPIPE if self._is_pipe else number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.write(2, b"\nStopping; press Ctrl-C again to end at once.\n")
        if self._at_once:
            self.check()

    def check(self) -> None:
        """Raise StopRequested if this rank has received a signal."""
        if self.received is not None:
            self.cut = True
            raise StopRequested

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise StopRequested as soon as a signal arrives, until the end or :meth:`defer`."""
        self._at_once = True
        try:
            self.check()
            yield
        except RuntimeError:
            # Connections break when another rank leaves; then the launcher's signal follows.
            if self._at_once and distributed.world_size() > 1:
                time.sleep(2)
            raise
        finally:
            self._at_once = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within :meth:`at_once`, hold a stop back until the block has ended."""
        before, self._at_once = self._at_once, False
        try:
            yield
        finally:
            self._at_once = before
        if before:
            self.check()

    def defer(self) -> None:
        """From here on, leave signals to :meth:`agreed`, even within :meth:`at_once`."""
        self._at_once = False

    def wait_for(self, make: Callable[[], T]) -> T | None:
        """Return ``make()``, or None if a signal interrupts it."""
        try:
            with self.at_once():
                return make()
        except StopRequested:
            self.cut = False
            return None

    def name_received(self) -> str:
        """Return the name of the signal received, or a phrase for another rank's signal."""
        return signal.Signals(self.received).name if self.received else "a signal to another rank"

    def agreed(self) -> bool:
        """Return True, on all ranks at the same call, once any rank has a signal. Collective."""
        if distributed.world_size() == 1:
            return self.received is not None
        if self._asked is not None:
            self._stop = self._asked.wait() > 0
        self._asked = distributed.BackgroundSum(int(self.received is not None))
        return self._stop
