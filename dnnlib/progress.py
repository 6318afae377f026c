"""Progress bars of long jobs."""

import sys

from tqdm import tqdm

_LINE_INTERVAL_SEC = 30.0


class _Bar(tqdm):
    monitor_interval = 0  # No monitor thread: data loaders fork the process.


class _Log:
    """Writes each state of a bar as a line of a log file."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(
    *,
    total: int | None,
    label: str,
    unit: str = "img",
    disable: bool = False,
    transient: bool = False,
    initial: int = 0,
) -> tqdm:
    """Return a started bar with ``update(count)`` and ``close()``; also a context manager.

    On a terminal it is one line, redrawn at most ten times a second, which ``transient`` erases at
    the end. In a log file it is a line every 30 seconds, so that short jobs stay silent. Output
    goes to standard error, which leaves standard output to results. ``disable`` (for ranks other
    than 0) shows nothing; ``initial`` is the number of units already done.
    """
    settings = dict(total=total, desc=label, disable=disable, initial=initial, leave=not transient)
    if not sys.stderr.isatty():
        settings |= dict(file=_Log(), mininterval=_LINE_INTERVAL_SEC, delay=_LINE_INTERVAL_SEC)
    unit_settings = dict(unit="B", unit_scale=True) if unit == "B" else dict(unit=f" {unit}")
    return _Bar(miniters=1, dynamic_ncols=True, **unit_settings, **settings)
