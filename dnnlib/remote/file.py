"""A remote file with random access, read through blocks that are cached on disk."""

import functools
import io
import os
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np

from dnnlib.addresses import AddressError, name_of, open_address, without_query
from dnnlib.progress import progress
from dnnlib.remote.blocks import BLOCK_BYTES, Blocks, Segment
from dnnlib.remote.fetching import fetcher, runs
from dnnlib.remote.files import Known
from dnnlib.remote.ranges import Answer, NoRangesError, ask, ask_patiently
from dnnlib.remote.room import LIMIT_VARIABLE, cache_limit
from dnnlib.text import format_count

_LOOK_SEC = 0.05


class RemoteFile:
    """A file at an address (see dnnlib/addresses.py), safe to use in threads, forks and copies.

    Each block is fetched once for all processes of a machine. Faults that may pass are retried for
    up to five minutes. If the server sends only whole files, this one is copied into the cache.

    Args:
        known: Size and checksum of the file; if None, the server is asked for its size at once.

    Attributes:
        size: Size of the file in bytes.

    Raises AddressError, here and on reading, if the file cannot be read, if its size is not the
    known one, or if it has changed since it was opened.
    """

    def __init__(self, address: str, known: Known | None = None) -> None:
        self.address, self.label = address, without_query(address)
        self._version, self._is_whole = "", False
        if known is None:
            answer = self._ask_first()
            self._version, self.size = answer.version, answer.size
            identity = f"{self.label if answer.version else address}\n{answer.version}"
        else:
            answer, self.size, identity = None, known.size, f"sha256\n{known.sha256}"
        self.blocks = Blocks(f"{identity}\n{self.size}", self.size)
        if answer is not None and answer.data and 0 not in self.blocks:
            self.blocks.write(0, answer.data[: self.blocks.length(0)])
            self.blocks.count(self.blocks.length(0))

    def _ask_first(self) -> Answer:
        try:
            answer = ask(self.address, 0, BLOCK_BYTES)
        except NoRangesError as error:
            self._is_whole, answer = True, error.answer
        if answer.size is None:
            raise AddressError(f"{self.label}: its server does not say how large it is.")
        return answer

    def pread(self, size: int, offset: int) -> bytes:
        """Return up to ``size`` bytes from ``offset`` on; fewer at the end of the file."""
        cached = self.blocks.holding(size, offset)
        if cached is not None:
            return cached.pread(size, offset)
        pieces = [found.pread(num, start) for found, num, start in self._pieces(size, offset)]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readinto(self, target: np.ndarray, offset: int) -> int:
        """Fill an array with the bytes from ``offset`` on; return how many were read."""
        cached = self.blocks.holding(target.nbytes, offset)
        if cached is not None:  # The usual case, in half the time.
            return cached.readinto(target, offset)
        view, done = memoryview(target).cast("B"), 0
        for found, num, start in self._pieces(len(view), offset):
            done += found.readinto(view[done : done + num], start)
        return done

    def _pieces(self, size: int, offset: int) -> Iterator[tuple[Segment, int, int]]:
        """Yield the segment, the number of bytes and the offset of each part of a byte range."""
        end, is_asked = min(offset + size, self.size), False
        while offset < end:
            number = offset // BLOCK_BYTES
            stop = min(self.blocks.segment_end(offset), end)
            found = self.blocks.open(number, (stop - 1) // BLOCK_BYTES + 1 - number)
            if found is None:
                if not is_asked and end > (number + 1) * BLOCK_BYTES:
                    self.prefetch(np.array([offset]), end - offset)
                is_asked = True
                found, stop = self._fetched(number), min((number + 1) * BLOCK_BYTES, end)
            yield found, stop - offset, offset
            offset = stop

    def _fetched(self, number: int) -> Segment:
        """Return the segment that holds a block, fetching the block if it is not cached."""
        while (found := self.blocks.open(number)) is None:
            fetched = fetcher().job(self, number).wait()
            if fetched is not None and fetched.holds(number):
                return fetched
        return found

    def prefetch(self, offsets: np.ndarray, sizes: np.ndarray | int) -> None:
        """Fetch byte ranges in the background: see :class:`~dnnlib.remote.files.OpenFile`."""
        if self.blocks.is_whole():
            return
        firsts = offsets // BLOCK_BYTES
        lasts = np.minimum((offsets + sizes - 1) // BLOCK_BYTES, len(self.blocks) - 1)
        counts = lasts + 1 - firsts
        # The block numbers of every range, concatenated.
        numbers = np.repeat(firsts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        fetcher().want(self, self.blocks.missing(np.unique(numbers)))

    def forget(self, size: int, offset: int) -> None:
        """Drop the blocks of bytes that proved wrong, so that the next read fetches them again."""
        for number in range(offset // BLOCK_BYTES, -(-(offset + size) // BLOCK_BYTES)):
            self.blocks.forget(number)

    def fetch(self, first: int, end: int) -> Segment | None:
        """Fetch blocks ``first`` to ``end`` (exclusive) into the cache.

        Returns the open segment of the first block, whose file a small cache may have deleted
        already; None if it is not at hand.
        """
        if not self._is_whole:
            start, stop = first * BLOCK_BYTES, min(end * BLOCK_BYTES, self.size)
            try:
                answer = ask_patiently(self.address, start, stop)
                self._compare(answer)
                if len(answer.data) != stop - start:
                    raise self._changed("its size")
                self.blocks.write(first, answer.data)
                fetched = self.blocks.open(first)
                self.blocks.count(stop - start)
                return fetched
            except NoRangesError as error:
                self._compare(error.answer)
                self._is_whole = True
        self._fetch_whole(range(first, end))
        return None

    def _compare(self, answer: Answer) -> None:
        if answer.size not in (None, self.size):
            raise self._changed(f"{answer.size} bytes instead of {self.size}")
        self._version = self._version or answer.version
        if answer.version and answer.version != self._version:
            raise self._changed("another version")

    def _changed(self, what: str) -> AddressError:
        return AddressError(
            f"{self.label}: has changed since it was opened or recorded ({what}); start "
            "again, or recreate what refers to it."
        )

    def _fetch_whole(self, wanted: range) -> None:
        """Copy the whole file into the cache, in one thread of one process at a time."""
        if self.size > cache_limit():
            limit = f"${LIMIT_VARIABLE} allows {format_count(cache_limit(), 'B')}"
            raise AddressError(
                f"{self.label}: its server gives whole files only, and of "
                f"{format_count(self.size, 'B')} {limit}; raise that, or download the file."
            )
        with _whole_lock(os.getpid()):
            while not self.blocks.lock(len(self.blocks)):
                time.sleep(_LOOK_SEC)
            try:
                if not all(number in self.blocks for number in wanted):
                    self._copy()
            finally:
                self.blocks.unlock(len(self.blocks))

    def _copy(self) -> None:
        print(f"{self.label}: its server gives whole files only; copying it.", file=sys.stderr)
        shown = dict(total=self.size, label=f"Copying {name_of(self.address)}", unit="B")
        with open_address(self.address) as stream, progress(**shown, transient=True) as bar:
            for run in runs(range(len(self.blocks))):
                size = sum(map(self.blocks.length, run))
                data = stream.read(size)
                if len(data) != size:
                    raise self._changed("it is shorter")
                self.blocks.write(run[0], data)
                self.blocks.count(size)
                bar.update(size)


@functools.lru_cache(1)
def _whole_lock(pid: int) -> threading.Lock:
    """Return a lock of this process: a fork could inherit another's in the locked state."""
    return threading.Lock()


class RemoteStream(io.RawIOBase):
    """A remote file as a seekable binary stream."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        if base + offset < 0:
            raise OSError(22, "Invalid argument")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        data = self._file.pread(len(buffer), self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
