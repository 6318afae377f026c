"""Runs every script: user errors become one sentence, and signals end the script cleanly."""

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

# The query of an http(s) address, which may be a signature that does not belong into logs.
_QUERY = re.compile(r"""(https?://[^\s?]+)\?\S*?(?=[:;,.)'"]*(?:\s|$))""")


def run(command: click.Command) -> None:
    """Run a script's command and exit with its result as the exit code.

    A ValueError raised by this project is a user error and is printed as one sentence, once per
    node under torchrun. So are errors of files and disks, and running out of memory. Other errors
    raised by libraries keep their traceback. SIGTERM and SIGHUP end a command that does not handle
    them, with exit code 128 + number.
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
    """Keep Ctrl-C during interpreter shutdown, when all work is done, from printing a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with contextlib.suppress(OSError, ValueError):  # The reader has gone, or it was closed.
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
            # The first rank reports an error that all ranks share, and the launcher then ends the
            # others within this time. A rank that is still running has an error of its own.
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            time.sleep(2)
            click.echo(f"On local rank {os.environ['LOCAL_RANK']}:", err=True)
        if not isinstance(error, click.ClickException):
            error = click.ClickException(str(error))
        error.message = _QUERY.sub(r"\1", error.message)
        error.show()
        launcher.record_error(error.format_message())
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno == errno.EPIPE and error.filename is None:  # As with `| head`.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        # Errors of files and disks; others, such as those of connections, keep their traceback.
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
    """Return a message if memory ran out on the host or the GPU or a data loader was killed."""
    text = str(error)
    if text.startswith("DataLoader worker (pid"):  # All of PyTorch's messages for it start so.
        why = "A process that loads data was killed, perhaps because memory ran out"
        return f"{why}; use fewer --workers, and --resume to continue a run."
    texts = ("out of memory", "can't allocate memory")
    if not (isinstance(error, MemoryError) or any(known in text for known in texts)):
        return None
    found = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
    wanted = f" for {found[1]}" if found else ""
    return f"Not enough memory{wanted}; use a smaller batch or model."


class _Stopped(BaseException):  # No Exception, so that handlers of errors let it pass.
    """A signal asked a command that does not handle it to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def _heeding_stops() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end a command as Ctrl-C does, so that partial files are removed."""
    pid, previous = os.getpid(), {}

    def stop(number: int, frame: object) -> None:
        if os.getpid() != pid:  # A forked worker inherited the handler.
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
    """Return whether this project or a user's own family, not a library, raised an error.

    The error may come from this process or a data loader's.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    source = sys.modules.get(type(error).__module__)
    files = {frame.filename, getattr(source, "__file__", None)} - {None}
    # Names such as <string> belong to no file.
    found = [Path(file).resolve() for file in files if Path(file).is_file()]
    standard = Path(contextlib.__file__).resolve().parent
    ours = [path for path in found if not path.is_relative_to(standard)]
    return any("site-packages" not in path.parts for path in ours)
