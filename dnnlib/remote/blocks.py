"""Blocks of remote files in a bounded cache on disk, which the processes of a machine share."""

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
# Making a file takes the system about ten times as long as writing a block, so many share one.
_SEGMENT_BLOCKS = 64
_HEADER_BYTES = 4096  # Of which as many are used as a segment has blocks; the rest aligns them.
_MAX_OPEN = 32  # What has been deleted takes its room until it is closed.
_DATE_SEC = 1  # To which the dates of uses are right.
_never_closed: list[IO[bytes]] = []


class Segment:
    """A file of some blocks in a row, open for reading by position.

    It is sparse. Its first bytes are marks, one for each block, written after the block was.

    Args:
        first: Number of its first block.
        end: Bytes of the remote file.
    """

    def __init__(self, path: str, first: int, end: int) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._first, self._shift = first, _HEADER_BYTES - first * BLOCK_BYTES
        self._end = end + self._shift
        self._marks = b""
        self._date = 0.0  # On the clock of the process.

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def has(self, first: int, num: int = 1) -> bool:
        """Return whether blocks are there, the first of them the segment's ``first``."""
        wanted = b"\1" * num
        if self._marks[first : first + num] == wanted:
            return True
        return self.marks()[first : first + num] == wanted

    def holds(self, block: int) -> bool:
        """Return whether a block of the remote file is here."""
        place = block - self._first
        return 0 <= place < _SEGMENT_BLOCKS and self.has(place)

    def marks(self) -> bytes:
        """Return a byte for each block, 1 if it is there; those of the last ones may be missing."""
        self._marks = os.pread(self._descriptor, _SEGMENT_BLOCKS, 0)
        return self._marks

    def pread(self, size: int, offset: int) -> bytes:
        """Return bytes from ``offset`` of the remote file on."""
        return os.pread(self._descriptor, size, offset + self._shift)

    def readinto(self, target: memoryview, offset: int) -> int:
        """Fill ``target`` with the bytes from ``offset`` of the remote file on."""
        return os.preadv(self._descriptor, [target], offset + self._shift)

    def is_current(self) -> bool:
        """Return False if the file was deleted; note that it is in use. Looks once in a while."""
        now = time.monotonic()
        if now < self._date + _DATE_SEC:
            return True
        self._date = now
        stat = os.fstat(self._descriptor)
        if time.time() > stat.st_atime + _DATE_SEC:
            with contextlib.suppress(OSError):  # That of another user can be read, too.
                # The dates of access tell which segments have not been used for long.
                os.utime(self._descriptor, ns=(time.time_ns(), stat.st_mtime_ns))
        return not self.is_deleted()

    def is_deleted(self) -> bool:
        """Return whether the file has no name any more."""
        return os.fstat(self._descriptor).st_nlink == 0

    def is_whole(self) -> bool:
        """Return False if a power failure took bytes of blocks that are marked."""
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

    def segment_end(self, offset: int) -> int:
        """Return where the bytes of the file end that are kept together with one of them."""
        size = _SEGMENT_BLOCKS * BLOCK_BYTES
        return (offset // size + 1) * size

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self), _seen=None)

    def __contains__(self, block: int) -> bool:
        return self.open(block) is not None

    def missing(self, numbers: np.ndarray) -> list[int]:
        """Return those of rising numbers whose blocks are not here.

        One that was here before counts as here until :meth:`open` finds that any has gone.
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

    def open(self, block: int, num: int = 1) -> Segment | None:
        """Return the segment that holds blocks; None if one is not there or they are of several.

        What is open can be read even when its name has gone.
        """
        segment, first = divmod(block, _SEGMENT_BLOCKS)
        if first + num > _SEGMENT_BLOCKS:
            return None
        found = self._segment(segment)
        if found is not None and not found.has(first, num) and found.is_deleted():
            close_blocks()  # Another may have taken its name.
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
        """Keep blocks from ``first`` on; raises ValueError, one sentence, if the disk is full."""
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
        """Add to the bytes of all files' blocks, and delete the oldest ones beyond the limit."""
        with contextlib.suppress(OSError):  # The count is found anew when it is not there.
            if room.count(self.root, num_bytes):
                close_blocks()

    def forget(self, block: int) -> None:
        """Have a block whose bytes are wrong count as missing."""
        segment, place = divmod(block, _SEGMENT_BLOCKS)
        with (
            contextlib.suppress(FileNotFoundError),
            open(_path(self._folder, segment), "r+b", buffering=0) as file,
        ):
            os.pwrite(file.fileno(), b"\0", place)
        close_blocks()
        self._seen = None

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
    """Write blocks of a segment, from ``place`` on, and then their marks."""
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
    """Return the file whose bytes stand for blocks."""
    root.mkdir(parents=True, exist_ok=True)
    file = open(root / ".locks", "ab")
    _never_closed.append(file)  # Two threads may open it; to close one would end all locks.
    return file
