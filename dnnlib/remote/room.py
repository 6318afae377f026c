"""The size limit of the block cache, and the eviction of blocks beyond it."""

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
_KEPT_SHARE = 0.9  # Of the limit: what eviction leaves.
_LEFTOVER_SEC = 3600  # A temporary file of this age has lost its writer.
_COUNT = struct.Struct("<q")
# A process adds what it has written to the shared total once it reaches the lesser of these.
_COUNTED_BYTES = 64_000_000
_COUNTED_SHARE = 0.03  # Of the limit.
_uncounted: dict[Path, int] = {}


def cache_limit() -> int:
    """Return how many bytes all blocks may take: $SETDIFFIT_CACHE_GB, 100 GB by default.

    Raises ValueError if the variable is not a number of GB above 0.
    """
    text = os.environ.get(LIMIT_VARIABLE) or _DEFAULT_LIMIT_GB
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 < limit < 1e9:
        raise refusal(f"${LIMIT_VARIABLE}", text, accepted="a number of GB above 0")
    return int(limit * 1e9)


def count(root: Path, num_bytes: int) -> bool:
    """Count bytes that were written, and delete the oldest files if the cache exceeds its limit.

    Returns whether files were deleted. A process counts in batches; bytes that it has not counted
    when it ends are found by the next process, whose first call measures the cache on disk.
    """
    is_first = root not in _uncounted
    num_bytes += _uncounted.get(root, 0)
    # Concurrent threads may lose some bytes, but a fork could inherit a lock in the locked state.
    _uncounted[root] = num_bytes
    if not is_first and num_bytes < min(_COUNTED_BYTES, _COUNTED_SHARE * cache_limit()):
        return False
    _uncounted[root] = 0
    return make_room(root, num_bytes, is_known=not is_first)


def make_room(root: Path, num_bytes: int, *, is_known: bool = True, is_full: bool = False) -> bool:
    """Add bytes to the shared total, and delete the oldest files if it exceeds the limit.

    Args:
        is_known: Whether the recorded total, if there is one, can be trusted; otherwise the cache
            is measured on disk.
        is_full: Whether the disk is full, so that at least a tenth of the cache has to go.

    Returns whether files were deleted.
    """
    root.mkdir(parents=True, exist_ok=True)
    limit = cache_limit()
    with open(root / ".used", "a+b", buffering=0) as file, _locked(file):
        content = os.pread(file.fileno(), _COUNT.size, 0)
        is_known = is_known and len(content) == _COUNT.size
        are_deleted = False
        total = num_bytes + (_COUNT.unpack(content)[0] if is_known else 0)
        if is_full or not is_known or total > limit:
            # The recorded total is wrong after a kill, or if someone deleted files.
            total, are_deleted = evict(root, limit, is_full)
        file.truncate(0)
        file.write(_COUNT.pack(total))
    return are_deleted


@contextlib.contextmanager
def _locked(file: IO[bytes]) -> Iterator[None]:
    """Keep out other threads and processes, if the file system has locks."""
    with contextlib.suppress(OSError):
        # Unlike those of lockf, these locks belong to an open file, not to the process.
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        # Closing the file would not release the lock if a process forked since has it open, too.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)


def evict(root: Path, limit: int, is_full: bool = False) -> tuple[int, bool]:
    """Delete the least recently used files, down to 90 % of ``limit`` bytes, if they exceed it.

    With ``is_full``, down to 90 % of what they take if that is less. Returns the bytes that the
    remaining files take, and whether any were deleted.
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
    """Yield the access time, bytes on disk and path of each file; delete old temporary files."""
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
                except FileNotFoundError:  # Another process deleted it.
                    continue
