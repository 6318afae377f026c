"""Files inside folders and zip archives, read by position."""

import dataclasses
import functools
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.images.decode import decode_image
from dnnlib.errors import refusal
from dnnlib.files import read_file
from dnnlib.typed import parse_json

_KEYS = ("labels", "class_names", "class_splits", "captions")  # Of a dataset.json.
LOCAL_HEADER = struct.Struct("<4s22xHH")  # Signature, ..., length of name, length of extra field.
_LOCAL_SLACK = 128  # Bytes read beyond header and content, for name and extra fields.
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@dataclasses.dataclass(frozen=True)
class Member:
    """Where the bytes of one file lie; small, and readable in another process."""

    path: str
    offset: int = -1
    compressed_size: int = 0
    method: int = zipfile.ZIP_STORED
    crc: int | None = None

    def read(self, file: IO[bytes] | None = None) -> bytes:
        """Return the content, from the open zip if it is given.

        Raises ValueError with the reason (without the name).
        """
        try:
            if self.offset < 0:
                return read_file(self.path)
            descriptor = _cached_descriptor(self.path) if file is None else file.fileno()
            return self._read_from_zip(descriptor)
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from None

    def _read_from_zip(self, descriptor: int) -> bytes:
        # The local header repeats the name and may have an extra field of its own, so its length is
        # known only after reading it. One read that is a little too long usually suffices.
        wanted = LOCAL_HEADER.size + _LOCAL_SLACK + self.compressed_size
        data = os.pread(descriptor, wanted, self.offset)
        start = local_header_length(data)
        end = start + self.compressed_size
        if len(data) < end:
            data += os.pread(descriptor, end - len(data), self.offset + len(data))
            if len(data) < end:
                raise ValueError("the zip archive ends in the middle of this file")
        content = data[start:end]
        if self.method == zipfile.ZIP_DEFLATED:
            try:
                content = zlib.decompress(content, -15)
            except zlib.error as error:
                raise ValueError(f"its compressed data are damaged ({error})") from None
        if self.crc is not None and zlib.crc32(content) != self.crc:
            raise ValueError("its bytes differ from the checksum in the zip")
        return content


@functools.lru_cache(maxsize=2)
def _cached_descriptor(path: str) -> int:
    return os.open(path, os.O_RDONLY)


def local_header_length(data: bytes) -> int:
    """Return the length of the local header of a file in a zip, of which ``data`` is the begin."""
    if len(data) < LOCAL_HEADER.size or data[:4] != b"PK\x03\x04":
        raise ValueError("the zip archive is damaged here")
    return LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack_from(data)[1:])


class Archive:
    """The image files of a zip or a folder, sorted by name.

    Attributes:
        path: The zip or folder.
        names: Names of the image files, relative to the archive and with ``/``.
        num_bytes: Sum of the stored sizes of the image files.
        others: Names of the files that are no images, apart from hidden ones.
    """

    path: Path
    names: list[str]
    others: Sequence[str] = ()
    num_bytes: int

    def __len__(self) -> int:
        return len(self.names)

    def member(self, index: int) -> Member:
        """Return where the image file ``index`` lies."""
        raise NotImplementedError

    def read(self, index: int) -> bytes:
        """Return the bytes of the image file ``index``; safe in threads, forks and copies.

        Raises ValueError with the reason (without the file's name, see :meth:`label`).
        """
        return self.member(index).read()

    def pixels(self, index: int, *, exact: bool = False) -> np.ndarray:
        """Return the image ``index``, uint8 [H, W] or [H, W, 3], decoded by :func:`decode_image`.

        Raises ValueError as :meth:`read` does.
        """
        return np.asarray(decode_image(self.read(index), exact=exact))

    def read_file(self, name: str) -> bytes | None:
        """Return the bytes of any file by its name, or None if there is none."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Return the identity of the files' names and contents: see :mod:`data.images.identity`."""
        raise NotImplementedError

    def old_fingerprint(self) -> str:
        """Return the identity of version 1: of a folder, names, sizes and dates of its files."""
        raise NotImplementedError

    def label(self, index: int) -> str:
        """Return the name of an image file for messages: archive and path inside it."""
        return f"{self.path}/{self.names[index]}"

    def metadata(self, folder: str = "") -> dict[str, Any]:
        """Return the parsed ``dataset.json`` of the archive, or an empty one if it has none."""
        data = self.read_file(f"{folder}dataset.json")
        label = f"{self.path}/{folder}dataset.json"
        return {} if data is None else parse_metadata(data, label)


def parse_metadata(content: bytes, where: str) -> dict[str, Any]:
    """Return the object in a ``dataset.json``; raises ValueError for anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise ValueError(f"{twice!r} is listed twice")
        return found

    try:
        metadata = parse_json(content, object_pairs_hook=unique)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error}).") from None
    if not isinstance(metadata, dict):
        found = type(metadata).__name__
        raise refusal(where, but=f'expected an object with "labels", got a {found}')
    for key in metadata:
        if key not in _KEYS and key.lower() in _KEYS:
            raise refusal(where, but=f'has the key "{key}"', remedy=f'write it "{key.lower()}"')
    return metadata
