"""Reads the environment variables that a launcher sets, and ends this process with the launcher.

Importing this module makes a process that torchrun started end when torchrun does. Scripts import
it before everything that takes time, so that killing torchrun while they start leaves no orphans.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

from dnnlib.errors import refusal

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Variables with the number of processes that a scheduler started together, and the command for it.
_SCHEDULERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
_LARGEST = {"MASTER_PORT": 65_535}
_START = "torchrun --standalone --nproc_per_node=NUM_GPUS ..."
_PR_SET_PDEATHSIG = 1


def number(name: str, default: int = 0) -> int:
    """Return the number in an environment variable such as RANK, or ``default`` if it is not set.

    Raises ValueError if the variable holds anything but a number in its range.
    """
    text = os.environ.get(name)
    if text is None:
        return default
    lowest, highest = int(name in ("WORLD_SIZE", *_SCHEDULERS)), _LARGEST.get(name, 10**6)
    if not (text.isascii() and text.isdigit() and lowest <= int(text[:9]) <= highest):
        remedy = f"unset {name} for a single process, or start with {_START}"
        accepted = f"a number from {lowest} to {highest}"
        raise refusal(f"environment variable {name}", repr(text), accepted=accepted, remedy=remedy)
    return int(text)


def joins_others() -> bool:
    """Return whether a launcher started this process as a rank of a process group.

    Raises ValueError if only some of the variables for that are set, or if a scheduler started
    several processes that would not know of each other.
    """
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if not missing:
        rank, size = number("RANK"), number("WORLD_SIZE")
        if rank >= size:
            raise refusal("RANK", rank, accepted=f"0 to {size - 1}, as WORLD_SIZE is {size}")
        number("MASTER_PORT"), number("LOCAL_RANK")
        return True
    if number("WORLD_SIZE", 1) > 1:
        but = f"is set in the environment, but {', '.join(missing)} is not"
        remedy = f"start with {_START}, or unset WORLD_SIZE for a single process"
        raise refusal(f"WORLD_SIZE={number('WORLD_SIZE')}", but=but, remedy=remedy)
    if number("RANK") > 0:
        remedy = f"start with {_START}, or unset RANK for a single process"
        but = f"is set in the environment, but {', '.join(missing)} is not"
        raise refusal(f"RANK={number('RANK')}", but=but, remedy=remedy)
    for name, starter in _SCHEDULERS.items():
        if "WORLD_SIZE" not in os.environ and number(name, 1) > 1:
            but = f"{starter} started {number(name)} processes, which would each do the whole work"
            remedy = "start one torchrun on each node (see the README), or set WORLD_SIZE=1 if "
            raise refusal(name, but=but, remedy=f"{remedy}separate runs are meant")
    return False


def die_with_launcher(number: signal.Signals) -> None:
    """Ask the kernel to signal this process when torchrun ends; exit at once if it has ended.

    Does nothing in a process that torchrun did not start, or on systems other than Linux.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    # If torchrun ended before the call, the parent is now a process that does not run Python.
    with contextlib.suppress(OSError):
        if "python" not in Path(f"/proc/{os.getppid()}/exe").resolve(strict=True).name:
            os._exit(1)


def record_error(message: str) -> None:
    """Pass torchrun a message that its final report shows as the cause of the failure."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(dict(message=message, timestamp=int(time.time()))))


die_with_launcher(signal.SIGTERM)
