"""Reads the environment variables of a launcher, and checks whether the launcher still lives.

Importing this module makes a process that torchrun started end with torchrun. Scripts import it
before everything that takes time, so that a kill during their start-up leaves nobody behind.
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
# Number of processes that started together, where no launcher connects them.
_SCHEDULERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
_LARGEST = {"MASTER_PORT": 65_535}
_START = "torchrun --standalone --nproc_per_node=NUM_GPUS ..."
_PR_SET_PDEATHSIG = 1


def number(name: str, default: int = 0) -> int:
    """Return a variable that a launcher sets, such as RANK; raises ValueError if it is none."""
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
    """Return whether this process is one of several that are to find each other.

    Raises ValueError if the variables say so only in part, or if a scheduler started several
    processes that know nothing of each other.
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
    """Have the kernel send this process a signal when torchrun ends. Ends it if that is gone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    # It may have gone before. The process that then inherits this one is no Python.
    with contextlib.suppress(OSError):
        if "python" not in Path(f"/proc/{os.getppid()}/exe").resolve(strict=True).name:
            os._exit(1)


def record_error(message: str) -> None:
    """Give torchrun the sentence that it prints last, in place of what it makes up itself."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(dict(message=message, timestamp=int(time.time()))))


die_with_launcher(signal.SIGTERM)
