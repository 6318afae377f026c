"""Atomic writes, checks of input and output paths, folder locks and the cache folder."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from dnnlib.errors import refusal

CACHE_VARIABLE = "SETDIFFIT_CACHE"
_MAX_LINKS = 40  # Symbolic links that Linux follows in one path.


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", **kwargs: Any) -> Iterator[IO]:
    """Open a file that appears under ``path`` whole or not at all.

    The data goes to a temporary file in the same folder, which is fsynced and renamed if the block
    ends without an exception; otherwise it is removed, and ``path`` stays untouched. ``kwargs`` are
    those of :func:`open`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=".tmp", dir=path.parent
    )
    try:
        with os.fdopen(descriptor, mode, **kwargs) as file:
            yield file
            file.flush()
            _fsync(file.fileno())
        # mkstemp creates the file for its owner alone; give it the usual permissions instead.
        umask = os.umask(0)
        os.umask(umask)
        with contextlib.suppress(OSError):  # Some foreign file systems have no permissions.
            os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        found = _of_disk(error)
        if found is not None and found.filename is None:
            found.filename = str(path)  # A full disk comes without one.
        if found is not None and found is not error:
            raise found from None
        raise
    fsync_folder(path.parent)


def _of_disk(error: BaseException) -> OSError | None:
    """Return the OSError that ``error`` is or hides, or None.

    torch.save hides it behind the RuntimeError of closing its incomplete archive.
    """
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        return error.__context__
    return error if isinstance(error, OSError) else None


def fsync_folder(path: Path) -> None:
    """Make the names in a folder survive a power failure, if the system can ensure that."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _fsync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Shared folders of virtual machines and CIFS refuse fsync; other errors mean lost data.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS):
            raise


def check_target(
    option: str,
    path: str | os.PathLike,
    *,
    is_folder: bool = False,
    is_ours: Callable[[Path], Any] | None = None,
    overwrite: bool = False,
    inputs: Mapping[str, str | os.PathLike] = MappingProxyType({}),
) -> None:
    """Raise ValueError if the file or folder ``path`` cannot, or should not, be written.

    Args:
        option: The option that named ``path``, for error messages.
        is_ours: Recognises an existing file as a result of the same kind, which may be replaced:
            it returns a true value and raises no ValueError. None allows replacing any file.
        overwrite: True to replace a file whatever ``is_ours`` says.
        inputs: Paths named by other options, by option name; these are never replaced.
    """
    path = Path(path)
    if not is_folder and path.is_dir():
        raise ValueError(f"{option}: {path} is a folder; give the name of a file.")
    is_usual = (path.is_file() or path.is_dir()) and not _is_stream(path)
    if os.path.lexists(path) and not is_usual:
        # The rename that ends a write would replace it by a file.
        problem = "is a pipe, socket, device, or a link that leads nowhere"
        raise ValueError(f"{option}: {path} {problem}; choose another name.")
    for other, source in inputs.items():
        if not is_folder and path.exists() and os.path.exists(source) and path.samefile(source):
            raise ValueError(
                f"{option}: {path} is also the file of --{other}; choose another name."
            )
    if not is_folder and path.exists() and is_ours is not None and not overwrite:
        try:
            recognised = is_ours(path)
        except ValueError:
            recognised = False
        if not recognised:
            raise ValueError(
                f"{option}: {path} exists and was not made by this command; choose another name, "
                "or replace it with --overwrite."
            )
    for folder in [path, *path.parents] if is_folder else path.absolute().parents:
        if folder.exists():
            if not folder.is_dir():
                raise ValueError(f"{option}: {path} cannot be written, because {folder} is a file.")
            if not os.access(folder, os.W_OK):
                raise ValueError(f"{option}: {path} cannot be written: no permission in {folder}.")
            return


def _is_stream(path: Path) -> bool:
    """Return whether a path leads to a descriptor of a process, as /dev/stdout does.

    Even if a file is open there, renaming to the path would replace the link, not that file.
    """
    for _ in range(_MAX_LINKS):
        if path.absolute().parts[1:2] == ("proc",):
            return True
        if not path.is_symlink():
            return False
        path = path.parent / os.readlink(path)
    return False


def check_source(path: str | os.PathLike, *, where: str = "", folder: bool = True) -> None:
    """Raise ValueError unless ``path`` is a regular file or, if ``folder`` is True, a folder.

    Pipes, sockets and devices are refused because reading them may never end. ``where`` is the
    option that named the path, for the message.
    """
    path, label = Path(path), f"{where}: {path}" if where else str(path)
    if path.is_file() or (folder and path.is_dir()):
        return
    problem = "no such file or folder" if folder else "no such file"
    if path.is_dir():
        problem = "is a folder; give a file"
    elif path.exists():
        problem = "is a pipe, socket or device; copy what it holds to a file"
    elif path.is_symlink():
        problem = "is a link that leads nowhere"
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):  # Path removes the second slash.
        problem = "is an address; download the file, and give its path"
    raise ValueError(f"{label}: {problem}.")


def regular_file(path: str, flags: int) -> int:
    """Return a descriptor of a regular file; an ``opener`` for :func:`open`.

    Raises OSError for a pipe, a socket or a device.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # Opening a pipe must not wait for a writer.
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "is not a regular file", path)


def read_file(path: str | os.PathLike) -> bytes:
    """Return the content of a file; raises OSError for a pipe, a socket or a device, too."""
    with open(path, "rb", opener=regular_file) as file:
        return file.read()


def file_sizes(path: Path) -> dict[str, int]:
    """Return the sizes in bytes of the files in a folder, or of one file, by their names.

    Files that cannot be found, such as those that another process renames meanwhile, are left
    out.
    """
    found, files = {}, [path]
    with contextlib.suppress(OSError):
        files = list(path.iterdir()) if path.is_dir() else files
    for file in files:
        with contextlib.suppress(OSError):
            found[file.name] = file.stat().st_size
    return found


def lock_folder(folder: Path, problem: str) -> contextlib.AbstractContextManager:
    """Return a context manager that holds a folder's lock, already taken, until it exits.

    The system releases the lock when this process ends, however it ends. On file systems without
    locks, nothing is locked. Raises ValueError, a sentence that begins with ``problem``, if another
    process holds the lock.
    """
    file = open(folder / ".lock", "w")
    try:
        # Unlike those of flock, these locks are not inherited by forked data loaders.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(f"{problem}; wait until it ends, or stop it.") from None
    except OSError:  # Some network file systems have no locks.
        file.close()
        return contextlib.nullcontext()
    return file


def is_locked(path: Path) -> bool:
    """Return whether another process holds a lock on a file.

    A lock that this process itself holds on the file does not count, and is lost.
    """
    try:
        with open(path, "r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # The file has gone, or its file system has no locks.
        return False
    return False


def cache_dir() -> Path:
    """Return the folder for downloads and derived data, which need not exist yet.

    That is $SETDIFFIT_CACHE, or else ``setdiffit`` in $XDG_CACHE_HOME, by default ~/.cache. Raises
    ValueError if there is no home folder.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        but = "there is no home folder to keep downloads in"
        raise refusal("HOME", but=but, remedy=f"set ${CACHE_VARIABLE} to a folder") from None
    return Path(base, "setdiffit")


def sha256_of_file(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with open(path, "rb", opener=regular_file) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write plain values as indented JSON, atomically."""
    with atomic_write(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
