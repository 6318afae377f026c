"""Files in folders, zips and tars: where each lies, and archives that read them by position."""

import dataclasses
import hashlib
import posixpath
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.images.decode import decode_image, is_image_name
from data.images.identity import identity_of_files
from dnnlib.addresses import AddressError, without_query
from dnnlib.errors import refusal
from dnnlib.files import read_file
from dnnlib.remote.files import OpenFile, OpenFiles
from dnnlib.typed import parse_json, unique_keys

_KEYS = ("labels", "class_names", "class_splits", "captions")  # Of a dataset.json.
LOCAL_HEADER = struct.Struct("<4s22xHH")  # Signature, ..., length of name, length of extra field.
_LOCAL_SLACK = 128  # Bytes read beyond header and content, for name and extra fields.
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
METADATA_SUFFIXES = ("dataset.json", ".txt")  # Of the files that are read besides images.
BARE = -1  # Instead of a compression method: content without a zip header, as in a tar.
_MAX_UNPACKED = 1 << 30  # Bytes; no image small enough to be decoded has more.
_FILES = OpenFiles()  # For members that are read without their archive.


@dataclasses.dataclass(frozen=True)
class Member:
    """Where the bytes of one file lie: small, and sufficient to read it in another process.

    ``path`` is the file itself if ``offset`` is negative, and otherwise the archive, or its
    address, that holds the file from ``offset`` on.
    """

    path: str
    offset: int = -1
    compressed_size: int = 0
    method: int = zipfile.ZIP_STORED
    crc: int | None = None

    @property
    def place(self) -> tuple[int, int]:
        """Offset and size in bytes of the range that :meth:`read` needs, or slightly more."""
        if self.method == BARE:
            return self.offset, self.compressed_size
        return self.offset, LOCAL_HEADER.size + _LOCAL_SLACK + self.compressed_size

    def read(self, files: OpenFiles = _FILES) -> bytes:
        """Return the content; raises ValueError with the reason, without the file's name."""
        try:
            if self.offset < 0:
                return read_file(self.path)
            file = files(self.path)
            try:
                return self._read_from(file)
            except AddressError:
                raise
            except ValueError:
                # A power failure may have damaged a cached block of a remote file.
                offset, size = self.place
                file.forget(size, offset)
                return self._read_from(file)
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from None

    def _read_from(self, file: OpenFile) -> bytes:
        content = (self._bare if self.method == BARE else self._unzipped)(file)
        if self.crc is not None and zlib.crc32(content) != self.crc:
            raise ValueError("its bytes differ from the checksum in the archive")
        return content

    def _bare(self, file: OpenFile) -> bytes:
        content = file.pread(self.compressed_size, self.offset)
        if len(content) < self.compressed_size:
            raise ValueError("the archive ends in the middle of this file")
        return content

    def _unzipped(self, file: OpenFile) -> bytes:
        # The local header repeats the name and may have an extra field of its own, so its length is
        # known only after reading it. One read that is a little too long usually suffices.
        data = file.pread(self.place[1], self.offset)
        start = local_header_length(data)
        end = start + self.compressed_size
        if len(data) < end:
            data += file.pread(end - len(data), self.offset + len(data))
            if len(data) < end:
                raise ValueError("the zip archive ends in the middle of this file")
        content = data[start:end]
        if self.method == zipfile.ZIP_DEFLATED:
            try:
                unpacker = zlib.decompressobj(-15)
                content = unpacker.decompress(content, _MAX_UNPACKED)
            except zlib.error as error:
                raise ValueError(f"its compressed data are damaged ({error})") from None
            if not unpacker.eof:
                if len(content) == _MAX_UNPACKED:
                    raise ValueError(f"it unpacks to more than {_MAX_UNPACKED >> 30} GiB")
                raise ValueError("its compressed data are damaged (they end too early)")
        return content


def local_header_length(data: bytes) -> int:
    """Return the length of the local header at the start of ``data``; ValueError without one."""
    if len(data) < LOCAL_HEADER.size or data[:4] != b"PK\x03\x04":
        raise ValueError("the zip archive is damaged here")
    return LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack_from(data)[1:])


