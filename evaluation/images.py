"""Images to be scored: those in files, and those that a snapshot generates on the fly."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, Self

import numpy as np
import torch

from data.images.dataset import ImageDataset, open_images
from data.loader import iterate_images
from dnnlib.text import join_names
from evaluation.config import ScoreConfig
from metrics.detectors import ImageShape
from metrics.statistics import Batch
from sampling.config import GenerateConfig
from sampling.images import (
    ImageGenerator,
    cached_snapshot,
    generate_for_rank,
    labels_like_data,
    passport,
    seed_range,
)
from torch_utils.fingerprints import package_versions
from training.asked import GeneratorOptions
from training.checkpoint import Snapshot
from training.family import of as family_of

_ORDER_SEED = 0


class ImageSource(Protocol):
    """Numbered images, each a function of its index alone."""

    image_shape: ImageShape
    formats: str  # File formats of the images, such as ``png``.
    num_images: int | None  # None if there is no end to them.
    class_names: tuple[str, ...]  # Empty without classes.

    def batches(self, indices: Sequence[int]) -> Iterable[Batch]:
        """Yield this rank's share of the images, with their indices. Collective."""

    def labels(self, indices: range) -> np.ndarray | None:
        """Return the class of each image, int64 [N]; None if images have no classes."""

    def passport(self, indices: range) -> dict[str, Any]:
        """Return what a score row states about these images."""


class FileImages:
    """The images of a folder, a zip or an ``.npz`` sample archive.

    Images may be stored sorted by class. With ``shuffled`` they are numbered in a fixed random
    order, so that the first few, and each split of the Inception Score, are a sample of all.
    """

    def __init__(self, path: str, batch: int, shuffled: bool) -> None:
        self._path, self._batch = path, batch
        if path.endswith(".pkl"):
            raise ValueError(f"--images: {path} holds no images; give a snapshot with --network.")
        self.dataset = open_images(path)
        self._shuffled = shuffled
        self._order = np.arange(len(self.dataset))
        if self._shuffled:
            np.random.default_rng(_ORDER_SEED).shuffle(self._order)
        self._number = np.argsort(self._order)
        self.image_shape, self.formats = shape_of(self.dataset), formats_of(self.dataset)
        self.num_images = len(self.dataset)
        self.class_names = tuple(self.dataset.class_names)

    def batches(self, indices: Sequence[int]) -> Iterable[Batch]:
        wanted = np.sort(self._order[list(indices)]).tolist()
        for places, images in read_images(self.dataset, self._batch, "Scoring", wanted):
            yield torch.from_numpy(self._number[places.numpy()]), images

    def labels(self, indices: range) -> np.ndarray | None:
        labels = self.dataset.labels
        return None if labels is None else labels[self._order[indices.start : indices.stop]]

    def passport(self, indices: range) -> dict[str, Any]:
        return dict(
            images=self._path,
            images_hash=self.dataset.content_hash,
            first_image=indices.start,
            image_order="shuffled" if self._shuffled else "as stored",
            image_formats=self.formats,
            packages=package_versions(),
        )


