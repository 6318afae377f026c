"""Opens zips, folders, tars and sample archives of images, which many processes can read."""

import functools
import hashlib
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.images.decode import is_image_name
from data.images.identity import checksums, identity_of_files
from data.images.members import (
    ZIP_METHODS,
    Archive,
    Member,
    PackedArchive,
    holds_twice,
    is_hidden,
    is_needed,
    plain_name,
)
from data.images.samples import SampleArchive
from data.images.tars import TarArchive
from dnnlib import launcher
from dnnlib.addresses import is_address, name_of
from dnnlib.errors import refusal
from dnnlib.files import check_source
from dnnlib.remote.files import OpenFiles, location_of
from dnnlib.text import join_names

_told: set[Path | str] = set()


class ZipArchive(PackedArchive):
    """A zip, local or at an address, whose files are located by its central directory."""

    def __init__(self, path: Path | str) -> None:
        files = OpenFiles()
        try:
            with files.stream(path) as stream, zipfile.ZipFile(stream) as file:
                members = [info for info in file.infolist() if not info.is_dir()]
        except zipfile.BadZipFile:
            problem = "not a zip archive, or only part of one"
            remedy = "give a folder of images, a zip or an .npz of samples, or copy the file again"
            raise refusal(path, but=problem, remedy=remedy) from None
        infos = {plain_name(info.filename): info for info in members}
        if len(infos) < len(members):
            needed = list(filter(is_needed, (plain_name(info.filename) for info in members)))
            if len(set(needed)) < len(needed):
                raise refusal(path, but=holds_twice(needed), remedy="pack it again")
        lengths = {name: info.file_size for name, info in infos.items()}
        super().__init__(path, files, {name: _row(infos[name]) for name in infos}, lengths)
        for name in [*self.names, *self._others]:
            problem = ""
            if infos[name].flag_bits & 1:
                problem = "is encrypted"
            elif infos[name].compress_type not in ZIP_METHODS:
                problem = "is compressed by a method other than deflate"
            if problem:
                remedy = "extract the zip and give the folder"
                raise refusal(f"{path}/{name}", but=problem, remedy=remedy)


def _row(info: zipfile.ZipInfo) -> tuple[int, int, int, int]:
    return info.header_offset, info.compress_size, info.compress_type, info.CRC


class FolderArchive(Archive):
    """A folder, searched recursively; hidden files are left out, links to folders are followed.

    Attributes, in addition to those of :class:`Archive`:
        unreadable: ``PATH: cannot be read (REASON)`` for each folder that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unreadable: list[str] = []
        found: list[str] = []
        seen: set[str] = set()

        def note(error: OSError) -> None:
            self.unreadable.append(f"{error.filename}: cannot be read ({error.strerror})")

        for folder, folders, files in os.walk(path, onerror=note, followlinks=True):
            # A link to a folder further up would cause an endless walk.
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            prefix = f"{Path(folder).relative_to(path).as_posix()}/".removeprefix("./")
            found += [prefix + name for name in files if not is_hidden(name)]
        self.names = sorted(filter(is_image_name, found))
        self.others = sorted(name for name in found if not is_image_name(name))

    @functools.cached_property
    def num_bytes(self) -> int:
        return sum(os.stat(self.path / name).st_size for name in self.names)

    def member(self, index: int) -> Member:
        return Member(str(self.path / self.names[index]))

    def read_file(self, name: str) -> bytes | None:
        path = self.path / name
        return path.read_bytes() if path.is_file() else None

    def checksums(self) -> tuple[np.ndarray, np.ndarray]:
        return checksums(self.path, self.names)

    def fingerprint(self) -> str:
        metadata = self.read_file("dataset.json")
        return identity_of_files(self.names, *self.checksums(), metadata)

    def old_fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in self.names:
            stat = os.stat(self.path / name)
            digest.update(f"{name}\n{stat.st_size} {stat.st_mtime_ns}\n".encode())
        digest.update(self.read_file("dataset.json") or b"")
        return digest.hexdigest()


def left_out(archive: Archive) -> Counter[str]:
    """Return how many files of an archive are not read as images, by the reason."""
    found = Counter(
        Path(name).suffix.lower() or "without extension"
        for name in archive.others
        if name.rpartition("/")[2] != "dataset.json"
    )
    if num_unreadable := len(getattr(archive, "unreadable", [])):
        found["folder(s) that cannot be read"] = num_unreadable
    return found


def count_line(num_taken: int, left: Mapping[str, int]) -> str:
    """Return a sentence that says how many files were taken, and how many not, and why."""
    found = sorted(left.items(), key=lambda item: -item[1])
    why = ", ".join(f"{count} {reason}" for reason, count in found)
    return f"{num_taken} taken, {sum(left.values())} left out{f' ({why})' if why else ''}."


def open_archive(
    path: str | os.PathLike, *, skip_unreadable: bool = False, tell: bool = True
) -> Archive:
    """Return the images of a folder, a zip, a tar or (if it ends in ``.npz``) a sample archive.

    All but the folder may be at an address. With ``tell``, rank 0 prints once for each path how
    many files are left out, and why.

    Raises ValueError if the path does not exist, is none of these, or holds no images, and, without
    ``skip_unreadable``, if a folder inside it cannot be read.
    """
    path = location_of(path)
    archive = _open(path)
    unreadable = getattr(archive, "unreadable", [])
    if unreadable and not skip_unreadable:
        found = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
        raise ValueError(f"{unreadable[0]}{found}; change its permissions, or move it away.")
    if not len(archive):
        is_folder = not is_address(path) and path.is_dir()
        others = sorted(file.name for file in path.glob("[!.]*")) if is_folder else []
        found = f", but {join_names(others[:3])}" if others else ""
        raise ValueError(f"{path}: holds no images (.png, .jpg, .webp, ...){found}.")
    if tell and path not in _told and (left := left_out(archive)):
        _told.add(path)
        if launcher.number("RANK") == 0:
            print(f"{path}: {count_line(len(archive), left)}", file=sys.stderr, flush=True)
    return archive


def _open(path: Path | str) -> Archive:
    name = name_of(path).lower()
    kinds = {".npz": SampleArchive, ".tar": TarArchive, ".zip": ZipArchive}
    kind = next((kinds[end] for end in kinds if name.endswith(end)), None)
    if is_address(path):
        if kind is None:
            but = (
                "images at an address must be in one file, because a folder cannot be listed there"
            )
            raise refusal(path, but=but, accepted="a .zip, a .tar with its index, an .npz")
        return kind(path)
    check_source(path)
    return (FolderArchive if path.is_dir() else kind or ZipArchive)(path)
