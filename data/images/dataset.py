"""Datasets of images with class labels, as training and metrics read them from any archive."""

import copy
import functools
import hashlib
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import Dataset

from data.images.archive import open_archive
from data.images.config import DatasetConfig
from data.images.decode import ImageError, UnfitImageError
from data.images.identity import VERSION
from data.images.labels import read_class_splits, read_labels
from data.preview import PREVIEW_COLUMNS, Preview, evenly_spaced, rows_of
from data.split import check_split, is_held_out
from dnnlib.addresses import AddressError, is_address, name_of
from dnnlib.errors import refusal
from dnnlib.remote.files import location_of
from torch_utils.pictures import class_titles

Cond = dict[str, torch.Tensor]


def open_dataset(
    config: DatasetConfig, *, use_labels: bool | None = False, **settings: Any
) -> "ImageDataset":
    """Return the dataset of a configuration, without the images that it holds out for validation.

    Labels are delivered if ``config.cond`` is set, and otherwise as ``use_labels`` says. The other
    ``settings`` are arguments of :class:`ImageDataset`. Raises ValueError if the configuration
    names no data, or data that do not fit.
    """
    if config.data is None:
        raise ValueError("--data is missing: give a zip or folder made by dataset_tool.py convert.")
    share = config.validation_share
    settings |= dict(max_size=config.max_size, cache=config.cache and not share)
    dataset = ImageDataset(config.data, use_labels=config.cond or use_labels, **settings)
    if share:
        dataset = dataset.hold_out(share)
        if config.cache:
            dataset.keep_decoded()
    return dataset


def open_images(path: str | os.PathLike, *, use_labels: bool | None = None) -> "ImageDataset":
    """Return the images of a folder, zip, tar or ``.npz`` sample archive with unchanged pixels.

    A score must not depend on silent conversions. Images with transparency, with more than 8 bits
    per channel, or in colours other than grayscale, RGB and palettes are therefore refused.
    """
    return ImageDataset(path, use_labels=use_labels, exact=True)