class SnapshotImages:
    """Images that a snapshot generates, image i from seed ``first_seed + i``, without end.

    Classes are in the proportions of the training data, or of ``class_counts``.
    """

    num_images = None
    formats = "png"  # Generated images have no traces of compression.

    def __init__(
        self,
        generator: ImageGenerator,
        snapshot: Snapshot,
        *,
        first_seed: int,
        batch: int,
        class_counts: Sequence[int] | None = None,
    ) -> None:
        self._generator, self._snapshot = generator, snapshot
        self._first_seed, self._batch = first_seed, batch
        self._counts = snapshot.data.class_counts if class_counts is None else class_counts
        self.image_shape = generator.image_shape
        self.class_names = tuple(snapshot.data.class_names)

    def batches(self, indices: Sequence[int]) -> Iterable[Batch]:
        options = dict(batch=self._batch, first_seed=self._first_seed, class_counts=self._counts)
        return generate_for_rank(self._generator, indices, **options)

    def make(self, indices: range) -> torch.Tensor:
        """Return all of these images [N, C, H, W], uint8 on the device. Not collective."""
        labels = self.labels(indices)
        seeds = [self._first_seed + index for index in indices]
        return self._generator.generate(seeds, None if labels is None else labels.tolist())

    def sampled_by(self, config: GenerateConfig, first_seed: int | None = None) -> Self:
        """Return the images of the same networks under another protocol, or from other seeds."""
        protocol = dict(sampling=config.sampling, guidance=config.guidance)
        return SnapshotImages(
            dataclasses.replace(self._generator, **protocol),
            self._snapshot,
            first_seed=self._first_seed if first_seed is None else first_seed,
            batch=self._batch,
            class_counts=self._counts,
        )

    def protocol(self) -> dict[str, Any]:
        """Return what a score row states about the sampling."""
        return self._generator.protocol()

    def labels(self, indices: range) -> np.ndarray | None:
        if not (self._generator.num_classes and sum(self._counts)):
            return None
        labels = labels_like_data(self._counts)
        return labels[np.arange(indices.start, indices.stop) % len(labels)]

    def passport(self, indices: range) -> dict[str, Any]:
        snapshot, training = self._snapshot, self._snapshot.config.training
        known = (snapshot.progress, snapshot.sha256)
        return dict(
            network=str(snapshot.path),
            seeds=seed_range(self._first_seed + indices.start, len(indices)),
            **passport(self._generator, training, self._counts, *known),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Making:
    """How a snapshot generates images, apart from its sampling protocol."""

    first_seed: int = 0
    batch: int = 64  # Images per rank and pass, also for images that are read from files.
    precision: str | None = None  # Arithmetic of the network; None: as in training.
    cpu_matmul: str | None = None  # Library for float32 matmuls on CPUs; None: as in training.
    compile: bool = False  # Whether networks are compiled.
    guide: str | None = None  # A second snapshot, to guide away from (autoguidance).
    vae: str | None = None  # Autoencoder of a latent model; None: where it was in training.

    def generator(
        self, snapshot: Snapshot, config: GenerateConfig, device: torch.device
    ) -> ImageGenerator:
        """Return a generator of the images of ``snapshot`` under the protocol ``config``."""
        how = GeneratorOptions.of(self, config)
        return family_of(snapshot.config).load(snapshot, device, how)


def open_image_source(
    location: str,
    config: ScoreConfig | None,
    device: torch.device,
    making: Making,
    *,
    shuffled: bool = False,
) -> ImageSource:
    """Return the images of a snapshot under the protocol ``config``, or those in files without one.

    ``location`` is a snapshot or, if ``config`` is None, a folder, zip or ``.npz`` of images. With
    ``shuffled``, images in files are numbered in a fixed random order.
    """
    if config is None:
        return FileImages(location, making.batch, shuffled)
    snapshot = cached_snapshot(location)

    def make() -> ImageGenerator:
        return making.generator(snapshot, config, device)

    return family_of(snapshot.config).images(snapshot, make, making.first_seed, making.batch)


def read_images(
    dataset: ImageDataset, batch: int, label: str, indices: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Yield this rank's share of a dataset, or of its ``indices``, with a progress bar."""
    return iterate_images(dataset, batch_size=batch, indices=indices, label=label)


def formats_of(dataset: ImageDataset) -> str:
    """Return the file formats of a dataset's images, such as ``jpeg`` or ``jpeg and png``."""
    suffixes = {name.rpartition(".")[2].lower() for name in dataset.archive.names}
    found = {"jpeg" if suffix == "jpg" else suffix for suffix in suffixes}
    return join_names(sorted(found)) if found else "npz"


def shape_of(images: Any) -> ImageShape:
    """Return (C, H, W) of a dataset or a model configuration."""
    return images.img_channels, images.resolution, images.resolution


def size_text(images: Any) -> str:
    """Return a shape (C, H, W), or that of a dataset or a model configuration, as text."""
    shape = images if isinstance(images, tuple) else shape_of(images)
    return f"{'x'.join(map(str, shape))} (channels, height, width)"
