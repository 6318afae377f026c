"""How every script runs: errors of users become sentences, and signals end it cleanly."""

import atexit
import contextlib
import errno
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import click

from dnnlib import launcher


def run(command: click.Command) -> None:
    """Run a script's command and exit with its result as the exit code.

    A ValueError raised by this project is a user's error and becomes one sentence, printed once a
    node under torchrun; so does an error of a file or disk, or want of memory. Another error
    raised by a library keeps its traceback. SIGTERM and SIGHUP end a command that does not handle
    them with 128 + number.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # It was closed by whoever started this.
            setattr(sys, name, open(os.devnull, "w"))
    try:
        with _heeding_stops():
            _run(command)
    finally:
        atexit.register(_let_ctrl_c_end_at_once)


def _let_ctrl_c_end_at_once() -> None:
    """Have Ctrl-C at the very end print no traceback of what is cleaned up, as all is done."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with contextlib.suppress(OSError, ValueError):  # Its reader has left, or it was closed.
            sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run(command: click.Command) -> None:
    quiet = os.environ.get("LOCAL_RANK", "0") not in ("0", "")
    try:
        sys.exit(command.main(standalone_mode=False) or 0)
    except (click.ClickException, ValueError, FloatingPointError) as error:
        if not (isinstance(error, click.ClickException) or _is_ours(error)):
            raise
        if quiet:
            # An error of all ranks is told by the first, and the launcher then ends the others
            # within this time. What is still here has an error of its own.
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            time.sleep(2)
            click.echo(f"On local rank {os.environ['LOCAL_RANK']}:", err=True)
        if not isinstance(error, click.ClickException):
            error = click.ClickException(str(error))
        error.show()
        launcher.record_error(error.format_message())
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno == errno.EPIPE and error.filename is None:  # As of `| head`.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        # Of files and disks; others, such as those of connections, keep their traceback.
        is_known = error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not is_known and not (error.errno is None and _is_ours(error)):
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        message = f"{where}{error.strerror or error}."
        click.echo(f"Error: {message}", err=True)
        launcher.record_error(message)
        sys.exit(1)
    except _Stopped as stop:
        click.echo(f"Stopped by {stop}.", err=True)
        sys.exit(128 + stop.number)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        message = _want_of_memory(error)
        if message is None:
            raise
        click.echo(f"Error: {message}", err=True)
        launcher.record_error(message)
        sys.exit(1)


def _want_of_memory(error: Exception) -> str | None:
    """Return a sentence if Python, the system or a GPU refused memory, or a loader was killed."""
    text = str(error)
    if text.startswith("DataLoader worker (pid"):  # PyTorch's words, by whichever way it noticed.
        why = "A process that loads data was killed, perhaps because memory ran out"
        return f"{why}; use fewer --workers, and --resume to continue a run."
    texts = ("out of memory", "can't allocate memory")
    if not (isinstance(error, MemoryError) or any(known in text for known in texts)):
        return None
    found = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
    wanted = f" for {found[1]}" if found else ""
    return f"Not enough memory{wanted}; use a smaller batch or model."


class _Stopped(BaseException):  # Nobody who catches errors means this.
    """A signal asked for the end of a command that has no handler of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def _heeding_stops() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end a command as Ctrl-C does: half-written files are removed."""
    pid, previous = os.getpid(), {}

    def stop(number: int, frame: object) -> None:
        if os.getpid() != pid:  # A worker's.
            os._exit(128 + number)
        signal.signal(number, signal.SIG_IGN)
        raise _Stopped(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                previous[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is stop:  # After a stop, further ones are ignored.
                signal.signal(number, handler)


def _is_ours(error: Exception) -> bool:
    """Return whether the project or its user's own family raised an error, and no library.

    It may have been raised here or in a data loader process.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    source = sys.modules.get(type(error).__module__)
    files = {frame.filename, getattr(source, "__file__", None)} - {None}
    # Names such as <string> are of no file, whatever the current folder.
    found = [Path(file).resolve() for file in files if Path(file).is_file()]
    standard = Path(contextlib.__file__).resolve().parent
    ours = [path for path in found if not path.is_relative_to(standard)]
    return any("site-packages" not in path.parts for path in ours)
