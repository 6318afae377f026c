"""The dataset of stored latents with their class labels, as training reads them."""

import functools
import itertools
import json
import math
import os
import zlib
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch

from data.images.dataset import Cond, LabelledDataset
from data.images.decode import ImageError
from data.latents.record import (
    check_latent_shard,
    known_shards,
    read_archive_labels,
    read_checksums,
    read_record,
)
from dnnlib.addresses import AddressError, is_address, name_of, under, without_query
from dnnlib.errors import refusal
from dnnlib.remote.files import OpenFiles, location_of


class LatentDataset(LabelledDataset):
    """Moments of raw latents; item ``i`` is ``(float16 [C, h, w], cond)``.

    C is 2c for the means followed by the standard deviations, or c for the means alone (see
    :func:`encoders.autoencoder.normalise`). ``cond`` is ``{"label": int64 []}`` if labels are
    delivered, and empty otherwise. Any number of processes and threads may read at once, including
    from copies made by fork or pickle.

    Args:
        path: Folder made by ``dataset_tool.py encode`` (see docs/formats.md), or its address.
        use_labels: Deliver class labels: True requires them, None delivers them if there are any.
        max_size: Use a random subset of this many images, the same as of the images themselves.
        seed: Seed of that subset.
        hflip: Item ``num_images + i`` is the mirror image of item ``i``; the data must include it.

    Attributes, in addition to those of :class:`~data.images.dataset.LabelledDataset`:
        record: The archive's record.
        latent_shape: Shape (c, h, w) of a latent.
        scale, shift: Normalisation of the autoencoder.
        vae, vae_hash: Location and identity of the autoencoder.

    Raises ValueError, one sentence that names the file, for data that do not fit or are damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        use_labels: bool | None = None,
        max_size: int | None = None,
        seed: int = 0,
        hflip: bool = False,
    ) -> None:
        self.path = location_of(path)
        self.name = name_of(path) if is_address(path) else self.path.resolve().name
        self.record = record = read_record(path)
        self.resolution, self.img_channels = record.resolution, record.img_channels
        self.latent_shape: tuple[int, int, int] = tuple(record.latent_shape)
        self.scale, self.shift = record.scale, record.shift
        self.vae, self.vae_hash = record.vae, record.vae_hash
        if hflip and not record.mirrored:
            problem = "holds no mirror images, which --hflip needs"
            remedy = "make it again with dataset_tool.py encode --hflip, or give --no-hflip"
            raise refusal(self.path, but=problem, remedy=remedy)
        self._hflip = hflip

        super().__init__(record.num_images, max_size, seed)

        if use_labels is not False:
            labels = read_archive_labels(self.path, record)
            if labels is not None:
                self.labels, self.class_names = labels[self._indices], list(record.class_names)
            elif use_labels:
                problem = "has no class labels, which --cond needs"
                remedy = "make it again from images with labels, or train with --cond=False"
                raise refusal(self.path, but=problem, remedy=remedy)

        self._row_shape = record.row_shape
        sizes = [shard["num_images"] for shard in record.shards]
        self._files = [under(self.path, shard["file"]) for shard in record.shards]
        self._starts = np.array(self._open_shards(sizes), np.int64)
        self._crcs = read_checksums(self.path, record)
        self._firsts = np.cumsum([0, *sizes])  # The first image of each shard.

    def _open_shards(self, sizes: Sequence[int]) -> list[int]:
        """Return the offset of the values in each shard, after a check of its header and size."""
        is_remote = is_address(self.path)
        self._open = OpenFiles(known_shards(self.path, self.record) if is_remote else {})
        if is_remote:
            self.remote_bytes = 2 * math.prod(self._row_shape[1:])
            for file in self._files:
                self._open(file).prefetch(np.zeros(1, np.int64), 1)
        reader = self._open if is_remote else None
        return [
            check_latent_shard(file, (size, *self._row_shape), reader)
            for file, size in zip(self._files, sizes, strict=True)
        ]

    def __len__(self) -> int:
        return self.num_images * (1 + self._hflip)

    def hold_out(self, share: float) -> Self:
        part = super().hold_out(share)
        part.validation_part._hflip = False
        return part

    def _checksums(self) -> tuple[np.ndarray, np.ndarray]:
        if self._crcs is None:
            but = "an earlier version encoded it without checksums, which decide what is held out"
            remedy = "make it again with dataset_tool.py encode, or leave --validation-share out"
            raise refusal(self.path, but=but, remedy=remedy)
        crcs = self._crcs[:, 0]
        return np.zeros_like(crcs, np.int64), crcs

    @functools.cached_property
    def content_hash(self) -> str:
        """Identity of the latents, their labels, the subset in use and ``hflip``: a hex digest."""
        record = self.record
        content = dict(
            vae=record.vae_hash,
            kind=record.kind,
            normalisation=[record.scale, record.shift],
            shards=[shard["sha256"] for shard in record.shards],
            labels=record.labels_sha256,
            class_names=record.class_names,
            hflip=self._hflip,
        )
        return self._subset_hash(json.dumps(content, sort_keys=True))

    def file_label(self, index: int) -> str:
        """Return the file of a latent and its row in it, for messages."""
        image = int(self._indices[index % self.num_images])
        shard = int(np.searchsorted(self._firsts, image, side="right")) - 1
        return f"{self._files[shard]}, row {image - self._firsts[shard]}"

    def _places(self, images: np.ndarray, variants: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard and the offset in bytes of each latent, int64 [N] both."""
        shards = np.searchsorted(self._firsts, images, side="right") - 1
        rows = (images - self._firsts[shards]) * self._row_shape[0] + variants
        return shards, self._starts[shards] + rows * 2 * math.prod(self._row_shape[1:])

    def prefetch(self, indices: Sequence[int]) -> None:
        variants, own = np.divmod(np.asarray(indices, np.int64), self.num_images)
        shards, offsets = self._places(self._indices[own], variants)
        size = 2 * math.prod(self._row_shape[1:])
        for shard in np.unique(shards).tolist():
            self._open(self._files[shard]).prefetch(offsets[shards == shard], size)

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, Cond]:
        """Return a batch ``(float16 [B, C, h, w], {"label": int64 [B]} or {})``."""
        index_array = np.asarray(indices, np.int64)
        assert ((index_array >= 0) & (index_array < len(self))).all()
        variants, own = np.divmod(index_array, self.num_images)
        latents = np.empty((len(own), *self._row_shape[1:]), np.float16)
        images = self._indices[own]
        places = self._places(images, variants)
        rows = zip(*(array.tolist() for array in (*places, images, variants)), strict=True)
        # Read in file order, which is fastest on a disk.
        for (shard, offset, image, variant), row in sorted(zip(rows, itertools.count())):
            self._read(shard, offset, image, variant, latents[row])
        return self._with_labels(torch.from_numpy(latents), own)

    def _read(self, shard: int, offset: int, image: int, variant: int, target: np.ndarray) -> None:
        path, row = self._files[shard], image - int(self._firsts[shard])
        try:
            file = self._open(path)
            num_bytes = file.readinto(target, offset)
            is_right = self._is_right(target, image, variant)
            if not is_right:
                file.forget(target.nbytes, offset)  # A power failure may have damaged a block.
                num_bytes = file.readinto(target, offset)
                is_right = self._is_right(target, image, variant)
        except AddressError as error:
            raise ImageError(str(error)) from None
        except OSError as error:
            raise ImageError(f"{path}: row {row} cannot be read ({error.strerror}).") from None
        problem = ""
        if num_bytes != target.nbytes:
            problem = f"ends in the middle of row {row}"
        elif not is_right:
            problem = f"row {row} differs from its checksum"
        if problem:
            remedy = "dataset_tool.py verify lists every such file"
            raise ImageError(f"{without_query(str(path))}: {problem}; {remedy}.")

    def _is_right(self, values: np.ndarray, image: int, variant: int) -> bool:
        """Return whether latents match their checksum; True if there are no checksums."""
        return self._crcs is None or zlib.crc32(values) == self._crcs[image, variant]
