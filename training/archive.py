"""Image files inside a zip or a folder, addressed by index, for many processes at once."""

import dataclasses
import functools
import hashlib
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from training.images import is_image_name

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # Signature, ..., length of name, length of extra field.
_LOCAL_SLACK = 64  # Bytes read beyond the expected header, for extra fields.


@dataclasses.dataclass(frozen=True)
class Member:
    """Where the bytes of one file lie; small, and readable in another process."""

    path: str
    offset: int = -1
    compressed_size: int = 0
    method: int = zipfile.ZIP_STORED
    crc: int | None = None

    def read(self, descriptor: int | None = None) -> bytes:
        """Return the content, from an open file of the zip if one is given.

        Raises ValueError with the reason (without the name).
        """
        try:
            if self.offset < 0:
                return Path(self.path).read_bytes()
            if descriptor is None:
                descriptor = _cached_descriptor(self.path)
            return _read_from_zip(descriptor, self.offset, self.compressed_size, self.method)
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from None


@functools.lru_cache(maxsize=2)
def _cached_descriptor(path: str) -> int:
    return os.open(path, os.O_RDONLY)


def _read_from_zip(descriptor: int, offset: int, compressed_size: int, method: int) -> bytes:
    # The local header repeats the name and may have an extra field of its own, so its length is
    # known only after reading it. One read that is a little too long usually suffices.
    wanted = _LOCAL_HEADER.size + _LOCAL_SLACK + 64 + compressed_size
    data = os.pread(descriptor, wanted, offset)
    if len(data) < _LOCAL_HEADER.size or data[:4] != b"PK\x03\x04":
        raise ValueError("the zip archive is damaged here")
    _, name_length, extra_length = _LOCAL_HEADER.unpack_from(data)
    start = _LOCAL_HEADER.size + name_length + extra_length
    end = start + compressed_size
    if len(data) < end:
        data += os.pread(descriptor, end - len(data), offset + len(data))
        if len(data) < end:
            raise ValueError("the zip archive ends in the middle of this file")
    content = data[start:end]
    if method == zipfile.ZIP_DEFLATED:
        try:
            content = zlib.decompress(content, -15)
        except zlib.error as error:
            raise ValueError(f"its compressed data are damaged ({error})") from None
    return content


class Archive:
    """The image files of a zip or a folder, sorted by name.

    Attributes:
        path: The zip or folder.
        names: Names of the image files, relative to the archive and with ``/``.
        num_bytes: Sum of the stored sizes of the image files.
    """

    path: Path
    names: list[str]
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
        raise NotImplementedError

    def read_file(self, name: str) -> bytes | None:
        """Return the bytes of any file by its name, or None if there is none."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Return hexadecimal digits that change when any file's name or content does."""
        raise NotImplementedError

    def label(self, index: int) -> str:
        """Return the name of an image file for messages: archive and path inside it."""
        return f"{self.path}/{self.names[index]}"

    def metadata(self, folder: str = "") -> dict[str, Any] | None:
        """Return the parsed ``dataset.json`` of the archive, or None if it has none."""
        data = self.read_file(f"{folder}dataset.json")
        if data is None:
            return None
        label = f"{self.path}/{folder}dataset.json"
        try:
            metadata = json.loads(data)
        except ValueError as error:
            raise ValueError(f"{label}: not valid JSON ({error}).") from None
        if not isinstance(metadata, dict):
            raise ValueError(
                f'{label}: expected an object with "labels", got a {type(metadata).__name__}.'
            )
        return metadata


class ZipArchive(Archive):
    """A zip, read with ``os.pread`` so that the processes and threads that share it do not meet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as file:
                infos = {info.filename: info for info in file.infolist() if not info.is_dir()}
        except zipfile.BadZipFile:
            raise ValueError(
                f"{path}: not a zip archive, or only part of one. Give a folder of images or a "
                "zip, or copy the file again."
            ) from None
        self.names = sorted(name for name in infos if is_image_name(name) and not is_hidden(name))
        others = [name for name in infos if name.rpartition("/")[2] == "dataset.json"]
        for name in self.names + others:
            if infos[name].flag_bits & 1:
                raise ValueError(
                    f"{path}/{name}: is encrypted; extract the zip and give the folder."
                )
            if infos[name].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(
                    f"{path}/{name}: is compressed by a method other than deflate; extract the "
                    "zip and give the folder."
                )

        def column(attribute: str) -> np.ndarray:
            return np.array([getattr(infos[name], attribute) for name in self.names], np.int64)

        self._offsets = column("header_offset")
        self._sizes = column("compress_size")
        self._methods = column("compress_type").astype(np.uint8)
        self._crcs = column("CRC")
        self._others = {name: _member(path, infos[name]) for name in others}
        self.num_bytes = int(self._sizes.sum())
        self._file = open(path, "rb", buffering=0)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._file = open(self.path, "rb", buffering=0)

    def member(self, index: int) -> Member:
        return Member(
            str(self.path),
            int(self._offsets[index]),
            int(self._sizes[index]),
            int(self._methods[index]),
            int(self._crcs[index]),
        )

    def read(self, index: int) -> bytes:
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        return _read_from_zip(self._file.fileno(), offset, size, int(self._methods[index]))

    def read_file(self, name: str) -> bytes | None:
        member = self._others.get(name)
        return None if member is None else member.read(self._file.fileno())

    def fingerprint(self) -> str:
        digest = hashlib.sha256("\n".join(self.names).encode())
        digest.update(self._sizes.tobytes() + self._crcs.tobytes())
        digest.update(self.read_file("dataset.json") or b"")
        return digest.hexdigest()


def _member(path: Path, info: zipfile.ZipInfo) -> Member:
    return Member(str(path), info.header_offset, info.compress_size, info.compress_type, info.CRC)


class FolderArchive(Archive):
    """A folder, searched recursively; hidden files are left out, links to folders are followed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = []
        for folder, folders, files in os.walk(path, followlinks=True):
            folders[:] = [name for name in folders if not is_hidden(name)]
            prefix = Path(folder).relative_to(path).as_posix()
            prefix = "" if prefix == "." else prefix + "/"
            found += [prefix + name for name in files if is_image_name(name)]
        self.names = sorted(name for name in found if not is_hidden(name))

    @functools.cached_property
    def num_bytes(self) -> int:
        return sum(os.stat(self.path / name).st_size for name in self.names)

    def member(self, index: int) -> Member:
        return Member(str(self.path / self.names[index]))

    def read(self, index: int) -> bytes:
        return self.member(index).read()

    def read_file(self, name: str) -> bytes | None:
        path = self.path / name
        return path.read_bytes() if path.is_file() else None

    def fingerprint(self) -> str:
        # Sizes and times stand for the contents, which would take too long to read.
        digest = hashlib.sha256()
        for name in self.names:
            stat = os.stat(self.path / name)
            digest.update(f"{name}\n{stat.st_size} {stat.st_mtime_ns}\n".encode())
        digest.update(self.read_file("dataset.json") or b"")
        return digest.hexdigest()


def is_hidden(name: str) -> bool:
    """Tell whether a path has a part that systems hide or add by themselves."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def open_archive(path: str | os.PathLike) -> Archive:
    """Return the image files of a folder or zip.

    Raises ValueError if there is no such path, if it is a file but no zip, or if it holds no
    images.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder.")
    archive = FolderArchive(path) if path.is_dir() else ZipArchive(path)
    if not len(archive):
        raise ValueError(f"{path}: holds no images (.png, .jpg, .webp, ...).")
    return archive
