"""Tars of images, each with an index file beside it that gives the positions of its files."""

import json
import tarfile
import zlib
from pathlib import Path
from typing import Any, TypedDict

from data.images.decode import is_image_name
from data.images.members import BARE, PackedArchive, holds_twice, is_needed, plain_name
from dnnlib.addresses import AddressError, is_address, without_query
from dnnlib.errors import refusal
from dnnlib.files import atomic_write, check_source, check_target
from dnnlib.progress import progress
from dnnlib.remote.files import OpenFiles, read_all
from dnnlib.typed import JsonFormat, typed

SUFFIX = ".index.json"
_FORMAT = "setdiffit-tar-index"
_VERSION = 1
_MAX_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 20
_AGAIN = "make it again with dataset_tool.py index"

_COLUMNS = dict(name=list[str], offset=list[int], size=list[int], crc32=list[int])
_Index = TypedDict("_Index", dict(num_bytes=int, **_COLUMNS))


class TarArchive(PackedArchive):
    """A tar, local or at an address, with its index beside it (``dataset_tool.py index``).

    Raises ValueError if there is no index, or if it belongs to another tar.
    """

    def __init__(self, path: Path | str) -> None:
        if not is_address(path):
            check_source(path, folder=False)
        files, file = OpenFiles(), index_of(path)
        index = _read_index(file, path)
        rows = zip(index["offset"], index["size"], index["crc32"], strict=True)
        places = {
            name: (offset, size, BARE, crc)
            for name, (offset, size, crc) in zip(index["name"], rows, strict=True)
        }
        super().__init__(path, files, places, {name: places[name][1] for name in places})
        with files.stream(path) as stream:
            num_bytes = stream.seek(0, 2)
        if num_bytes != index["num_bytes"]:
            but = f"is the index of a tar of {index['num_bytes']} bytes, not of {num_bytes}"
            raise refusal(file, but=but, remedy=_AGAIN)


def index_of(path: Path | str) -> Path | str:
    """Return the path or address of a tar's index, which lies beside the tar."""
    if not is_address(path):
        return path.with_name(path.name + SUFFIX)
    base = without_query(path)
    return base + SUFFIX + path[len(base) :]


def write_index(path: Path) -> tuple[Path, int]:
    """Write the index of a tar beside it, atomically; return its path and the number of images.

    Raises ValueError if the file is not a tar, is compressed or damaged, or holds a name twice or
    no images.
    """
    check_source(path, folder=False)
    check_target("TAR", index_of(path), overwrite=True)  # Before the long read.
    columns: dict[str, list] = {name: [] for name in _COLUMNS}
    num_bytes = path.stat().st_size
    shown = dict(total=num_bytes, label=f"Reading {path.name}", unit="B")
    try:
        with tarfile.open(path, "r:") as tar, progress(**shown) as bar:
            for info in tar:
                name = plain_name(info.name)
                if info.isfile() and is_needed(name):
                    row = name, info.offset_data, info.size, _crc(tar, info)
                    for column, value in zip(columns.values(), row, strict=True):
                        column.append(value)
                bar.update(tar.offset - bar.n)
    except (tarfile.TarError, EOFError) as error:
        remedy = "pack it again, without compression"
        raise refusal(path, but=f"cannot be read as a tar ({error})", remedy=remedy) from None
    if len(set(columns["name"])) < len(columns["name"]):
        raise refusal(path, but=holds_twice(columns["name"]), remedy="pack it again")
    num_images = sum(map(is_image_name, columns["name"]))
    if not num_images:
        raise ValueError(f"{path}: holds no images (.png, .jpg, .webp, ...).")
    written = dict(format=_FORMAT, version=_VERSION, num_bytes=num_bytes, **columns)
    with atomic_write(index_of(path), "w", encoding="utf-8") as file:
        json.dump(written, file)
    return index_of(path), num_images


def _crc(tar: tarfile.TarFile, info: tarfile.TarInfo) -> int:
    crc, stream = 0, tar.extractfile(info)
    while chunk := stream.read(_CHUNK_BYTES):
        crc = zlib.crc32(chunk, crc)
    return crc


def _read_index(file: Path | str, path: Path | str) -> Any:
    try:
        content = read_all(file, _MAX_BYTES)
    except (AddressError, FileNotFoundError) as error:
        reason = "" if isinstance(error, FileNotFoundError) else f" ({error})"
        but = f"a tar is read by the index beside it, and there is none{reason}"
        raise refusal(path, but=but, remedy=f"make {SUFFIX} with dataset_tool.py index") from None
    return JsonFormat(_FORMAT, _VERSION, "dataset_tool.py index", _AGAIN).parse(
        content, file, _checked
    )


def _checked(values: dict[str, Any]) -> Any:
    index = typed(_Index, values)
    if len({len(index[name]) for name in _COLUMNS}) > 1:
        raise ValueError("its columns differ in length")
    if len(set(index["name"])) < len(index["name"]):
        raise ValueError("it names a file twice")
    for offset, size in zip(index["offset"], index["size"], strict=True):
        if min(offset, size) < 0 or offset + size > index["num_bytes"]:
            raise ValueError("a file lies outside its tar")
    return index
