"""Scores of images generated from supports of seen classes, unseen classes or other datasets."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.fewshot.episodes import Episodes, episodes_of_dataset, episodes_of_run
from data.fewshot.sets import SetDataset
from data.images.dataset import ImageDataset
from dnnlib.errors import refusal
from evaluation.config import ScoreConfig
from evaluation.images import Making, SnapshotImages, shape_of, size_text
from evaluation.scoring import RealImages, describe_score, make_detectors, score_images
from metrics.detectors import ImageShape
from metrics.metric import MetricSpec, needed_outputs
from metrics.statistics import Batch
from sampling.grids import save_episodes
from sampling.images import labels_like_data
from sampling.supports import SupportGenerator
from torch_utils import distributed
from training.checkpoint import Snapshot

_NUM_SHOWN = 10


class EpisodeImages(SnapshotImages):
    """Images generated from the supports of episodes, in the proportions of their real images.

    While they are scored, the distance of each to the nearest image of its support is measured.
    """

    def __init__(
        self, generator: SupportGenerator, snapshot: Snapshot, *, first_seed: int, batch: int
    ) -> None:
        self._episodes = generator.episodes
        counts = self._episodes.counts
        super().__init__(
            generator, snapshot, first_seed=first_seed, batch=batch, class_counts=counts
        )
        self.class_names = self._episodes.class_names
        self._episode_of = labels_like_data(counts)
        self._distances: list[torch.Tensor] = []

    def batches(self, indices: Sequence[int]) -> Iterable[Batch]:
        for rows, images in super().batches(indices):
            episodes = self._episode_of[rows.numpy() % len(self._episode_of)]
            self._distances.append(support_distances(images.cpu(), self._episodes, episodes))
            yield rows, images

    def labels(self, indices: range) -> np.ndarray:
        return self._episodes.classes[super().labels(indices)]

    def distances(self) -> np.ndarray:
        """Return the distances of all images so far, float32 [N], on every rank. Collective."""
        own = torch.cat([torch.empty(0), *self._distances])
        return torch.cat(distributed.gather_objects(own)).numpy()


def support_distances(
    images: torch.Tensor, episodes: Episodes, rows: Sequence[int] | np.ndarray
) -> torch.Tensor:
    """Return the distance [N] of uint8 images [N, C, H, W] to the nearest image of their support.

    The distance is the root mean square difference of pixels in [0, 1]. ``rows`` [N] holds the
    episode of each image.
    """
    supports = episodes.supports[torch.as_tensor(rows)].to(torch.float32) / 255
    difference = images[:, None].to(torch.float32) / 255 - supports  #  [N, k, C, H, W]
    return difference.square().flatten(2).mean(2).sqrt().amin(1)


def copying(generated: np.ndarray, episodes: Episodes, images: ImageDataset) -> dict[str, Any]:
    """Return how near generated images are to their supports, compared with real images.

    Each real image is compared with the supports of its own class in turn. ``share_nearer`` is the
    share of generated images that are nearer to their support than 99% of real images are; what
    exceeds 1% are copies. ``generated`` [N] are distances from :func:`support_distances`.
    """
    real_classes = images.labels[episodes.reals]
    rows = np.empty(len(real_classes), np.int64)
    for index in np.unique(episodes.classes):
        places = np.flatnonzero(real_classes == index)
        rows[places] = np.resize(np.flatnonzero(episodes.classes == index), len(places))
    real = []
    for start in range(0, len(rows), 256):
        part = slice(start, start + 256)
        pixels, _ = images.__getitems__(episodes.reals[part].tolist())
        real.append(support_distances(pixels, episodes, rows[part]))
    real = torch.cat(real).numpy()
    near = float(np.quantile(real, 0.01))
    return dict(
        generated_median=float(np.median(generated)),
        real_median=float(np.median(real)),
        real_nearest_percent=near,
        share_nearer=float((generated < near).mean()),
    )


def _check_transfer(images: ImageDataset, shape: ImageShape) -> None:
    if images.labels is None:
        raise ValueError(
            f"--transfer: {images.path} has no class labels, and a support needs a class."
        )
    if shape_of(images) != shape:
        but = f"it holds images of {size_text(images)}, but the model makes {size_text(shape)}"
        remedy = f"convert it with dataset_tool.py convert --resolution={shape[1]}"
        raise refusal("--transfer", images.path, but=but, remedy=remedy)


def describe_fewshot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the score rows of one protocol as text."""
    first, found = rows[0], rows[0]["copying"]
    lines = [
        f"{first['protocol']}: {first['num_episodes']} supports of {first['support_size']}, "
        f"{first['num_images']:,} generated images against {first['num_reals']:,} real ones"
    ]
    lines += ["  " + describe_score(row).replace("\n", "\n  ") for row in rows]
    lines.append(
        f"  distance to the nearest support image: {found['generated_median']:.4f} generated, "
        f"{found['real_median']:.4f} real (medians); {found['share_nearer']:.1%} of the "
        "generated images are nearer than 99% of real ones are (1% expected)"
    )
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotTest:
    """What images generated from supports are compared with, and how many there are."""

    protocols: Sequence[str]  # Any of ``seen``, ``unseen``, ``val``, ``transfer``.
    dataset: SetDataset | None = None  # The training data, for all protocols but ``transfer``.
    transfer: ImageDataset | None = None  # The images of protocol ``transfer``.
    num_images: int | None = None  # To generate; None: as many as real ones, up to 10,000.
    episodes_per_class: int | None = None  # None: up to 20, from a fifth of the class's images.
    outdir: Path | None = None  # Folder for a picture of each protocol; None for no pictures.

    def draw(
        self, snapshot: Snapshot, image_shape: ImageShape
    ) -> list[tuple[str, ImageDataset, Episodes]]:
        """Return each protocol with its images and the episodes drawn from them.

        Raises ValueError if images do not fit the model, or if all of them are in supports, so that
        none is left to compare with.
        """
        model = snapshot.config.model
        size = dict(support_size=model.context_size, num_per_class=self.episodes_per_class)
        drawn = []
        for protocol in self.protocols:
            if protocol == "transfer":
                images = self.transfer
                _check_transfer(images, image_shape)
                episodes = episodes_of_dataset(images, null_label=model.num_classes, **size)
            else:
                images = self.dataset.images
                episodes = episodes_of_run(self.dataset, protocol, **size)
            if not len(episodes.reals):
                but = "all images of its classes are in supports, and none is left to compare with"
                raise refusal(protocol, but=but, remedy="give fewer --episodes-per-class")
            drawn.append((protocol, images, episodes))
        return drawn