class LabelledDataset(Dataset):
    """Base class of datasets of images or their latents, with optional class labels.

    A subclass sets ``path`` before it calls ``__init__``, and reads batches in ``__getitems__``.
    Raises ValueError if ``max_size`` exceeds the number of images.
    """

    path: Path | str  # Path or address of the data.
    name: str  # Short name of the data for descriptions.
    resolution: int  # Height and width of every image.
    img_channels: int
    labels: np.ndarray | None = None  # Class indices, int64 [num_images]; None if not delivered.
    class_names: list[str]  # Includes classes without images; empty without labels.
    remote_bytes = 0.0  # Average number of bytes to download per item; 0 for local data.
    validation_part: Self | None = None  # The images that :meth:`hold_out` held out of these.

    def __init__(self, num_stored: int, max_size: int | None, seed: int) -> None:
        if (max_size or 0) > num_stored:
            but = f"{self.path} holds {num_stored} images"
            raise refusal("--max-size", max_size, but=but, remedy="leave it out to take all")
        self.class_names = []
        self._num_stored = num_stored
        self._indices = np.arange(num_stored)
        if max_size is not None and max_size < num_stored:
            order = np.random.default_rng(seed % 2**64).permutation(num_stored)
            self._indices = np.sort(order[:max_size])

    @property
    def num_images(self) -> int:
        """Number of images in use, after ``max_size``, not counting mirror images."""
        return len(self._indices)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def class_counts(self) -> list[int]:
        """Number of images of each class; empty without labels."""
        labels = [] if self.labels is None else self.labels
        return np.bincount(labels, minlength=self.num_classes).tolist()

    def subset(self, rows: Sequence[int] | np.ndarray) -> Self:
        """Return a dataset of the images ``rows``, in the order given, with the same classes."""
        rows = np.asarray(rows, np.int64)
        part = copy.copy(self)
        part.__dict__.pop("content_hash", None)
        part._indices = self._indices[rows]
        if self.labels is not None:
            part.labels = self.labels[rows]
        return part

    def held_out_rows(self, share: float) -> np.ndarray:
        """Return which images are held out of training, bool [num_images]; see data/split.py.

        ``share`` is the share to hold out. Raises ValueError if that selects none or all of them.
        """
        held_out = is_held_out(*(column[self._indices] for column in self._checksums()), share)
        check_split(held_out, share, f"the {self.num_images} images of {self.name}")
        return held_out

    def hold_out(self, share: float) -> Self:
        """Return the dataset to train on; its ``validation_part`` is the ``share`` held out."""
        held_out = self.held_out_rows(share)
        part = self.subset(np.flatnonzero(~held_out))
        part.validation_part = self.subset(np.flatnonzero(held_out))
        return part

    def _checksums(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the length in bytes and the CRC-32 of each stored image, integers [num_stored]."""
        raise NotImplementedError

    def summary(self) -> dict[str, Any] | None:
        """Return None: a snapshot keeps only the sizes, counts and names of such data."""

    def prefetch(self, indices: Sequence[int]) -> None:
        """Start fetching the data of some items in the background, if they are remote."""
        raise NotImplementedError

    def preview(self, num: int) -> Preview:
        """Return up to ``num`` items as they are stored, in rows of up to 8.

        They are spread evenly over the data, in the order of their classes if they are labelled.
        """
        classes = np.zeros(self.num_images, np.int64) if self.labels is None else self.labels
        order = np.argsort(classes, kind="stable")[evenly_spaced(num, self.num_images)]
        batch, _ = self.__getitems__(order.tolist())
        names = [self.class_names[label] for label in classes[order]] if self.class_names else []
        return Preview(rows_of(batch), class_titles(names, PREVIEW_COLUMNS))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Cond]:
        images, cond = self.__getitems__([index])
        return images[0], {name: values[0] for name, values in cond.items()}

    def _with_labels(self, images: torch.Tensor, indices: np.ndarray) -> tuple[torch.Tensor, Cond]:
        """Return ``images`` with the labels, if any, of the items ``indices``."""
        if self.labels is None:
            return images, {}
        return images, {"label": torch.from_numpy(self.labels[indices])}

    def is_same_as(self, content_hash: str) -> bool:
        """Return whether an identity is that of the data, by the rule of the identity's version."""
        return content_hash == self.content_hash

    def _subset_hash(self, content: str) -> str:
        """Return a hex digest of the identity of all images, ``content``, and the subset in use."""
        digest = hashlib.sha256(content.encode())
        if self.num_images < self._num_stored:
            digest.update(self._indices.astype("<i8").tobytes())
        return digest.hexdigest()


class ImageDataset(LabelledDataset):
    """Square images of one size; item ``i`` is ``(uint8 [C, H, W], cond)``.

    ``cond`` is ``{"label": int64 []}`` if labels are delivered, and empty otherwise. Any number of
    processes and threads may read at once, including from copies made by fork or pickle.

    Args:
        path: Zip, tar or folder, with any labels in its ``dataset.json``, or ``.npz`` sample
            archive (see docs/formats.md). All but the folder may be at an address.
        resolution: Required height and width; None accepts any.
        channels: Required number of channels, 1 or 3; None accepts either.
        use_labels: Deliver class labels: True requires them, None delivers them if there are any.
        exact: Refuse images whose pixels decoding would change, such as transparent ones.
        max_size, seed: Use a random subset of this many images, in their stored order.
        cache: Keep decoded images in shared memory from their first use on.

    Attributes, in addition to those of :class:`LabelledDataset`:
        archive: The archive that the images are read from.
        class_splits: Class indices of each split that the data define; empty if they define none.

    Raises ValueError, one sentence that names the file, for data that do not fit. Reading a damaged
    image, or one that differs from the first in size or channels, raises ImageError (a ValueError).
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        resolution: int | None = None,
        channels: int | None = None,
        use_labels: bool | None = False,
        exact: bool = False,
        max_size: int | None = None,
        seed: int = 0,
        cache: bool = False,
    ) -> None:
        self.path = location_of(path)
        self.name = re.sub(r"\.(zip|npz|tar)$", "", name_of(path))
        self._exact = exact
        self.archive = open_archive(path)
        super().__init__(len(self.archive), max_size, seed)
        if is_address(path):
            self.remote_bytes = self.archive.num_bytes / len(self.archive)

        # The first image stands for all; the others are compared with it when they are read.
        self._pixels_shape = self._decode(0).shape
        self.resolution = self._pixels_shape[1]
        self.img_channels = 1 if len(self._pixels_shape) == 2 else self._pixels_shape[2]
        self._check_first_image(resolution, channels)
        self.class_splits: dict[str, tuple[int, ...]] = {}
        if use_labels is not False:
            found = read_labels(self.archive)
            if found is not None:
                labels, self.class_names = found
                self.labels = labels[self._indices]
                self.class_splits = read_class_splits(self.archive, len(self.class_names))
            elif use_labels:
                problem = "has no class labels (in dataset.json, or arr_1 of an .npz), which --cond"
                remedy = "which takes them from folder names, or train with --cond=False"
                raise refusal(
                    self.path, but=f"{problem} needs", remedy=f"{self._convert()}, {remedy}"
                )
        self._cache = None
        if cache:
            self.keep_decoded()

    def keep_decoded(self) -> None:
        """Keep decoded images in shared memory from now on, each from its first use."""
        shape = (len(self), self.img_channels, self.resolution, self.resolution)
        self._cache = SharedCache(shape, self.path)

    def _convert(self, options: str = "") -> str:
        """Return the remedy for data that do not fit: a command that converts them."""
        source, action = shlex.quote(str(self.path)), "convert it"
        if is_address(self.path) or str(self.path).endswith(".tar"):  # convert reads neither.
            source, action = "FOLDER", "unpack it into a folder and convert that"
        command = f"dataset_tool.py convert --source={source} --dest=converted.zip {options}"
        return f"{action} with python {command}".rstrip()

    def _check_first_image(self, resolution: int | None, channels: int | None) -> None:
        height, width = self._pixels_shape[:2]
        problem = f"is {width}x{height}"
        if height != width:
            problem += ", but training and scores need square images"
            remedy = self._convert("--resolution=N --transform=center-crop")
        elif resolution not in (None, width):
            problem += f", but resolution {resolution} is asked for"
            remedy = f"{self._convert(f'--resolution={resolution}')}, or give --resolution={width}"
        elif channels not in (None, self.img_channels):
            problem = f"has {self.img_channels} channel(s), but {channels} are asked for"
            remedy = "use data of the same kind (grayscale 1, RGB 3)"
        else:
            return
        raise refusal(self.file_label(0), but=problem, remedy=remedy)

    def __len__(self) -> int:
        return self.num_images

    def subset(self, rows: Sequence[int] | np.ndarray) -> Self:
        part = super().subset(rows)
        part._cache = None
        return part

    def _checksums(self) -> tuple[np.ndarray, np.ndarray]:
        return self.archive.checksums()

    @functools.cached_property
    def content_hash(self) -> str:
        """Identity of images, labels and the subset in use: see :mod:`data.images.identity`."""
        return VERSION + self._subset_hash(self.archive.fingerprint())

    def is_same_as(self, content_hash: str) -> bool:
        if content_hash.startswith(VERSION):
            return content_hash == self.content_hash
        return content_hash == self._subset_hash(self.archive.old_fingerprint())

    def file_label(self, index: int) -> str:
        """Return the archive and the name of an image's file, for messages."""
        return self.archive.label(int(self._indices[index]))

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, Cond]:
        """Return a batch ``(uint8 [B, C, H, W], {"label": int64 [B]} or {})``."""
        rows = np.asarray(indices, np.int64)
        images = self._read(rows) if self._cache is None else self._cache.fetch(rows, self._read)
        return self._with_labels(images, rows)

    def prefetch(self, indices: Sequence[int]) -> None:
        rows = np.asarray(indices, np.int64)
        if self._cache is not None:
            rows = self._cache.missing(rows)
        self.archive.prefetch(self._indices[rows])

    def _read(self, indices: np.ndarray) -> torch.Tensor:
        channels, res = self.img_channels, self.resolution
        images = np.empty((len(indices), *self._pixels_shape), np.uint8)
        for row, index in enumerate(indices.tolist()):
            pixels = self._decode(index)
            if pixels.shape != self._pixels_shape:
                height, width, found = *pixels.shape[:2], 1 if pixels.ndim == 2 else 3
                label = f"{self.file_label(index)}: is {width}x{height} with {found} channel(s)"
                others = f"but {self.file_label(0)} is {res}x{res} with {channels}"
                remedy = ", which makes all RGB" if height == width == res else " --resolution=N"
                remedy = f"bring all to one kind with dataset_tool.py convert{remedy}"
                raise ImageError(f"{label}, {others}; {remedy}.")
            images[row] = pixels
        batch = torch.from_numpy(images).view(len(indices), res, res, channels)
        return batch.permute(0, 3, 1, 2).contiguous()

    def _decode(self, index: int) -> np.ndarray:
        try:
            return self.archive.pixels(int(self._indices[index]), exact=self._exact)
        except AddressError as error:
            raise ImageError(str(error)) from None
        except UnfitImageError as error:
            raise ImageError(f"{self.file_label(index)}: {error}.") from None
        except (OSError, ValueError) as error:
            problem = f"cannot be read ({error}); dataset_tool.py verify lists every such file"
            raise ImageError(f"{self.file_label(index)}: {problem}.") from None


