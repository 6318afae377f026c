"""Waits until everything of a run is on disk, even after the processes that trained it ended.

    python -m training.saving.wait runs/00000-x

A job whose machine or container shuts down as soon as its command ends runs this at the end.
"""

import time
from collections.abc import Callable
from pathlib import Path

import click

from dnnlib.files import is_locked
from dnnlib.program import run
from dnnlib.saver import DEADLINE_SEC

_PATIENCE_SEC = 60.0


def wait_for_savers(run_dir: Path, report: Callable[[str], None]) -> None:
    """Wait until no saver of an earlier process, which may be gone, writes to a run folder.

    Raises ValueError if one of them outlives the time that savers have.
    """
    deadline, told = time.monotonic() + DEADLINE_SEC + _PATIENCE_SEC, False
    for path in sorted(run_dir.glob(".saver-*.lock")):
        while is_locked(path):
            if not told:
                report(
                    f"Waiting for the state that an earlier process is still writing to {run_dir}."
                )
                told = True
            if time.monotonic() > deadline:
                raise ValueError(f"{run_dir}: a process that is writing a state has not ended.")
            time.sleep(0.1)


@click.command(context_settings=dict(help_option_names=["-h", "--help"]))
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
def main(folders: tuple[Path, ...]) -> None:
    """Wait until the states and snapshots of the runs in FOLDERS are written.

    FOLDERS are run folders, or folders of run folders. A state is copied when it is due, and
    written while training continues. If a run is stopped or killed, what was already copied is
    still written afterwards. Use this command where the machine or container shuts down when the
    training command ends.

    \b
    Examples:
      python -m training.saving.wait runs/00000-x
      torchrun ... train.py --outdir=runs; python -m training.saving.wait runs
    """
    for folder in folders:
        if not folder.is_dir():
            click.echo(f"{folder} is not a folder: there is nothing to wait for.")
        for run_dir in (folder, *sorted(path for path in folder.glob("*") if path.is_dir())):
            wait_for_savers(run_dir, click.echo)


if __name__ == "__main__":
    run(main)
