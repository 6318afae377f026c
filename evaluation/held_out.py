"""Scores against held-out images, compared with the same scores against training images.

A model that copies its training images scores better against those than against others of the same
kind, and its images are nearer to training images than held-out ones are.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from data.images.dataset import ImageDataset
from data.preview import evenly_spaced
from evaluation.scoring import dataset_references
from metrics.detectors import Detector, DetectorOutput
from metrics.manifold import nearest_neighbours
from metrics.metric import Comparison, MetricSpec
from metrics.reference_cache import MAX_VECTORS
from metrics.score import GenerateFn
from metrics.statistics import collect_outputs
from torch_utils import distributed

NUM_IMAGES = 1000  # Most images of each side.
_NEAREST = 0.01  # Share of held-out images that count as very near to a training image.


class HeldOutScores:
    """Compares generated images with held-out images, and with as many training images.

    The constructor computes the detector outputs of the real images, or reads them from the cache.
    Collective.

    Args:
        metrics: The metrics of the run. Those that have a reference, and need no more images than
            there are on each side, are computed.
        trained, held_out: Training images and held-out images.
        detectors: The detectors of the metrics, by name.
        device: Where outputs and distances are computed.
    """

    def __init__(
        self,
        metrics: Iterable[MetricSpec],
        trained: ImageDataset,
        held_out: ImageDataset,
        detectors: Mapping[str, Detector],
        device: torch.device,
    ) -> None:
        self._detectors, self._device = detectors, device
        self.num = min(len(trained), len(held_out), NUM_IMAGES)
        self._metrics = [m for m in metrics if m.has_reference and m.at_least <= self.num]
        self._needs = {metric.output: ("vectors",) for metric in self._metrics}
        self._facts = dict(num_held_out=self.num, num_trained=min(len(trained), MAX_VECTORS))
        if self._needs:
            settings = (self._needs, detectors, device)
            rows = evenly_spaced(self.num, len(held_out))
            self._held_out = dataset_references(held_out.subset(rows), *settings)
            self._trained = dataset_references(trained, *settings)

    def rows(self, names: Iterable[str], generate: GenerateFn) -> list[dict[str, Any]]:
        """Return further score rows for the metrics called ``names``, on every rank. Collective.

        There is a row ``NAME_held_out`` for each metric, with its value against either side, and a
        row ``copies_DETECTOR`` for each detector whose features they use, with the values of
        :func:`nearness`. Without copies, ``nearer`` is 0.5 and ``nearest`` is 0.01.
        """
        chosen = [metric for metric in self._metrics if metric.name in set(names)]
        needs = {metric.output: ("vectors",) for metric in chosen}
        if not needs:
            return []
        made = collect_outputs(self._detectors, needs, generate(range(self.num)), self._device)
        vectors = {output: found.vectors.array for output, found in made.items()}
        return distributed.on_main(functools.partial(self._rows, chosen, vectors))

    def _rows(
        self, metrics: Sequence[MetricSpec], made: Mapping[DetectorOutput, np.ndarray]
    ) -> list[dict[str, Any]]:
        rows = []
        for metric in metrics:
            fake, held_out = made[metric.output], self._held_out[metric.output].vectors
            every = self._trained[metric.output].vectors
            trained = every[evenly_spaced(len(held_out), len(every))]
            values = {}
            for side, real in (("held_out", held_out), ("trained", trained)):
                found = metric.compute(Comparison(fake=fake, real=real, device=self._device))
                values.update({f"{name}_{side}": value for name, value in found.items()})
            rows.append(self._row(f"{metric.name}_held_out", metric.output, values))
        for output, fake in made.items():
            if output.name != "features":
                continue
            every, held_out = self._trained[output].vectors, self._held_out[output].vectors
            nearest = [
                nearest_neighbours(images, every, 1, device=self._device)[0][:, 0]
                for images in (fake, held_out)
            ]
            rows.append(self._row(f"copies_{output.detector}", output, nearness(*nearest)))
        return rows

    def _row(self, name: str, output: DetectorOutput, values: dict[str, float]) -> dict[str, Any]:
        detector = self._detectors[output.detector]
        value = next(iter(values.values()))
        facts = dict(detector=detector.name, detector_hash=detector.hash, output=output.name)
        hashes = dict(
            held_out_hash=self._held_out[output].dataset_hash,
            trained_hash=self._trained[output].dataset_hash,
        )
        about = dict(num_images=self.num, **facts, **self._facts, **hashes, warnings=[])
        return dict(metric=name, value=value, values=values, **about)


def nearness(generated: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    """Return how near generated images are to training images, compared with held-out images.

    ``generated`` [N] and ``held_out`` [M] are distances to the nearest training image. ``nearer``
    is the probability that a generated image is nearer than a held-out one, where ties count half;
    ``nearest`` is the share of generated images that are nearer than 99% of held-out ones.
    """
    order = np.sort(held_out)
    above = len(order) - np.searchsorted(order, generated, side="right")
    not_below = len(order) - np.searchsorted(order, generated, side="left")
    return dict(
        nearer=float((above + not_below).mean() / (2 * len(order))),
        nearest=float((generated < np.quantile(held_out, _NEAREST)).mean()),
    )
