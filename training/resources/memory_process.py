"""Prediction of a run's memory in a separate process, so that the run itself is not affected.

Within the run, a prediction would take seconds and load a hundred megabytes of modules that
training does not need.
"""

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


class MemoryProcess:
    """A process that runs ``families/foresee.py`` on a run folder, and ends when this one does."""

    def __init__(self, run_dir: Path) -> None:
        command = [sys.executable, "-m", "families.foresee", str(run_dir.resolve())]
        # One thread and no GPU, so that training is not slowed; a session of its own, so that it
        # gets no signals of the terminal. It ends when its standard input closes.
        variables = dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._process = subprocess.Popen(
            command, cwd=_ROOT, env={**os.environ, **variables}, start_new_session=True, **pipes
        )

    def poll(self) -> int | None:
        """Return the predicted bytes per rank, once, when they are known; else None.

        They never are if the process fails.
        """
        if self._process.poll() is None or self._process.stdout.closed:
            return None
        text = self._process.stdout.read()
        self.close()
        return int(text) if text.strip().isdigit() else None

    def close(self) -> None:
        """Kill the process if it still runs, and close its pipes."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
