"""Blocks of remote files in a bounded cache on disk, which the processes of a machine share."""

import contextlib
import fcntl
import functools
import hashlib
import math
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from dnnlib.errors import refusal
from dnnlib.files import cache_dir

BLOCK_BYTES = 1 << 18
LIMIT_VARIABLE = "SETDIFFIT_CACHE_GB"
_DEFAULT_LIMIT_GB = "100"
_MAX_OPEN = 256  # What has been deleted takes its room until it is closed.
_KEPT_SHARE = 0.9  # Of the limit, when the cache is full.
_BLOCKS_PER_FOLDER = 1024
_DATE_SEC = 1  # To which the dates of uses are right.
_LEFTOVER_SEC = 3600  # Age of a temporary file whose writer has died.
_COUNT = struct.Struct("<q")
_never_closed: list[IO[bytes]] = []


def cache_limit() -> int:
    """Return how many bytes all blocks may take: $SETDIFFIT_CACHE_GB, 100 GB by default."""
    text = os.environ.get(LIMIT_VARIABLE) or _DEFAULT_LIMIT_GB
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 < limit < 1e9:
        raise refusal(f"${LIMIT_VARIABLE}", text, accepted="a number of GB above 0")
    return int(limit * 1e9)


class OpenBlock:
    """A file of a block, open for reading by position; without what Python's own files cost."""

    def __init__(self, path: str) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def stat(self) -> os.stat_result:
        return os.fstat(self._descriptor)

    def touch(self) -> None:
        """Set the date to now."""
        os.utime(self._descriptor)

    def pread(self, size: int, offset: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def readinto(self, target: memoryview, offset: int) -> int:
        return os.preadv(self._descriptor, [target], offset)


class Blocks:
    """The blocks of one version of a remote file that lie on this disk.

    A block appears whole or not at all, and may go at any time, when it has not been used for the
    longest. It is not fsynced, which would take longer than its transfer: after a power failure its
    bytes may be others, which the checksums of the members of archives show.

    Args:
        identity: Of the content of the file.
        size: Bytes of the file.
    """

    def __init__(self, identity: str, size: int) -> None:
        key = hashlib.sha256(identity.encode()).hexdigest()[:32]
        self.root = cache_dir() / "blocks"
        self.size, self.key = size, key
        self._folder = str(self.root / key)
        self._seen: np.ndarray | None = None
        # Where this file's locks lie among those of all.
        self._first_lock = int(key[:9], 16) << 24

    def __len__(self) -> int:
        return -(-self.size // BLOCK_BYTES)

    def length(self, block: int) -> int:
        """Return the bytes of a block; the last one has fewer."""
        return min(BLOCK_BYTES, self.size - block * BLOCK_BYTES)

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self), _seen=None)

    def __contains__(self, block: int) -> bool:
        return os.path.exists(_path(self._folder, block))

    def missing(self, numbers: np.ndarray) -> list[int]:
        """Return those of rising numbers whose blocks are not here.

        One that was here before counts as here until :meth:`open` finds that any has gone.
        """
        seen = self._seen
        if seen is None:
            seen = self._seen = np.zeros(len(self), bool)
        unseen = numbers[~seen[numbers]].tolist()
        missing = [number for number in unseen if number not in self]
        seen[unseen] = True
        seen[missing] = False
        return missing

    def open(self, block: int) -> OpenBlock | None:
        """Return the file of a block, to be read by position; None if it is not there.

        What is open can be read even when its name has gone.
        """
        try:
            return _open(self._folder, block, self.length(block))
        except FileNotFoundError:
            seen = self._seen
            if seen is not None and seen[block]:
                self._seen = None
            return None

    def write(self, block: int, data: bytes | memoryview) -> None:
        """Keep the bytes of a block; raises ValueError, one sentence, if the disk is full."""
        path = _path(self._folder, block)
        try:
            try:
                _write(path, data)
            except OSError:
                make_room(self.root, len(data), is_full=True)
                _write(path, data)
        except OSError as error:
            but = f"blocks of remote data cannot be kept here ({error.strerror})"
            remedy = f"make room, lower ${LIMIT_VARIABLE}, or name another folder: $SETDIFFIT_CACHE"
            raise refusal(self.root, but=but, remedy=remedy) from None

    def count(self, num_bytes: int) -> None:
        """Add to the bytes of all files' blocks, and delete the oldest ones beyond the limit."""
        with contextlib.suppress(OSError):  # The count is found anew when it is not there.
            make_room(self.root, num_bytes)

    def forget(self, block: int) -> None:
        """Delete a block whose bytes are wrong."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_path(self._folder, block))
        close_blocks()

    def lock(self, block: int, num: int = 1) -> bool:
        """Claim blocks from ``block`` on for this process; return whether no other has any of them.

        A claim ends with :meth:`unlock` or with the process, however that ends. Threads of one
        process do not exclude each other. Where the file system has no locks, all get every block.
        """
        place = self._first_lock + block
        try:
            file = _lock_file(self.root, os.getpid())
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, num, place)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            return True
        return True

    def unlock(self, block: int, num: int = 1) -> None:
        """Let others have blocks that :meth:`lock` returned True for."""
        with contextlib.suppress(OSError):
            place = self._first_lock + block
            fcntl.lockf(_lock_file(self.root, os.getpid()), fcntl.LOCK_UN, num, place)


def close_blocks() -> None:
    """Close the files of all blocks, of which some may have been deleted."""
    _open.cache_clear()


def _path(folder: str, block: int) -> str:
    return f"{folder}/{block // _BLOCKS_PER_FOLDER}/{block}"


@functools.lru_cache(_MAX_OPEN)
def _open(folder: str, block: int, length: int) -> OpenBlock:
    path = _path(folder, block)
    file = OpenBlock(path)
    stat = file.stat()
    if stat.st_size != length:  # As a power failure can leave it.
        os.unlink(path)
        raise FileNotFoundError(path)
    if time.time() - stat.st_mtime > _DATE_SEC:
        with contextlib.suppress(OSError):  # That of another user can be read, too.
            file.touch()  # The dates tell which blocks have not been used for long.
    return file


def _write(path: str, data: bytes | memoryview) -> None:
    folder, _, name = path.rpartition("/")
    temporary = f"{folder}/.{name}.{os.getpid()}-{threading.get_ident()}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        descriptor = os.open(temporary, flags, 0o666)
    except FileNotFoundError:
        os.makedirs(folder, exist_ok=True)
        descriptor = os.open(temporary, flags, 0o666)
    try:
        with open(descriptor, "wb", buffering=0) as file:
            if file.write(data) != len(data):
                raise OSError(28, "No space left on device")
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@functools.lru_cache(4)
def _lock_file(root: Path, pid: int) -> IO[bytes]:
    """Return the file whose bytes stand for blocks."""
    root.mkdir(parents=True, exist_ok=True)
    file = open(root / ".locks", "ab")
    _never_closed.append(file)  # Two threads may open it; to close one would end all locks.
    return file


def make_room(root: Path, num_bytes: int, *, is_full: bool = False) -> None:
    """Count bytes that were written, and delete the oldest blocks beyond the limit of all.

    ``is_full``: the disk has no room for as many, so that at least a tenth has to go.
    """
    root.mkdir(parents=True, exist_ok=True)
    limit = cache_limit()
    with open(root / ".used", "a+b", buffering=0) as file, _locked(file):
        content = os.pread(file.fileno(), _COUNT.size, 0)
        is_known = len(content) == _COUNT.size
        total = num_bytes + (_COUNT.unpack(content)[0] if is_known else 0)
        if is_full or not is_known or total > limit:
            # The count is not that of the disk after a kill, or where people delete files.
            total = _evict(root, limit, is_full)
        file.truncate(0)
        file.write(_COUNT.pack(total))


@contextlib.contextmanager
def _locked(file: IO[bytes]) -> Iterator[None]:
    """Keep out other threads and processes; where the file system has no locks, nobody."""
    with contextlib.suppress(OSError):
        # Unlike lockf's, this kind of lock is one of an opening, not of a process.
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        # To close the file would not end the lock, if a process that was forked since has it, too.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)


def _evict(root: Path, limit: int, is_full: bool) -> int:
    """Delete the blocks that have not been used for the longest; return the bytes of the rest."""
    found = sorted(_scan(root))
    total = sum(size for _, size, _ in found)
    if is_full:
        limit = min(limit, total)
    wanted = total if total <= limit and not is_full else int(_KEPT_SHARE * limit)
    for _, size, path in found:
        if total <= wanted:
            break
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        total -= size
    return total


def _scan(root: Path) -> Iterator[tuple[int, int, str]]:
    """Yield date, size and path of each block, and delete what killed writers left."""
    now = time.time()
    folders = [str(root)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                    continue
                try:
                    stat = entry.stat()
                    if not entry.name.startswith("."):
                        yield stat.st_mtime_ns, stat.st_size, entry.path
                    elif entry.name.endswith(".tmp") and now - stat.st_mtime > _LEFTOVER_SEC:
                        os.unlink(entry.path)
                except FileNotFoundError:  # Others delete, too.
                    continue
