"""A progress bar with rate and time left on a terminal, occasional lines elsewhere."""

import sys
import time

from dnnlib.text import format_count, format_time

_LINE_INTERVAL_SEC = 30.0
_DRAW_INTERVAL_SEC = 0.1


class progress:
    """Shows how far a long job is; use as a context manager and call :meth:`update`.

    On a terminal it redraws one line at most ten times a second. In a log file it prints a line
    every 30 seconds, so that short jobs stay silent. ``disable`` (for ranks other than 0) shows
    nothing. Output goes to standard error, which leaves standard output to results.
    """

    def __init__(
        self,
        *,
        total: int | None,
        label: str,
        unit: str = "img",
        disable: bool = False,
        transient: bool = False,
    ) -> None:
        """``transient`` erases the bar when it ends instead of leaving it on the screen."""
        self.total = total
        self.label = label
        self.unit = unit
        self.transient = transient
        self._file = sys.stderr
        self._terminal = self._file.isatty()
        self._disable = disable
        self._done = 0
        self._start = time.monotonic()
        self._last = self._start

    def __enter__(self) -> "progress":
        self._start = self._last = time.monotonic()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._terminal and not self._disable:
            if self.transient:
                self._file.write("\r\x1b[K")
            else:
                self._draw()
                self._file.write("\n")
            self._file.flush()

    def update(self, count: int = 1) -> None:
        """Record that ``count`` more units are done."""
        self._done += count
        if self._disable:
            return
        now = time.monotonic()
        if now - self._last >= (_DRAW_INTERVAL_SEC if self._terminal else _LINE_INTERVAL_SEC):
            self._last = now
            self._draw()

    def _draw(self) -> None:
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = self._done / elapsed
        text = f"{self.label}: {self._done}"
        if self.total:
            percent = 100 * self._done / self.total
            text += f"/{self.total} ({percent:.0f}%)"
        text += f", {format_count(float(f'{rate:.3g}'))} {self.unit}/s"
        if self.total and rate > 0:
            text += f", {format_time((self.total - self._done) / rate)} left"
        if self._terminal:
            self._file.write("\r\x1b[K" + text)
        else:
            self._file.write(text + "\n")
        self._file.flush()
