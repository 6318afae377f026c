"""Writes a training dataset or a sample archive from a source of images."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from data.convert.source import Item, Source, broken_images, image_of
from data.images.archive import count_line
from data.images.decode import decode_image, encode_png
from data.images.transforms import Size, apply_transform
from dnnlib.errors import refusal
from dnnlib.files import atomic_write, check_target
from dnnlib.parallel import process_map
from dnnlib.progress import progress

_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # One time for all files, so that equal input gives equal bytes.
_NO_DATASET = (".tar", ".gz", ".tgz", ".7z", ".rar", ".png", ".jpg", ".jpeg", ".npy")


@dataclasses.dataclass(frozen=True)
class Summary:
    """What :func:`convert_images` wrote, skipped (``name: reason``) and noted."""

    num_images: int
    resolution: int
    img_channels: int
    num_classes: int
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    left_out: Mapping[str, int]

    @property
    def count_line(self) -> str:
        """A sentence that says how many files were taken, and how many not, and why."""
        return count_line(self.num_images, self.left_out)


def convert_images(
    source: Source,
    dest: str | os.PathLike,
    *,
    size: Size | None = None,
    transform: str | None = None,
    max_images: int | None = None,
    skip_broken: bool = False,
    overwrite: bool = False,
    num_workers: int | None = None,
) -> Summary:
    """Write the images of ``source`` to a zip, folder or .npz in the layout of docs/formats.md.

    The target appears whole or not at all, and equal sources give equal bytes. If any image is
    RGB, all become RGB; in an .npz all do in any case.

    Args:
        dest: A name ending in .zip or .npz, or a folder that does not exist or is empty.
        size: Width and height of the result (before center-crop-wide adds its bars); None requires
            all images to have the same square size already.
        transform: One of TRANSFORMS; None requires square images, and resizes them.
        max_images: Use only this many images of the source, the first ones.
        skip_broken: Leave out images that cannot be read instead of failing.
        overwrite: Replace an existing file ``dest``.
        num_workers: Number of processes; by default one per core.

    Raises ValueError if images are broken (all of them are listed), if their sizes do not fit, if
    none is left, or if ``dest`` exists already.
    """
    dest = Path(dest)
    kind = dest.suffix.lower()
    _check_dest(dest, kind, overwrite)
    num_images = min(source.num_images, max_images or source.num_images)
    if num_images == 0:
        raise ValueError(f"{source.name}: holds no images.")
    encode = Image.Image.tobytes if kind == ".npz" else encode_png
    settings = dict(size=size, transform=transform, by_area=source.by_area, encode=encode)
    for to_rgb in (kind == ".npz", True):
        convert_one = functools.partial(_convert_one, to_rgb=to_rgb, **settings)
        items = map(source.item, range(num_images))
        results = process_map(convert_one, items, num_workers=num_workers)
        with (
            contextlib.suppress(_MixedChannels),
            _open_target(dest) as target,
            contextlib.closing(results),
            progress(total=num_images, label=f"Converting {source.name}") as bar,
        ):
            writer = _DatasetWriter(source, target, size, skip_broken, to_rgb)
            for index, result in enumerate(results):
                writer.add(index, result)
                bar.update()
            return writer.finish()
    raise AssertionError


def _check_dest(dest: Path, kind: str, overwrite: bool) -> None:
    if kind in _NO_DATASET:
        raise refusal("--dest", dest, accepted="a name ending in .zip or .npz, or a folder")
    is_folder = kind not in (".zip", ".npz")
    is_empty = is_folder and dest.is_dir() and not any(dest.iterdir())
    is_free = is_empty or (overwrite and dest.is_file())
    if dest.exists() and not is_free:
        remedy = "" if dest.is_dir() else ", or replace it with --overwrite"
        raise ValueError(f"--dest: {dest} exists already; choose another name{remedy}.")
    check_target("--dest", dest, is_folder=is_folder)


@dataclasses.dataclass(frozen=True)
class _Converted:
    """One converted image; without ``data`` if there is an ``error`` or ``size`` is not square.

    ``num_channels`` is that of the image in the source.
    """

    data: bytes | None = None
    size: Size = (0, 0)
    num_channels: int = 0
    error: str | None = None


def _convert_one(
    item: Item,
    *,
    size: Size | None,
    transform: str | None,
    by_area: bool,
    to_rgb: bool,
    encode: Callable[[Image.Image], bytes],
) -> _Converted:
    """Return one image, encoded and ready to be written. Runs in another process."""
    try:
        image = image_of(item)
    except ValueError as error:
        return _Converted(error=str(error))
    if size is not None and (transform is not None or image.width == image.height):
        image = apply_transform(image, size, transform, by_area)
    if image.width != image.height:
        return _Converted(size=image.size)
    num_channels = 1 if image.mode == "L" else 3
    if to_rgb:
        image = image.convert("RGB")
    return _Converted(encode(image), image.size, num_channels)


class _MixedChannels(Exception):  # noqa: N818
    """Raised when an RGB image follows grayscale images that have been written already."""


@dataclasses.dataclass
class _DatasetWriter:
    """Checks converted images, numbers them, and writes them with their labels."""

    source: Source
    target: "_FilesTarget | _SamplesTarget"
    size: Size | None
    skip_broken: bool
    to_rgb: bool
    first: _Converted | None = None
    num_seen: int = 0
    num_written: int = 0
    channels_seen: set[int] = dataclasses.field(default_factory=set)
    labels: list[int] = dataclasses.field(default_factory=list)
    broken: list[str] = dataclasses.field(default_factory=list)

    def add(self, index: int, image: _Converted) -> None:
        """Write image ``index`` of the source, or note that it is broken."""
        self.num_seen += 1
        name = self.source.image_name(index)
        if image.error is not None:
            self.broken.append(f"{name}: {image.error}")
            return
        self.first = self.first or image
        self._check_size(name, image.size)
        self.channels_seen.add(image.num_channels)
        if not self.to_rgb and image.num_channels != self.first.num_channels:
            if self.first.num_channels == 1:
                raise _MixedChannels
            rgb = decode_image(image.data).convert("RGB")
            image = dataclasses.replace(image, data=encode_png(rgb))
        if self.broken and not self.skip_broken:
            return  # The conversion will fail; only the list of broken images matters.
        self.target.add(self.num_written, image)
        if self.source.labels is not None:
            self.labels.append(int(self.source.labels[index]))
        self.num_written += 1

    def _check_size(self, name: str, found: Size) -> None:
        problem, remedy = f"is {found[0]}x{found[1]}", "--resolution=N"
        if found[0] != found[1]:
            remedy = f"{'' if self.size else f'{remedy} and '}--transform=center-crop"
            raise refusal(name, but=f"{problem}, not square", remedy=f"give {remedy}")
        if found != self.first.size:
            problem += ", but images before it are {}x{}".format(*self.first.size)
            raise refusal(name, but=problem, remedy=f"give {remedy} to bring all to one size")

    def finish(self) -> Summary:
        """Write the labels, return a summary; ValueError if images were broken or none is left."""
        source = self.source
        if self.broken and not self.skip_broken:
            raise broken_images(source.name, self.broken, self.num_seen)
        if self.first is None:
            problem = f"no image is left, all {self.num_seen} are broken; the first"
            raise ValueError(f"{source.name}: {problem}: {self.broken[0]}")
        labelled = source.labels is not None
        self.target.finish(source, self.labels if labelled else None)
        channels = 3 if self.to_rgb else self.first.num_channels
        num_classes = len(source.class_names) if labelled else 0
        written = (self.num_written, self.first.size[0], channels, num_classes)
        left_out = dict(source.left_out)
        beyond = source.num_images - self.num_seen
        for reason, count in (("broken", len(self.broken)), ("beyond --max-images", beyond)):
            if count:
                left_out[reason] = count
        notes = (*source.notes, *self._notes())
        return Summary(*written, tuple(self.broken), notes, left_out)

    def _notes(self) -> Iterator[str]:
        if len(self.channels_seen) > 1:
            yield "The source mixes grayscale and RGB images: all became RGB."
        elif self.to_rgb and 1 in self.channels_seen:
            yield "Grayscale images became RGB with equal channels, as sample archives require."
        num_classes = 0 if self.source.labels is None else len(self.source.class_names)
        num_empty = num_classes - len(set(self.labels))
        if num_empty:
            yield f"{num_empty} of {num_classes} classes have no image."
        if self.source.class_splits and not self.target.keeps_splits:
            yield "The split of the classes is left out, because a sample archive cannot store it."


class _FilesTarget:
    """A zip or folder of PNGs with a ``dataset.json``; ``write(name, data)`` adds a file."""

    keeps_splits = True

    def __init__(self, write: Callable[[str, bytes], None]) -> None:
        self._write = write
        self._names: list[str] = []

    def add(self, number: int, image: _Converted) -> None:
        self._names.append(f"{number // 1000:05d}/img{number:08d}.png")
        self._write(self._names[-1], image.data)

    def finish(self, source: Source, labels: list[int] | None) -> None:
        pairs = None if labels is None else list(zip(self._names, labels, strict=True))
        class_names = None if labels is None else list(source.class_names)
        metadata = dict(labels=pairs, class_names=class_names)
        if source.class_splits is not None:
            splits = source.class_splits.items()
            metadata["class_splits"] = {name: list(part) for name, part in splits}
        self._write("dataset.json", json.dumps(metadata, ensure_ascii=False).encode())


class _SamplesTarget:
    """An uncompressed ``.npz`` of RGB images, as ADM's evaluator reads them.

    The pixels are collected in the file ``pixels``, because the header needs their number.
    """

    keeps_splits = False

    def __init__(self, archive: zipfile.ZipFile, pixels: IO[bytes]) -> None:
        self._archive, self._pixels = archive, pixels

    def add(self, number: int, image: _Converted) -> None:
        self._shape = (number + 1, image.size[1], image.size[0], 3)
        self._pixels.write(image.data)

    def finish(self, source: Source, labels: list[int] | None) -> None:
        self._pixels.seek(0)
        with self._open_array("arr_0") as file:
            header = dict(descr="|u1", fortran_order=False, shape=self._shape)
            np.lib.format.write_array_header_1_0(file, header)
            shutil.copyfileobj(self._pixels, file)
        if labels is not None:
            names = np.array(list(source.class_names))
            for name, array in (("arr_1", np.array(labels, np.int64)), ("class_names", names)):
                with self._open_array(name) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)

    def _open_array(self, name: str) -> IO[bytes]:
        return self._archive.open(_zip_info(f"{name}.npy"), "w", force_zip64=True)


def _zip_info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _ZIP_TIME)
    info.external_attr = 0o644 << 16
    return info


@contextlib.contextmanager
def _open_target(dest: Path) -> Iterator[_FilesTarget | _SamplesTarget]:
    """Yield a target to write to; it appears as ``dest`` when the block ends without an error."""
    hidden = dict(prefix=f".{dest.name}.", suffix=".tmp", dir=dest.parent)
    if dest.suffix.lower() in (".zip", ".npz"):
        with atomic_write(dest) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            if dest.suffix.lower() == ".zip":
                yield _FilesTarget(lambda name, data: archive.writestr(_zip_info(name), data))
            else:
                with tempfile.TemporaryFile(**hidden) as pixels:
                    yield _SamplesTarget(archive, pixels)
        return
    dest = dest.resolve()  # Keeps a link to an empty folder a link.
    in_place = dest.is_dir() and not _can_be_replaced(dest)
    dest.parent.mkdir(parents=True, exist_ok=True)
    hidden["dir"] = dest if in_place else dest.parent
    with tempfile.TemporaryDirectory(**hidden) as temporary:
        # Only its owner may enter the temporary folder; one inside it gets the usual permissions.
        folder = Path(temporary, "dataset")
        folder.mkdir()

        def write(name: str, data: bytes) -> None:
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            try:
                path.write_bytes(data)
            except OSError as error:
                error.filename = str(dest)  # Instead of the hidden folder.
                raise

        yield _FilesTarget(write)
        os.sync()
        if not in_place:
            os.rename(folder, dest)
            return
        # dataset.json comes last: without it, the folder is no finished dataset.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "dataset.json"):
            os.rename(path, dest / path.name)


def _can_be_replaced(folder: Path) -> bool:
    """Return whether an empty folder can be replaced by renaming another folder.

    A mount point cannot be replaced, and the current folder should not be.
    """
    if folder == Path.cwd():
        return False
    try:
        # The folder that holds a mount point may not even be writable, as often in containers.
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            probe = Path(temporary, "probe")
            probe.mkdir(mode=stat.S_IMODE(folder.stat().st_mode))
            os.rename(probe, folder)
    except OSError:
        return False
    return True
