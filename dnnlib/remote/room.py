"""The size limit of the block cache, and what is deleted beyond it."""

import contextlib
import fcntl
import math
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dnnlib.errors import refusal

LIMIT_VARIABLE = "SETDIFFIT_CACHE_GB"
_DEFAULT_LIMIT_GB = "100"
_KEPT_SHARE = 0.9  # Of the limit, when the cache is full.
_LEFTOVER_SEC = 3600  # Age of a temporary file whose writer has died.
_COUNT = struct.Struct("<q")
_COUNTED_BYTES = 64_000_000  # A process counts what it wrote when it is as many, or
_COUNTED_SHARE = 0.03  # as many of the limit.
_uncounted: dict[Path, int] = {}


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


def count(root: Path, num_bytes: int) -> bool:
    """Count bytes that were written, and delete the oldest files beyond the limit of all.

    Returns whether files were deleted. What a process has not counted when it ends is found when
    the next one begins, which looks at the disk.
    """
    is_first = root not in _uncounted
    num_bytes += _uncounted.get(root, 0)
    # Threads that come between may lose some: a lock would stay locked in a fork.
    _uncounted[root] = num_bytes
    if not is_first and num_bytes < min(_COUNTED_BYTES, _COUNTED_SHARE * cache_limit()):
        return False
    _uncounted[root] = 0
    return make_room(root, num_bytes, is_known=not is_first)


def make_room(root: Path, num_bytes: int, *, is_known: bool = True, is_full: bool = False) -> bool:
    """Count bytes at once, and delete the oldest files beyond the limit of all.

    ``is_known``: the count of before holds, where there is one. ``is_full``: the disk has no room
    for as many, so that at least a tenth has to go. Returns whether files were deleted.
    """
    root.mkdir(parents=True, exist_ok=True)
    limit = cache_limit()
    with open(root / ".used", "a+b", buffering=0) as file, _locked(file):
        content = os.pread(file.fileno(), _COUNT.size, 0)
        is_known = is_known and len(content) == _COUNT.size
        are_deleted = False
        total = num_bytes + (_COUNT.unpack(content)[0] if is_known else 0)
        if is_full or not is_known or total > limit:
            # The count is not that of the disk after a kill, or where people delete files.
            total, are_deleted = evict(root, limit, is_full)
        file.truncate(0)
        file.write(_COUNT.pack(total))
    return are_deleted


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


def evict(root: Path, limit: int, is_full: bool = False) -> tuple[int, bool]:
    """Delete the files that have not been used for the longest.

    Returns the bytes of the rest, and whether any were deleted.
    """
    found = sorted(_scan(root))
    total = before = sum(size for _, size, _ in found)
    if is_full:
        limit = min(limit, total)
    wanted = total if total <= limit and not is_full else int(_KEPT_SHARE * limit)
    for _, size, path in found:
        if total <= wanted:
            break
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        total -= size
    return total, total < before


def _scan(root: Path) -> Iterator[tuple[int, int, str]]:
    """Yield date of use, bytes and path of each file, and delete what killed writers left."""
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
                        yield stat.st_atime_ns, 512 * stat.st_blocks, entry.path
                    elif entry.name.endswith(".tmp") and now - stat.st_mtime > _LEFTOVER_SEC:
                        os.unlink(entry.path)
                except FileNotFoundError:  # Others delete, too.
                    continue
