"""Latents of images with their class labels, as training reads them."""

import functools
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data.images.dataset import Cond, LabelledDataset
from data.images.decode import ImageError
from data.latents.record import check_latent_shard, read_archive_labels, read_checksums, read_record
from dnnlib.errors import refusal
from dnnlib.files import OpenFiles


class LatentDataset(LabelledDataset):
    """Moments of latents; item ``i`` is ``(float16 [C, h, w], cond)``.

    C is 2c for means and then standard deviations, or c for means alone (see
    :func:`encoders.autoencoder.normalise`). ``cond`` is ``{"label": int64 []}`` if labels are
    delivered and empty otherwise. Any number of processes and threads may read at once, also from
    copies made by fork or pickle.

    Args:
        path: Folder made by ``dataset_tool.py encode`` (see docs/formats.md).
        use_labels: Deliver class labels, which the data must have; None delivers them if it does.
        max_size: Keep a random subset of this many images, the same as of the images themselves.
        seed: Seed of that subset.
        hflip: Item ``num_images + i`` is the mirror image of ``i``, which the data must have.

    Attributes:
        record: All that is known of the archive.
        latent_shape: Shape (c, h, w) of a latent.
        scale, shift: Normalisation of the autoencoder.
        vae, vae_hash: Location and identity of the autoencoder.

    The others are those of :class:`~data.images.dataset.LabelledDataset`.

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
        self.path = Path(path)
        self.name = self.path.resolve().name
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
                remedy = "make it again from images with labels, or train without --cond"
                raise refusal(self.path, but=problem, remedy=remedy)

        self._row_shape = record.row_shape
        sizes = [shard["num_images"] for shard in record.shards]
        self._files = [self.path / shard["file"] for shard in record.shards]
        self._starts = [
            check_latent_shard(file, (size, *self._row_shape))
            for file, size in zip(self._files, sizes, strict=True)
        ]
        self._crcs = read_checksums(self.path, record)
        self._firsts = np.cumsum([0, *sizes])  # The first image of each shard.
        self._open = OpenFiles()

    def __len__(self) -> int:
        return self.num_images * (1 + self._hflip)

    @functools.cached_property
    def content_hash(self) -> str:
        """Hexadecimal digits that identify the latents, their labels, the subset and ``hflip``."""
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
        """Return the file of a latent and its row there, for messages."""
        shard, row = self._place(int(self._indices[index % self.num_images]))
        return f"{self._files[shard]}, row {row}"

    def _place(self, image: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._firsts, image, side="right")) - 1
        return shard, image - int(self._firsts[shard])

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, Cond]:
        """Return a batch ``(float16 [B, C, h, w], {"label": int64 [B]} or {})``."""
        index_array = np.asarray(indices, np.int64)
        assert ((index_array >= 0) & (index_array < len(self))).all()
        variants, own = np.divmod(index_array, self.num_images)
        latents = np.empty((len(own), *self._row_shape[1:]), np.float16)
        # In the order of the files, which a disk reads fastest.
        images = self._indices[own]
        for position in np.argsort(images, kind="stable").tolist():
            self._read(int(images[position]), int(variants[position]), latents[position])
        return self._with_labels(torch.from_numpy(latents), own)

    def _read(self, image: int, variant: int, target: np.ndarray) -> None:
        shard, row = self._place(image)
        offset = self._starts[shard] + (row * self._row_shape[0] + variant) * target.nbytes
        file = self._files[shard]
        try:
            stream = self._open(file)  # Held while it is read, should others push it out.
            num_bytes = os.preadv(stream.fileno(), [target], offset)
        except OSError as error:
            raise ImageError(f"{file}: row {row} cannot be read ({error.strerror}).") from None
        if num_bytes != target.nbytes:
            remedy = "dataset_tool.py verify lists every such file"
            raise ImageError(f"{file}: ends in the middle of row {row}; {remedy}.")
        if self._crcs is not None and zlib.crc32(target) != self._crcs[image, variant]:
            remedy = "dataset_tool.py verify lists every such file"
            raise ImageError(f"{file}: row {row} differs from its checksum; {remedy}.")