class SharedCache:
    """Decoded images, uint8 [N, C, H, W], in memory shared by a rank's processes; filled on use."""

    def __init__(self, shape: tuple[int, int, int, int], label: Path | str) -> None:
        # Writing more than the file system holds would kill the process with a bus error.
        if os.path.isdir("/dev/shm"):
            free, needed = shutil.disk_usage("/dev/shm").free, math.prod(shape)
            if needed > 0.9 * free:
                problem = f"--cache needs {needed / 1e9:.2f} GB of shared memory, but /dev/shm has"
                remedy = "train without --cache, or enlarge it (docker run --shm-size)"
                raise refusal(label, but=f"{problem} {free / 1e9:.2f} GB free", remedy=remedy)
        self._images = torch.empty(shape, dtype=torch.uint8).share_memory_()
        self._filled = torch.zeros(shape[0], dtype=torch.bool).share_memory_()

    def fetch(
        self, indices: np.ndarray, read: Callable[[np.ndarray], torch.Tensor]
    ) -> torch.Tensor:
        """Return images by index, calling ``read(missing_indices)`` for those not cached yet.

        Two processes may fill the same entry; both write the same pixels.
        """
        missing = self.missing(indices)
        if len(missing):
            rows = torch.from_numpy(missing)
            self._images[rows] = read(missing)
            self._filled[rows] = True
        return self._images[torch.from_numpy(indices)]

    def missing(self, indices: np.ndarray) -> np.ndarray:
        """Return those of the indices whose images are not cached yet."""
        return indices[~self._filled[torch.from_numpy(indices)].numpy()]


class MirroredImages(Dataset):
    """A dataset twice as long: item ``num_images + i`` is item ``i`` flipped left to right.

    All other attributes are those of ``images``.
    """

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __getattr__(self, name: str) -> Any:
        if name == "images":  # Not set yet while a copy is made: asking for it would recurse.
            raise AttributeError(name)
        return getattr(self.images, name)

    def __len__(self) -> int:
        return 2 * len(self.images)

    __getitem__ = LabelledDataset.__getitem__

    def file_label(self, index: int) -> str:
        return self.images.file_label(index % len(self.images))

    def prefetch(self, indices: Sequence[int]) -> None:
        self.images.prefetch(np.asarray(indices, np.int64) % len(self.images))

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, Cond]:
        mirrored, own = np.divmod(np.asarray(indices, np.int64), len(self.images))
        batch, cond = self.images.__getitems__(own)
        rows = torch.from_numpy(mirrored.astype(bool))
        batch[rows] = batch[rows].flip(-1)
        return batch, cond
