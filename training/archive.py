"""Images of a zip, a folder or a sample archive, by index, for many processes at once."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from training.images import decode_image, is_image_name, to_array
from training.latent_archive import is_latent_folder

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # Signature, ..., length of name, length of extra field.
_LOCAL_SLACK = 64  # Bytes read beyond the expected header, for extra fields.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


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
    start = _local_header_length(data)
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


def _local_header_length(data: bytes) -> int:
    if len(data) < _LOCAL_HEADER.size or data[:4] != b"PK\x03\x04":
        raise ValueError("the zip archive is damaged here")
    _, name_length, extra_length = _LOCAL_HEADER.unpack_from(data)
    return _LOCAL_HEADER.size + name_length + extra_length


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

    def pixels(self, index: int, *, exact: bool = False) -> np.ndarray:
        """Return the image ``index``, uint8 [H, W] or [H, W, 3], decoded by :func:`decode_image`.

        Raises ValueError with the reason (without the image's name, see :meth:`label`).
        """
        return to_array(decode_image(self.read(index), exact=exact))

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
                f"{path}: not a zip archive, or only part of one. Give a folder of images, a zip "
                "or an .npz of samples, or copy the file again."
            ) from None
        self.names = sorted(name for name in infos if is_image_name(name) and not is_hidden(name))
        others = [name for name in infos if name.rpartition("/")[2] == "dataset.json"]
        for name in self.names + others:
            if infos[name].flag_bits & 1:
                raise ValueError(
                    f"{path}/{name}: is encrypted; extract the zip and give the folder."
                )
            if infos[name].compress_type not in _METHODS:
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
        seen: set[str] = set()
        for folder, folders, files in os.walk(path, followlinks=True):
            # A link back to a folder above would lead round in circles.
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not is_hidden(name))
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


class SampleArchive(Archive):
    """The images of an ``.npz`` as ADM writes samples and reference batches (docs/formats.md).

    ``arr_0`` holds them, uint8 [N, H, W, 3], [N, H, W, 1] or [N, H, W]; ``arr_1``, if there is
    one, their class indices [N], and ``class_names`` the names of the classes. Each image is read
    by itself at its place in the file, unless ``arr_0`` is compressed or in Fortran order: it is
    then read whole by every process. Nothing is ever unpickled.

    Attributes:
        image_size: Height and width of every image.
        num_array_bytes: Sum of the sizes of the arrays, before compression.

    Raises ValueError if the file is damaged or holds anything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = []
        try:
            with zipfile.ZipFile(path) as file:
                names = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
        except zipfile.BadZipFile:
            raise ValueError(
                f"{path}: not an .npz, or only part of one; copy the file again."
            ) from None
        if "arr_0" not in names:
            hint = " (statistics such as mu and sigma are no images)" if "mu" in names else ""
            raise ValueError(
                f"{path}: has no array arr_0{hint}; save the images with np.savez(path, images), "
                "uint8 [N, H, W, 3]."
            )
        self._members = {n: names[n] for n in ("arr_0", "arr_1", "class_names") if n in names}
        self.num_bytes = sum(info.compress_size for info in self._members.values())
        self.num_array_bytes = sum(info.file_size for info in self._members.values())
        self._file = open(path, "rb", buffering=0)
        shape, fortran_order, dtype, header_length = self._read_member("arr_0", _array_header)
        self._check_images(shape, dtype)
        info = self._members["arr_0"]
        self._num_images = shape[0]
        self.image_size = shape[1:3]
        self._pixels_shape = shape[1:3] if shape[3:] in ((), (1,)) else shape[1:]
        self._image_bytes = math.prod(shape[1:])
        if info.file_size != header_length + math.prod(shape):
            raise ValueError(
                f"{path}: arr_0 has {info.file_size - header_length} bytes, but its shape "
                f"{list(shape)} needs {math.prod(shape)}; save or copy the file again."
            )
        # Where the first image lies; -1 if the array must be read whole.
        self._start = -1
        if info.compress_type == zipfile.ZIP_STORED and not fortran_order:
            local = os.pread(self._file.fileno(), _LOCAL_HEADER.size, info.header_offset)
            start = info.header_offset + _local_header_length(local)
            self._start = start + header_length

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_file", "_whole")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._file = open(self.path, "rb", buffering=0)

    def __len__(self) -> int:
        return self._num_images

    def label(self, index: int) -> str:
        return f"{self.path}, image {index}"

    def pixels(self, index: int, *, exact: bool = False) -> np.ndarray:
        if self._start < 0:
            return self._whole[index]
        size = self._image_bytes
        try:
            data = os.pread(self._file.fileno(), size, self._start + index * size)
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from None
        if len(data) < size:
            raise ValueError("the file ends in the middle of this image")
        return np.frombuffer(data, np.uint8).reshape(self._pixels_shape)

    @functools.cached_property
    def _whole(self) -> np.ndarray:
        return self.read_array("arr_0").reshape(self._num_images, *self._pixels_shape)

    def read_file(self, name: str) -> bytes | None:
        return None

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, info in self._members.items():
            digest.update(f"{name}\n{info.file_size} {info.CRC}\n".encode())
        return digest.hexdigest()

    def read_array(self, name: str) -> np.ndarray | None:
        """Return the array of a name as it is stored, or None if there is none."""
        if name not in self._members:
            return None
        return self._read_member(
            name, lambda stream: np.lib.format.read_array(stream, allow_pickle=False)
        )

    def check(self, on_bytes: Callable[[int], None]) -> Iterator[str]:
        """Read all arrays and yield a sentence for each whose bytes do not fit its checksum.

        ``on_bytes`` is told how many were read.
        """

        def read_all(stream: IO[bytes]) -> None:
            while data := stream.read(1 << 20):
                on_bytes(len(data))

        for name in self._members:
            try:
                self._read_member(name, read_all)
            except ValueError as error:
                yield str(error)

    def _check_images(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        held = f"{self.path}: arr_0 holds {dtype} of shape {list(shape)}"
        if dtype.hasobject:
            raise ValueError(
                f"{held}, Python objects, which are never unpickled; save one uint8 array."
            )
        if shape[3:] in ((2,), (4,)):
            raise ValueError(
                f"{held}, with an alpha channel it seems; composite the images on a background or "
                "drop that channel, and save them as [N, H, W, 3]."
            )
        # The last: a single image, not many that are 3 pixels wide.
        is_shape = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
        if not is_shape or (len(shape) == 3 and shape[2] in (3, 4)) or 0 in shape[1:]:
            raise ValueError(
                f"{held}; expected images [N, H, W, 3] or, for grayscale, [N, H, W]; transpose "
                "or reshape them and save them again with np.savez."
            )
        if dtype != np.uint8:
            raise ValueError(
                f"{held}; expected uint8; scale the values to 0..255, round them, and save them "
                "again with .astype(np.uint8)."
            )
        if shape[0] == 0:
            raise ValueError(f"{self.path}: holds no images (arr_0 has shape {list(shape)}).")

    def _read_member(self, name: str, read: Callable[[IO[bytes]], Any]) -> Any:
        """Return ``read(the stream of an array's file)``; raises ValueError if it is damaged."""
        info = self._members[name]
        try:
            if info.flag_bits & 1 or info.compress_type not in _METHODS:
                raise ValueError("it is encrypted, or compressed by a method other than deflate")
            with zipfile.ZipFile(self.path) as file, file.open(info) as stream:
                return read(stream)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f"{self.path}: {name} cannot be read ({error}); save or copy the file again."
            ) from None


def _array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Return shape, Fortran order, type and the header's length of an array in ``.npy`` format."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        header = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        header = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"version {version} of the .npy format is not for images")
    return *header, stream.tell()


def is_hidden(name: str) -> bool:
    """Tell whether a path has a part that systems hide or add by themselves."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def open_archive(path: str | os.PathLike) -> Archive:
    """Return the images of a folder, a zip or (by the ending ``.npz``) a sample archive.

    Raises ValueError if there is no such path, if it is none of these, or if it holds no images.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder.")
    if is_latent_folder(path):
        raise ValueError(f"{path}: holds latents, not images; give the images they were made of.")
    if path.is_dir():
        archive: Archive = FolderArchive(path)
    else:
        archive = (SampleArchive if path.suffix.lower() == ".npz" else ZipArchive)(path)
    if not len(archive):
        raise ValueError(f"{path}: holds no images (.png, .jpg, .webp, ...).")
    return archive