class Archive:
    """The image files of a zip, tar or folder, sorted by name.

    Attributes:
        path: The zip, tar or folder, or the address of a zip or tar.
        names: Names of the image files, relative to the archive and with ``/``.
        num_bytes: Sum of the stored sizes of the image files.
        others: Names of the files that are not images, except hidden ones.
    """

    path: Path | str
    names: list[str]
    others: Sequence[str] = ()
    num_bytes: int

    def __len__(self) -> int:
        return len(self.names)

    def member(self, index: int) -> Member:
        """Return the place of the image file ``index``."""
        raise NotImplementedError

    def read(self, index: int) -> bytes:
        """Return the bytes of the image file ``index``; safe in threads, forks and copies.

        Raises ValueError with the reason, without the file's name (see :meth:`label`).
        """
        return self.member(index).read()

    def prefetch(self, indices: np.ndarray) -> None:
        """Start fetching image files, int64 [N], in the background, if the archive is remote."""

    def pixels(self, index: int, *, exact: bool = False) -> np.ndarray:
        """Return the image ``index``, uint8 [H, W] or [H, W, 3], decoded by :func:`decode_image`.

        Raises ValueError as :meth:`read` does.
        """
        return np.asarray(decode_image(self.read(index), exact=exact))

    def read_file(self, name: str) -> bytes | None:
        """Return the bytes of ``dataset.json`` or a text file by its name, or None without it."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Return the identity of the files, by names and contents: :mod:`data.images.identity`."""
        raise NotImplementedError

    def checksums(self) -> tuple[np.ndarray, np.ndarray]:
        """Return length in bytes and CRC-32 of the content of each image, integers [N] both."""
        raise NotImplementedError

    def old_fingerprint(self) -> str:
        """Return the identity by version 1, which used the dates of a folder's files."""
        raise NotImplementedError

    def label(self, index: int) -> str:
        """Return the name of an image file for messages: archive and path inside it."""
        return f"{without_query(str(self.path))}/{self.names[index]}"

    def metadata(self, folder: str = "") -> dict[str, Any]:
        """Return the parsed ``dataset.json`` of ``folder``, {} without; ValueError if damaged."""
        label = f"{without_query(str(self.path))}/{folder}dataset.json"
        try:
            data = self.read_file(f"{folder}dataset.json")
        except AddressError:
            raise
        except ValueError as error:
            raise ValueError(f"{label}: cannot be read ({error}).") from None
        return {} if data is None else parse_metadata(data, label)


class PackedArchive(Archive):
    """The image files packed in a single file, which is read by position.

    Args:
        path: Path or address of the packed file.
        files: Reads the packed file.
        places: (offset, compressed_size, method, crc) of each member, as in :class:`Member`, by its
            name, in any order.
        lengths: Length in bytes of the uncompressed content of each member, by its name.
    """

    def __init__(
        self,
        path: Path | str,
        files: OpenFiles,
        places: Mapping[str, tuple[int, int, int, int]],
        lengths: Mapping[str, int],
    ) -> None:
        self.path, self._open = path, files
        self.names = sorted(name for name in places if is_image_name(name) and not is_hidden(name))
        self.others = sorted(n for n in places if not is_image_name(n) and not is_hidden(n))
        # One array row per file: objects for large datasets would take too much memory.
        rows = [places[name] for name in self.names]
        self._rows = np.array(rows, np.int64).reshape(-1, 4)
        self._lengths = np.array([lengths[name] for name in self.names], np.int64)
        others = [name for name in places if name.endswith(METADATA_SUFFIXES)]
        self._others = {name: Member(str(path), *places[name]) for name in others}
        self.num_bytes = int(self._rows[:, 1].sum())

    def member(self, index: int) -> Member:
        return Member(str(self.path), *self._rows[index].tolist())

    def read(self, index: int) -> bytes:
        return self.member(index).read(self._open)

    def prefetch(self, indices: np.ndarray) -> None:
        rows = self._rows[indices]
        # The ranges of Member.place; the few bytes more of a file in a tar do no harm.
        sizes = rows[:, 1] + LOCAL_HEADER.size + _LOCAL_SLACK
        self._open(self.path).prefetch(rows[:, 0], sizes)

    def read_file(self, name: str) -> bytes | None:
        member = self._others.get(name)
        return None if member is None else member.read(self._open)

    def checksums(self) -> tuple[np.ndarray, np.ndarray]:
        return self._lengths, self._rows[:, 3]

    def fingerprint(self) -> str:
        metadata = self.read_file("dataset.json")
        return identity_of_files(self.names, *self.checksums(), metadata)

    def old_fingerprint(self) -> str:
        digest = hashlib.sha256("\n".join(self.names).encode())
        digest.update(self._rows[:, 1].tobytes() + self._rows[:, 3].tobytes())
        digest.update(self.read_file("dataset.json") or b"")
        return digest.hexdigest()


def is_hidden(name: str) -> bool:
    """Return whether a part of a path is hidden (``.NAME``) or added by macOS (``__MACOSX``)."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def plain_name(name: str) -> str:
    """Return a file's name with ``.``, ``..`` and double slashes resolved as far as possible."""
    return posixpath.normpath(name) if "./" in name or "//" in name else name


def is_needed(name: str) -> bool:
    """Return whether a file of a zip or tar is ever read: as an image, or as metadata of images."""
    is_read = is_image_name(name) or name.endswith(METADATA_SUFFIXES)
    return is_read and not is_hidden(name)


def holds_twice(names: Iterable[str]) -> str:
    """Return the error text for names of which one occurs twice."""
    return f"holds {Counter(names).most_common(1)[0][0]} twice"


def parse_metadata(content: bytes, where: str) -> dict[str, Any]:
    """Return the object in a ``dataset.json``; raises ValueError for anything else."""
    try:
        metadata = parse_json(content, object_pairs_hook=unique_keys)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error}).") from None
    if not isinstance(metadata, dict):
        found = type(metadata).__name__
        raise refusal(where, but=f'expected an object with "labels", got a {found}')
    for key in metadata:
        if key not in _KEYS and key.lower() in _KEYS:
            raise refusal(where, but=f'has the key "{key}"', remedy=f'write it "{key.lower()}"')
    return metadata
