"""Writes a training dataset from a source of images."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dnnlib.files import atomic_write
from dnnlib.progress import progress
from training.archive import Member
from training.images import decode_image, encode_png
from training.parallel import process_map
from training.sources import Source
from training.transforms import Size, apply_transform

_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # The same for every file, so that equal input gives equal bytes.
_NO_DATASET = (".tar", ".gz", ".tgz", ".7z", ".rar", ".png", ".jpg", ".jpeg", ".npz")


@dataclasses.dataclass(frozen=True)
class Summary:
    """What :func:`convert` wrote, left out (``name: reason``) and remarked."""

    num_images: int
    resolution: int
    img_channels: int
    num_classes: int
    skipped: tuple[str, ...]
    notes: tuple[str, ...]


def convert(
    source: Source,
    dest: str | os.PathLike,
    *,
    size: Size | None = None,
    transform: str | None = None,
    max_images: int | None = None,
    skip_broken: bool = False,
    num_workers: int | None = None,
) -> Summary:
    """Write the images of ``source`` to a zip or folder in the layout of docs/formats.md.

    The target appears whole or not at all, and equal sources give equal bytes. If any image is
    RGB, all become RGB.

    Args:
        dest: A name ending in .zip, or a folder that does not exist or is empty.
        size: Width and height of the result (before center-crop-wide adds its bars); without it
            every image must have one square size already.
        transform: One of TRANSFORMS; without it images must be square and are resized.
        max_images: Use only the first so many images of the source.
        skip_broken: Leave out images that cannot be read instead of failing.
        num_workers: Number of processes, by default one per core.

    Raises ValueError if images are broken (all of them are listed), if their sizes do not fit, if
    none is left, or if ``dest`` is taken.
    """
    dest = Path(dest)
    _check_dest(dest)
    num_images = min(source.num_images, max_images or source.num_images)
    if num_images == 0:
        raise ValueError(f"{source.name}: holds no images.")

    def convert_all(to_rgb: bool) -> Summary:
        convert_one = functools.partial(_convert_one, size=size, transform=transform, to_rgb=to_rgb)
        results = process_map(
            convert_one, map(source.item, range(num_images)), num_workers=num_workers
        )
        with (
            _open_target(dest) as write,
            contextlib.closing(results),
            progress(total=num_images, label=f"Converting {source.name}") as bar,
        ):
            writer = _DatasetWriter(source, write, size, skip_broken, mixed=to_rgb)
            for index, result in enumerate(results):
                writer.add(index, result)
                bar.update()
            return writer.finish()

    try:
        return convert_all(to_rgb=False)
    except _MixedChannels:
        return convert_all(to_rgb=True)


def _check_dest(dest: Path) -> None:
    if dest.suffix.lower() in _NO_DATASET:
        raise ValueError(f"--dest: got {dest}; accepted: a name ending in .zip, or a folder.")
    empty_folder = dest.is_dir() and dest.suffix.lower() != ".zip" and not any(dest.iterdir())
    if dest.exists() and not empty_folder:
        raise ValueError(f"--dest: {dest} exists already; delete it or choose another name.")


@dataclasses.dataclass(frozen=True)
class _Converted:
    """One converted image. Without ``png``: ``error`` says why, or else ``size`` is not square."""

    png: bytes | None = None
    size: Size = (0, 0)
    num_channels: int = 0
    error: str | None = None


def _convert_one(
    item: Member | np.ndarray, *, size: Size | None, transform: str | None, to_rgb: bool
) -> _Converted:
    """Return one image ready to be written. Runs in another process."""
    try:
        image = Image.fromarray(item) if isinstance(item, np.ndarray) else decode_image(item.read())
    except ValueError as error:
        return _Converted(error=str(error))
    if size is not None and (transform is not None or image.width == image.height):
        image = apply_transform(image, size, transform)
    if image.width != image.height:
        return _Converted(size=image.size)
    if to_rgb:
        image = image.convert("RGB")
    return _Converted(encode_png(image), image.size, 1 if image.mode == "L" else 3)


class _MixedChannels(Exception):  # noqa: N818
    """An RGB image came after grayscale images had been written."""


class _DatasetWriter:
    """Numbers, checks and writes converted images with their labels."""

    def __init__(
        self,
        source: Source,
        write: Callable[[str, bytes], None],
        size: Size | None,
        skip_broken: bool,
        mixed: bool,
    ) -> None:
        self._source = source
        self._write = write
        self._size = size
        self._skip_broken = skip_broken
        self._first: _Converted | None = None
        self._num_seen = 0
        self._num_written = 0
        self._mixed = mixed
        self._labels: list[tuple[str, int]] = []
        self._broken: list[str] = []

    def add(self, index: int, image: _Converted) -> None:
        """Write image ``index`` of the source, or note that it is broken."""
        self._num_seen += 1
        name = self._source.image_name(index)
        if image.error is not None:
            self._broken.append(f"{name}: {image.error}")
            return
        self._first = self._first or image
        self._check_size(name, image.size)
        if image.num_channels != self._first.num_channels:
            if self._first.num_channels == 1:
                raise _MixedChannels
            image = dataclasses.replace(image, png=_gray_to_rgb(image.png))
            self._mixed = True
        if self._broken and not self._skip_broken:
            return  # Only the list of broken images is of use now.
        file_name = f"{self._num_written // 1000:05d}/img{self._num_written:08d}.png"
        self._write(file_name, image.png)
        if self._source.labels is not None:
            self._labels.append((file_name, int(self._source.labels[index])))
        self._num_written += 1

    def _check_size(self, name: str, found: Size) -> None:
        width, height = found
        first_width, first_height = self._first.size
        if width != height:
            missing = "" if self._size else "--resolution=N and "
            raise ValueError(
                f"{name}: is {width}x{height}, not square; give {missing}--transform=center-crop."
            )
        if found != self._first.size:
            raise ValueError(
                f"{name}: is {width}x{height}, but images before it are {first_width}x"
                f"{first_height}; give --resolution=N to bring all to one size."
            )

    def finish(self) -> Summary:
        """Write ``dataset.json``; raises ValueError if images were broken or none is left."""
        source = self._source
        if self._broken and not self._skip_broken:
            raise ValueError(
                f"{source.name}: {len(self._broken)} of {self._num_seen} images cannot be used:\n  "
                + "\n  ".join(self._broken)
                + "\nNothing was written. Repair or remove them, or give --skip-broken."
            )
        if self._first is None:
            raise ValueError(
                f"{source.name}: no image is left, all {self._num_seen} are broken; the first: "
                f"{self._broken[0]}"
            )
        labelled = source.labels is not None
        class_names = list(source.class_names) if labelled else None
        metadata = dict(labels=self._labels if labelled else None, class_names=class_names)
        self._write("dataset.json", json.dumps(metadata, ensure_ascii=False).encode())
        return Summary(
            num_images=self._num_written,
            resolution=self._first.size[0],
            img_channels=self._first.num_channels,
            num_classes=len(class_names or ()),
            skipped=tuple(self._broken),
            notes=(*source.notes, *self._notes(class_names)),
        )

    def _notes(self, class_names: list[str] | None) -> Iterator[str]:
        if self._mixed:
            yield "The source mixes grayscale and RGB images: all became RGB."
        if class_names is not None:
            num_empty = len(class_names) - len({label for _, label in self._labels})
            if num_empty:
                yield f"{num_empty} of {len(class_names)} classes have no image."


def _gray_to_rgb(png: bytes) -> bytes:
    return encode_png(decode_image(png).convert("RGB"))


@contextlib.contextmanager
def _open_target(dest: Path) -> Iterator[Callable[[str, bytes], None]]:
    """Give a function that adds a file to a zip or folder, which appears when the block ends."""
    if dest.suffix.lower() == ".zip":
        with atomic_write(dest) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

            def write(name: str, data: bytes) -> None:
                info = zipfile.ZipInfo(name, _ZIP_TIME)
                info.external_attr = 0o644 << 16
                archive.writestr(info, data)

            yield write
        return
    dest.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", suffix=".tmp", dir=dest.parent))
    try:

        def write(name: str, data: bytes) -> None:
            path = temporary / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)

        yield write
        # mkdtemp creates the folder for its owner alone; give it the usual permissions instead.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        os.sync()
        os.rename(temporary, dest)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
