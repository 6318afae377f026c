"""Sample archives: the images of an .npz in ADM's layout, read one by one."""

import functools
import hashlib
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.images.identity import VERSION
from data.images.members import LOCAL_HEADER, ZIP_METHODS, Archive, local_header_length
from dnnlib.addresses import AddressError, name_of
from dnnlib.errors import refusal
from dnnlib.progress import progress
from dnnlib.remote.files import OpenFiles

_AGAIN = "save or copy the file again"


class SampleArchive(Archive):
    """The images of an ``.npz`` as ADM writes samples and reference batches (docs/formats.md).

    ``arr_0`` holds them, uint8 [N, H, W, 3], [N, H, W, 1] or [N, H, W]; ``arr_1``, if there is
    one, their class indices, integers [N], and ``class_names`` the names of the classes. Each image
    is read by itself from its position in the file, unless ``arr_0`` is compressed or in Fortran
    order: every process then reads the whole array into memory. Nothing is ever unpickled.

    Raises ValueError if the file is damaged or holds anything else.
    """

    image_size: tuple[int, int]  # Height and width of every image.
    num_array_bytes: int  # Sum of the sizes of the arrays, before compression.

    def __init__(self, path: Path | str) -> None:
        self.path, self._open = path, OpenFiles()
        self.names = []
        try:
            with self._open.stream(path) as stream, zipfile.ZipFile(stream) as file:
                names = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
        except zipfile.BadZipFile:
            problem = "not an .npz, or only part of one; copy the file again"
            raise refusal(path, but=problem) from None
        if "arr_0" not in names:
            hint = " (statistics such as mu and sigma are no images)" if "mu" in names else ""
            remedy = "save the images with np.savez(path, images), uint8 [N, H, W, 3]"
            raise refusal(path, but=f"has no array arr_0{hint}", remedy=remedy)
        self._members = {n: names[n] for n in ("arr_0", "arr_1", "class_names") if n in names}
        self.num_bytes = sum(info.compress_size for info in self._members.values())
        self.num_array_bytes = sum(info.file_size for info in self._members.values())
        shape, fortran_order, dtype, header_length = self._read_member("arr_0", _array_header)
        self._check_images(shape, dtype)
        info = self._members["arr_0"]
        self._num_images = shape[0]
        self.image_size = shape[1:3]
        self._pixels_shape = shape[1:3] if shape[3:] == (1,) else shape[1:]
        num_bytes = info.file_size - header_length
        if num_bytes != math.prod(shape):
            needed = f"but its shape {list(shape)} needs {math.prod(shape)}"
            raise refusal(path, but=f"arr_0 has {num_bytes} bytes, {needed}", remedy=_AGAIN)
        # Offset of the first image; -1 if the array must be read as a whole.
        self._start = -1
        if info.compress_type == zipfile.ZIP_STORED and not fortran_order:
            local = self._open.pread(path, LOCAL_HEADER.size, info.header_offset)
            self._start = info.header_offset + local_header_length(local) + header_length

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_whole"}

    def __len__(self) -> int:
        return self._num_images

    def label(self, index: int) -> str:
        return f"{self.path}, image {index}"

    def pixels(self, index: int, *, exact: bool = False) -> np.ndarray:
        if self._start < 0:
            return self._whole[index]
        size = math.prod(self._pixels_shape)
        try:
            data = self._open.pread(self.path, size, self._start + index * size)
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from None
        if len(data) < size:
            raise ValueError("the file ends in the middle of this image")
        return np.frombuffer(data, np.uint8).reshape(self._pixels_shape)

    @functools.cached_property
    def _whole(self) -> np.ndarray:
        return self.read_array("arr_0").reshape(self._num_images, *self._pixels_shape)

    def prefetch(self, indices: np.ndarray) -> None:
        if self._start >= 0:
            size = math.prod(self._pixels_shape)
            self._open(self.path).prefetch(self._start + indices * size, size)

    def read_file(self, name: str) -> bytes | None:
        return None

    def fingerprint(self) -> str:
        # The identity rests on the checksums stored in the file, so the arrays must match them.
        label = f"Checksums of {name_of(self.path)}"
        look = dict(label=label, unit="B", transient=True)
        with progress(total=self.num_array_bytes, **look) as bar:
            for problem in self.check(bar.update):
                raise ValueError(problem)
        return VERSION + self.old_fingerprint()

    def checksums(self) -> tuple[np.ndarray, np.ndarray]:
        # Of the pixels, because the images of an array are not files.
        every = range(len(self))
        crcs = [zlib.crc32(np.ascontiguousarray(self.pixels(index))) for index in every]
        return np.full(len(self), math.prod(self._pixels_shape)), np.array(crcs)

    def old_fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, info in self._members.items():
            digest.update(f"{name}\n{info.file_size} {info.CRC}\n".encode())
        return digest.hexdigest()

    def read_array(self, name: str) -> np.ndarray | None:
        """Return an array by its name, as it is stored, or None if there is none."""
        if name not in self._members:
            return None
        return self._read_member(name, np.lib.format.read_array)  # Refuses to unpickle.

    def check(self, on_bytes: Callable[[int], None]) -> Iterator[str]:
        """Read all arrays, with counts to ``on_bytes``; yield a sentence for each damaged one."""

        def read_all(stream: IO[bytes]) -> None:
            while data := stream.read(1 << 20):
                on_bytes(len(data))

        for name in self._members:
            try:
                self._read_member(name, read_all)
            except ValueError as error:
                yield str(error)

    def _check_images(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        problem = ""
        # [H, W, 3] is taken for a single image in colour, not for many that are 3 pixels wide.
        is_shape = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
        if dtype.hasobject:
            problem = ", Python objects, which are never unpickled; save one uint8 array"
        elif shape[3:] in ((2,), (4,)):
            problem = ", with an alpha channel it seems; composite the images on a background or "
            problem += "drop that channel, and save them as [N, H, W, 3]"
        elif not is_shape or (len(shape) == 3 and shape[2] in (3, 4)) or 0 in shape[1:]:
            problem = "; expected images [N, H, W, 3] or, for grayscale, [N, H, W]; transpose or "
            problem += "reshape them and save them again with np.savez"
        elif dtype != np.uint8:
            problem = "; expected uint8; scale the values to 0..255, round them, and save them "
            problem += "again with .astype(np.uint8)"
        elif shape[0] == 0:
            problem = ": it holds no images"
        if problem:
            held = f"arr_0 holds {dtype} of shape {list(shape)}"
            raise refusal(self.path, but=held + problem)

    def _read_member(self, name: str, read: Callable[[IO[bytes]], Any]) -> Any:
        """Return ``read(stream)`` for the stream of an array; ValueError if that is damaged."""
        info = self._members[name]
        try:
            if info.flag_bits & 1 or info.compress_type not in ZIP_METHODS:
                raise ValueError("it is encrypted, or compressed by a method other than deflate")
            with (
                self._open.stream(self.path) as whole,
                zipfile.ZipFile(whole) as file,
                file.open(info) as stream,
            ):
                return read(stream)
        except AddressError:
            raise
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            problem = f"{name} cannot be read ({error})"
            raise refusal(self.path, but=problem, remedy=_AGAIN) from None


def _array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Return shape, Fortran order, dtype and header length in bytes of an ``.npy`` stream."""
    version = np.lib.format.read_magic(stream)
    read_header = getattr(np.lib.format, "read_array_header_{}_{}".format(*version), None)
    if read_header is None:
        raise ValueError(f"version {version} of the .npy format is not for images")
    return *read_header(stream), stream.tell()
