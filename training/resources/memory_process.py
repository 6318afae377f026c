"""Predicts the memory of a run in a separate process, so that the run itself is not affected.

A prediction in the run would stop it for seconds, and load a hundred megabytes of modules that
training does without.
"""

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


class MemoryProcess:
    """A process that runs ``families/foresee.py`` on a run folder, and ends with this one."""

    def __init__(self, run_dir: Path) -> None:
        command = [sys.executable, "-m", "families.foresee", str(run_dir.resolve())]
        # It has one thread, no device, no signals of this process, and ends when its input does.
        variables = dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._process = subprocess.Popen(
            command, cwd=_ROOT, env={**os.environ, **variables}, start_new_session=True, **pipes
        )

    def poll(self) -> int | None:
        """Return the bytes that a rank will hold, once; None while, or if, they are not known."""
        if self._process.poll() is None or self._process.stdout.closed:
            return None
        text = self._process.stdout.read()
        self.close()
        return int(text) if text.strip().isdigit() else None

    def close(self) -> None:
        """End the process, if it has not ended."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
