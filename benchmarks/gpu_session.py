"""Time budgets of the parts of benchmark.py gpu, and attempts that may fail or take too long."""

import contextlib
import dataclasses
import gc
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from benchmarks.measure import interleave, spent_by

Value = TypeVar("Value")

OUT_OF_MEMORY = "out of memory"
# An attempt is not worth starting with less time than this.
_LEAST_SEC = 5.0


class _TooSlow(BaseException):  # Not an Exception, so that no ``except Exception`` catches it.
    """The time of an attempt has run out."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`_TooSlow` in the block after ``seconds``.

    Has no effect outside the main thread, or where the system has no SIGALRM.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _TooSlow

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@dataclasses.dataclass
class Session:
    """The state of one part while it is measured: its device, time budget and omissions.

    ``tiny`` replaces all sizes with the smallest. ``found`` holds the results of parts that were
    measured before. ``left_out`` lists what was not measured, and why.
    """

    device: torch.device
    tiny: bool
    budget_sec: float
    found: dict[str, Any] = dataclasses.field(default_factory=dict)
    folder: str | None = None  # Parent of the temporary folder for states; None: the system's.
    left_out: list[str] = dataclasses.field(default_factory=list)
    start: float = dataclasses.field(default_factory=time.monotonic)

    def pick(self, whole: Value, tiny: Value) -> Value:
        return tiny if self.tiny else whole

    @property
    def left_sec(self) -> float:
        return self.budget_sec - (time.monotonic() - self.start)

    def peak(self, arithmetic: str) -> float | None:
        """Return the measured peak of matrix products in TFLOP/s; None if ``gemm`` has not run."""
        return self.found.get("gemm", {}).get("best", {}).get(arithmetic)

    def attempt(
        self, name: str, function: Callable[[], Value], limit_sec: float = float("inf")
    ) -> Value | None:
        """Return the function's result, or None with the reason appended to ``left_out``."""
        limit = min(limit_sec, self.left_sec)
        if limit < _LEAST_SEC:
            self.left_out.append(f"{name}: this part ran out of time")
            return None
        try:
            with time_limit(limit):
                return function()
        except _TooSlow:
            self.left_out.append(f"{name}: took longer than {limit:.0f} s")
        except Exception as error:
            # Kernels and compilers fail in many ways; the other measurements should still run.
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[0][:200]}"
            self.left_out.append(f"{name}: {OUT_OF_MEMORY if is_out_of_memory(error) else reason}")
        finally:
            free_memory()
        return None

    def seconds_per_call(self, function: Callable[[], Any]) -> float:
        """Return the median seconds per call, over five turns of about 0.2 s after a warm-up."""
        return self.seconds_of_each({"": function})[""]

    def seconds_of_each(self, functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Return the median seconds per call of each function; the functions take turns."""
        turns = {name: self._turn_of(function) for name, function in functions.items()}
        times = interleave(turns, self.pick(5, 1))
        return {name: statistics.median(seconds) for name, seconds in times.items()}

    def _turn_of(self, function: Callable[[], Any]) -> Callable[[], float]:
        function()
        once = spent_by(function, self.device).wall
        num = self.pick(max(1, min(100, round(0.2 / max(once, 1e-6)))), 1)

        def calls() -> None:
            for _ in range(num):
                function()

        return lambda: spent_by(calls, self.device).wall / num

    @property
    def compile_backend(self) -> str:
        """The backend of torch.compile; a dry run uses ``eager``, which generates no kernels."""
        return self.pick("inductor", "eager")


def is_out_of_memory(error: Exception) -> bool:
    """Return whether PyTorch or one of NVIDIA's libraries failed to allocate device memory."""
    texts = (OUT_OF_MEMORY, "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def free_memory() -> None:
    """Release the memory and compiled code of a finished or failed attempt."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
