"""Blocks of remote files in a bounded cache on disk, shared by the processes of a machine."""

import contextlib
import fcntl
import functools
import hashlib
import os
import time
from pathlib import Path
from typing import IO, Any

import numpy as np

from dnnlib.errors import refusal
from dnnlib.files import cache_dir
from dnnlib.remote import room

BLOCK_BYTES = 1 << 18
# Creating a file takes about ten times as long as writing a block, so many blocks share a file.
_SEGMENT_BLOCKS = 64
_HEADER_BYTES = 4096  # One mark per block; the rest aligns the blocks.
_MAX_OPEN = 32  # Few, as a deleted file takes up disk space until it is closed.
_DATE_SEC = 1  # Precision of the recorded times of use.
_never_closed: list[IO[bytes]] = []


class Segment:
    """A cache file of consecutive blocks, open for reading by position.

    It is sparse. It begins with one mark byte per block, which is set once the block is written.

    Args:
        first: Number of its first block in the remote file.
        end: Size of the remote file in bytes.
    """

    def __init__(self, path: str, first: int, end: int) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._first, self._shift = first, _HEADER_BYTES - first * BLOCK_BYTES
        self._end = end + self._shift
        self._marks = b""
        self._date = 0.0  # Of the last check of whether it is current, by time.monotonic().

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def has(self, first: int, num: int = 1) -> bool:
        """Return whether ``num`` blocks are cached here, from the segment's block ``first`` on."""
        wanted = b"\1" * num
        if self._marks[first : first + num] == wanted:
            return True
        return self.marks()[first : first + num] == wanted

    def holds(self, block: int) -> bool:
        """Return whether block number ``block`` of the remote file is cached here."""
        place = block - self._first
        return 0 <= place < _SEGMENT_BLOCKS and self.has(place)

    def marks(self) -> bytes:
        """Return a byte per block, 1 if it is cached; trailing ones may be missing from a file."""
        self._marks = os.pread(self._descriptor, _SEGMENT_BLOCKS, 0)
        return self._marks

    def pread(self, size: int, offset: int) -> bytes:
        """Return ``size`` bytes from ``offset`` of the remote file on."""
        return os.pread(self._descriptor, size, offset + self._shift)

    def readinto(self, target: np.ndarray | memoryview, offset: int) -> int:
        """Fill ``target`` from ``offset`` of the remote file on; return the bytes read."""
        return os.preadv(self._descriptor, [target], offset + self._shift)

    def is_current(self) -> bool:
        """Return whether the file still has its name, and record that it is in use.

        Within a second of the last check it returns True without looking.
        """
        now = time.monotonic()
        if now < self._date + _DATE_SEC:
            return True
        self._date = now
        stat = os.fstat(self._descriptor)
        if time.time() > stat.st_atime + _DATE_SEC:
            with contextlib.suppress(OSError):  # The file may belong to another user.
                # Segments are evicted in the order of their access times.
                os.utime(self._descriptor, ns=(time.time_ns(), stat.st_mtime_ns))
        return not self.is_deleted()

    def is_deleted(self) -> bool:
        """Return whether the file has been deleted."""
        return os.fstat(self._descriptor).st_nlink == 0

    def is_whole(self) -> bool:
        """Return False if bytes of a marked block are missing, as after a power failure."""
        if os.fstat(self._descriptor).st_mtime > _boot_time():
            return True
        size = os.lseek(self._descriptor, 0, os.SEEK_END)
        for number in np.flatnonzero(np.frombuffer(self.marks(), np.uint8)).tolist():
            start = _HEADER_BYTES + number * BLOCK_BYTES
            end = min(start + BLOCK_BYTES, self._end)
            if size < end or os.lseek(self._descriptor, start, os.SEEK_HOLE) < end:
                return False
        return True


