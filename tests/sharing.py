"""What several test modules start from, made once in a test session by whichever comes first."""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

SHARED_VARIABLE = "SETDIFFIT_TEST_SHARED"


@contextlib.contextmanager
def made_once(path):
    """Yield whether ``path`` must still be made; test processes wait here for one another."""
    done = path.with_name(f"{path.name}.done")
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not done.exists()
        done.touch()


def place_copy(base, name, make):
    """Put into ``base`` what ``make(folder)`` makes in a folder, which happens once a session.

    Files that name others by absolute paths go on naming those of that folder, which stays.
    """
    shared = os.environ.get(SHARED_VARIABLE)
    if shared is None:
        make(base)
        return
    folder = Path(shared) / name
    with made_once(folder) as missing:
        if missing:
            folder.mkdir()
            make(folder)
    shutil.copytree(folder, base, dirs_exist_ok=True)
