"""Writing the report of a run, or of several, atomically."""

import datetime
import time
from collections.abc import Sequence
from pathlib import Path

from dnnlib.files import atomic_write
from training.run_report.compare import with_short_names
from training.run_report.files import STATS_FILE, Run, read_run
from training.run_report.history import History
from training.run_report.page import Draft
from training.run_report.pictures import Album

REPORT_FILE = "report.html"
MAX_BYTES = 20_000_000
_MARGIN = 50_000  # Bytes left for the markup around pictures.
_MAX_NEW = 2  # Pictures encoded per report during training, which waits for them.


class RunReport:
    """The report of a run that is being trained, rewritten with every snapshot.

    Curves that were read and pictures that were encoded are kept for the next report.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._history = History(run_dir / STATS_FILE)
        self._album = Album(run_dir / REPORT_FILE)

    def write(self, max_new: int | None = _MAX_NEW) -> Path:
        """Write ``report.html`` into the run folder; return its path.

        At most ``max_new`` pictures are encoded; the others follow in later reports.
        """
        start_sec = time.perf_counter()
        run = read_run(self._run_dir, self._history)
        path = self._run_dir / REPORT_FILE
        _write(path, [run], [self._album], start_sec, max_new)
        return path


def write_report(run_dirs: Sequence[Path], path: Path) -> None:
    """Write the report of one run, or the comparison of several, to ``path``."""
    start_sec = time.perf_counter()
    runs = [read_run(run_dir) for run_dir in run_dirs]
    runs = with_short_names(runs) if len(runs) > 1 else runs
    albums = [Album(run_dir / REPORT_FILE) for run_dir in run_dirs]
    _write(path, runs, albums, start_sec, None)


def _write(
    path: Path,
    runs: Sequence[Run],
    albums: Sequence[Album],
    start_sec: float,
    max_new: int | None,
) -> None:
    draft = Draft(runs)
    left = max(MAX_BYTES - draft.num_bytes - _MARGIN, 0) // len(runs)
    pictures = [
        album.fit(run.pictures, left, max_new) for run, album in zip(runs, albums, strict=True)
    ]
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    took = time.perf_counter() - start_sec
    footer = f"Written {now} by SetDiffiT in {took:.2f} seconds, from the files of the run."
    with atomic_write(path) as file:
        file.write(draft.finish(pictures, footer))