class Blocks:
    """The blocks of one version of a remote file that are cached on this disk.

    A block appears whole or not at all, and may vanish at any time, as the cache evicts the blocks
    least recently used. Blocks are not fsynced, which would take longer than their transfer: after
    a power failure their bytes may be wrong, which the checksums of archive members reveal.

    Args:
        identity: Text that identifies the content of the file.
        size: Size of the file in bytes.
    """

    def __init__(self, identity: str, size: int) -> None:
        key = hashlib.sha256(identity.encode()).hexdigest()[:32]
        self.root = cache_dir() / "blocks"
        self.size, self.key = size, key
        self._folder = str(self.root / key)
        self._seen: np.ndarray | None = None
        # Position of this file's locks in the lock file that all remote files share.
        self._first_lock = int(key[:9], 16) << 24

    def __len__(self) -> int:
        return -(-self.size // BLOCK_BYTES)

    def length(self, block: int) -> int:
        """Return the size of a block in bytes; the last one may be smaller."""
        return min(BLOCK_BYTES, self.size - block * BLOCK_BYTES)

    def segment_end(self, offset: int) -> int:
        """Return the offset in the file at which the segment that holds ``offset`` ends."""
        size = _SEGMENT_BLOCKS * BLOCK_BYTES
        return (offset // size + 1) * size

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self), _seen=None)

    def __contains__(self, block: int) -> bool:
        return self.open(block) is not None

    def missing(self, numbers: np.ndarray) -> list[int]:
        """Return which of the ascending block ``numbers``, int64 [N], are not cached.

        A block once seen counts as cached until :meth:`open` finds that one has gone.
        """
        seen = self._seen
        if seen is None:
            seen = self._seen = np.zeros(len(self), bool)
        unseen = numbers[~seen[numbers]]
        for segment in np.unique(unseen // _SEGMENT_BLOCKS).tolist():
            first = segment * _SEGMENT_BLOCKS
            found = self._segment(segment)
            if found is not None:
                marks = np.frombuffer(found.marks(), np.uint8)[: len(seen) - first]
                seen[first : first + len(marks)] |= marks == 1
        return unseen[~seen[unseen]].tolist()

    def is_whole(self) -> bool:
        """Return whether every block counts as cached: see :meth:`missing`."""
        return self._seen is not None and bool(self._seen.all())

    def holding(self, size: int, offset: int) -> Segment | None:
        """Return the segment that holds ``size`` bytes from ``offset`` on, as :meth:`open` does."""
        first = offset // BLOCK_BYTES
        return self.open(first, (offset + size - 1) // BLOCK_BYTES + 1 - first)

    def open(self, block: int, num: int = 1) -> Segment | None:
        """Return the segment that holds ``num`` blocks from ``block`` on.

        None if any of them is not cached, or if they belong to several segments. An open segment
        can be read even after its file has been deleted.
        """
        segment, first = block // _SEGMENT_BLOCKS, block % _SEGMENT_BLOCKS
        if first + num > _SEGMENT_BLOCKS:
            return None
        found = self._segment(segment)
        if found is not None and found.has(first, num):
            return found
        if found is not None and found.is_deleted():
            close_blocks()  # A new file may have taken its name.
            found = self._segment(segment)
            if found is not None and found.has(first, num):
                return found
        seen = self._seen
        if seen is not None and seen[block : block + num].all():
            self._seen = None
        return None

    def _segment(self, number: int) -> Segment | None:
        try:
            found = _open(self._folder, number, self.size)
            if not found.is_current():
                close_blocks()
                found = _open(self._folder, number, self.size)
            return found
        except FileNotFoundError:
            return None

    def write(self, first: int, data: bytes | memoryview) -> None:
        """Cache the blocks in ``data``, numbered from ``first`` on.

        Raises ValueError if they cannot be written, even after older blocks were deleted.
        """
        view, num_blocks = memoryview(data), -(-len(data) // BLOCK_BYTES)
        number, end = first, first + num_blocks
        while number < end:
            segment, place = divmod(number, _SEGMENT_BLOCKS)
            num = min(end - number, _SEGMENT_BLOCKS - place)
            part = view[(number - first) * BLOCK_BYTES :][: num * BLOCK_BYTES]
            path = _path(self._folder, segment)
            try:
                try:
                    _write(path, place, part)
                except OSError:
                    room.make_room(self.root, len(part), is_full=True)
                    close_blocks()
                    _write(path, place, part)
            except OSError as error:
                but = f"blocks of remote data cannot be kept here ({error.strerror})"
                remedy = f"make room, lower ${room.LIMIT_VARIABLE}, or name another folder: "
                raise refusal(self.root, but=but, remedy=f"{remedy}$SETDIFFIT_CACHE") from None
            number += num

    def count(self, num_bytes: int) -> None:
        """Add to the total size of the cache, and delete its oldest blocks beyond the limit."""
        with contextlib.suppress(OSError):  # A missing total is measured again.
            if room.count(self.root, num_bytes):
                close_blocks()

    def forget(self, block: int) -> None:
        """Mark a block, whose bytes are wrong, as missing."""
        segment, place = divmod(block, _SEGMENT_BLOCKS)
        with (
            contextlib.suppress(FileNotFoundError),
            open(_path(self._folder, segment), "r+b", buffering=0) as file,
        ):
            os.pwrite(file.fileno(), b"\0", place)
        close_blocks()
        self._seen = None

    def lock(self, block: int, num: int = 1) -> bool:
        """Claim ``num`` blocks from ``block`` on; return False if another process has one of them.

        A claim lasts until :meth:`unlock` or the end of the process, however it ends. It does not
        exclude other threads of the process. On file systems without locks, every claim succeeds.
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
        """Release blocks that were claimed with :meth:`lock`."""
        with contextlib.suppress(OSError):
            place = self._first_lock + block
            fcntl.lockf(_lock_file(self.root, os.getpid()), fcntl.LOCK_UN, num, place)


def close_blocks() -> None:
    """Drop all open segments, as some of their files may have been deleted."""
    _open.cache_clear()


def _path(folder: str, segment: int) -> str:
    return f"{folder}/{segment}.blocks"


@functools.lru_cache(1)
def _boot_time() -> float:
    import psutil

    return psutil.boot_time()


@functools.lru_cache(_MAX_OPEN)
def _open(folder: str, number: int, size: int) -> Segment:
    path = _path(folder, number)
    segment = Segment(path, number * _SEGMENT_BLOCKS, size)
    if not segment.is_whole():
        os.unlink(path)
        raise FileNotFoundError(path)
    return segment


def _write(path: str, place: int, data: memoryview) -> None:
    """Write blocks of a segment, from its block ``place`` on, and then their marks."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = os.open(path, flags, 0o666)
    try:
        if os.pwrite(descriptor, data, _HEADER_BYTES + place * BLOCK_BYTES) != len(data):
            raise OSError(28, "No space left on device")
        os.pwrite(descriptor, b"\1" * -(-len(data) // BLOCK_BYTES), place)
    finally:
        os.close(descriptor)


@functools.lru_cache(4)
def _lock_file(root: Path, pid: int) -> IO[bytes]:
    """Return the file whose byte ranges are locked to claim blocks."""
    root.mkdir(parents=True, exist_ok=True)
    file = open(root / ".locks", "ab")
    _never_closed.append(file)  # Threads may open it twice; closing one would release all locks.
    return file
