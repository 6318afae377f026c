"""Local and remote files behind one interface for reading by position."""

import functools
import io
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from dnnlib.addresses import is_address, without_query
from dnnlib.files import regular_file


class Known(NamedTuple):
    """Size and checksum of a remote file from a record, so that its server need not be asked."""

    size: int
    sha256: str


class OpenFile(Protocol):
    """A file open for reading by position."""

    def pread(self, size: int, offset: int) -> bytes:
        """Return up to ``size`` bytes from ``offset`` on; fewer at the end of the file."""
        ...

    def readinto(self, target: np.ndarray, offset: int) -> int:
        """Fill an array with the bytes from ``offset`` on; return how many were read."""
        ...

    def prefetch(self, offsets: np.ndarray, sizes: np.ndarray | int) -> None:
        """Start fetching byte ranges in the background if the file is remote.

        Args:
            offsets: [N], int64, first byte of each range.
            sizes: [N], int64, bytes of each range, above 0; or one size for all.
        """
        ...

    def forget(self, size: int, offset: int) -> None:
        """Drop cached bytes that proved wrong, so that a remote file fetches them again."""
        ...


class LocalFile:
    """A file on this machine: see :class:`OpenFile`."""

    def __init__(self, path: str | os.PathLike) -> None:
        self._file = open(path, "rb", buffering=0)

    def pread(self, size: int, offset: int) -> bytes:
        return os.pread(self._file.fileno(), size, offset)

    def readinto(self, target: np.ndarray, offset: int) -> int:
        return os.preadv(self._file.fileno(), [target], offset)

    def prefetch(self, offsets: np.ndarray, sizes: np.ndarray | int) -> None:
        pass

    def forget(self, size: int, offset: int) -> None:
        pass


class OpenFiles:
    """Opens files for reading by position, and keeps up to 256 of them open.

    A pickled copy, as in a data loader process, starts with none open. Threads may open a file
    twice. Opening a file, and reading a remote one, raises OSError and AddressError.

    Args:
        known: Sizes and checksums of remote files, by address.
    """

    def __init__(self, known: Mapping[str, Known] = MappingProxyType({})) -> None:
        self._known = dict(known)
        self._open = functools.lru_cache(256)(functools.partial(_open, self._known))

    def __call__(self, path: str | os.PathLike) -> OpenFile:
        return self._open(path)

    def pread(self, path: str | os.PathLike, size: int, offset: int) -> bytes:
        """Return up to ``size`` bytes of a file from ``offset`` on."""
        return self._open(path).pread(size, offset)

    def stream(self, path: str | os.PathLike) -> BinaryIO:
        """Return a file as a seekable stream, which the caller has to close."""
        if not is_address(path):
            return open(path, "rb")
        from dnnlib.remote.file import RemoteStream

        return io.BufferedReader(RemoteStream(self._open(path)))

    def __reduce__(self) -> tuple[type, tuple]:
        return OpenFiles, (self._known,)


def _open(known: Mapping[str, Known], path: str | os.PathLike) -> OpenFile:
    if not is_address(path):
        return LocalFile(path)
    from dnnlib.remote.file import RemoteFile

    return RemoteFile(path, known.get(path))


def read_all(location: Path | str, max_bytes: int) -> bytes:
    """Return the content of a local or remote file of at most ``max_bytes``.

    Raises ValueError for a larger file; OSError or AddressError if it cannot be read.
    """
    if is_address(location):
        stream = OpenFiles().stream(location)
    else:
        stream = open(location, "rb", opener=regular_file)
    with stream:
        if stream.seek(0, os.SEEK_END) > max_bytes:
            where = without_query(str(location))
            raise ValueError(
                f"{where}: has over {max_bytes:,} bytes, more than such a file can have."
            )
        stream.seek(0)
        return stream.read()


def location_of(path: str | os.PathLike) -> Path | str:
    """Return a Path, or the text of an address: ``pathlib`` would remove one of its slashes."""
    return str(path) if is_address(path) else Path(path)