def score_fewshot(
    snapshot: Snapshot,
    config: ScoreConfig,
    metrics: Sequence[MetricSpec],
    device: torch.device,
    test: FewShotTest,
    making: Making,
) -> Iterable[list[dict[str, Any]]]:
    """Yield the score rows of each protocol for a set-conditioned model. Collective.

    ``config`` holds the sampling protocol and the detectors. ``copying`` in each row tells how near
    the images are to their supports, see :func:`copying`.
    """
    generator = making.generator(snapshot, config, device)
    batch = making.batch
    names = sorted({metric.output.detector for metric in metrics})
    needs = needed_outputs(metrics, of_reference=True, per_class=True)
    # Everything is drawn and checked before anything is generated.
    for protocol, images, episodes in test.draw(snapshot, generator.image_shape):
        own = SupportGenerator.of(generator, episodes)
        source = EpisodeImages(own, snapshot, first_seed=making.first_seed, batch=batch)
        reals = images.subset(episodes.reals)
        detectors = make_detectors(names, config.detectors, shape_of(reals), device)
        references = RealImages(reals).references(needs, detectors, device, batch)
        options = dict(num_images=test.num_images, per_class=True)
        rows = score_images(metrics, source, references, detectors, device, **options)
        distances = source.distances()
        if test.outdir is not None:
            shown = np.linspace(0, len(episodes) - 1, min(_NUM_SHOWN, len(episodes)))
            few = SupportGenerator.of(generator, episodes[shown.round().astype(int).tolist()])
            save_episodes(few, len(few.episodes) * 20, test.outdir / f"{protocol}.png", batch)
        facts = dict(protocol=protocol, num_reals=len(reals))
        facts["copying"] = copying(distances, episodes, images)
        yield [{**row, **facts} for row in rows]
