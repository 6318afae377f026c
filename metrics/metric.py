"""The metrics by name, and the function that computes any number of them in one pass."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from dnnlib.config import did_you_mean
from metrics.features import Detector
from metrics.frechet import frechet_distance
from metrics.reference import Reference
from metrics.statistics import FeatureStatistics, collect_statistics
from torch_utils import distributed


def frechet_to_reference(statistics: FeatureStatistics, reference: Reference) -> float:
    """Return the Fréchet distance between the generated images and the reference."""
    return frechet_distance(
        statistics.mean(), statistics.covariance(), reference.mu, reference.sigma
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """What a metric's name stands for. The reference is always the whole dataset.

    Attributes:
        name: Name on the command line and in score rows.
        detector: Name of the detector that sees the images.
        num_images: Number of generated images.
        at_most_dataset: Generate no more images than the reference has.
        distance: Value of the metric from the statistics of the generated images.
        description: One line for ``--help``.
    """

    name: str
    detector: str
    num_images: int
    at_most_dataset: bool = False
    distance: Callable[[FeatureStatistics, Reference], float] = frechet_to_reference
    description: str

    def image_count(self, reference: Reference, num_images: int | None = None) -> int:
        """Return the number of images to generate; ``num_images`` overrides the metric's own."""
        if num_images is not None:
            return num_images
        if self.at_most_dataset and reference.count is not None:
            return min(self.num_images, reference.count)
        return self.num_images


_SPECS = (
    MetricSpec(
        name="fid10k_full",
        detector="inception",
        num_images=10_000,
        description="FID of 10,000 images against the whole dataset",
    ),
    MetricSpec(
        name="fid50k_full",
        detector="inception",
        num_images=50_000,
        description="FID of 50,000 images against the whole dataset",
    ),
    MetricSpec(
        name="fd_pixels",
        detector="pixels",
        num_images=2_000,
        at_most_dataset=True,
        description="Fréchet distance of the pixels in 0..1, of min(dataset size, 2,000) images",
    ),
)
METRICS: dict[str, MetricSpec] = {spec.name: spec for spec in _SPECS}


def get_metric(name: str) -> MetricSpec:
    """Return the metric of that name; raises ValueError with the nearest one for others."""
    if name not in METRICS:
        raise ValueError(
            f"Unknown metric {name!r}; accepted: {', '.join(METRICS)}.{did_you_mean(name, METRICS)}"
        )
    return METRICS[name]


def get_metrics(names: Iterable[str]) -> list[MetricSpec]:
    """Return the metrics of those names, each once, in the order given."""
    return [get_metric(name) for name in dict.fromkeys(names)]


def score(
    metrics: Sequence[MetricSpec],
    generate: Callable[[range], Iterable[torch.Tensor]],
    references: Mapping[str, Reference],
    detectors: Mapping[str, Detector],
    device: torch.device | str,
    *,
    num_images: int | None = None,
) -> list[dict[str, Any]]:
    """Return one row per metric, equal on every rank. Collective.

    No image is generated and no feature computed twice: metrics of fewer images use the first ones
    of those of more. ``generate`` is called with consecutive ranges of image indices for that.

    Args:
        metrics: What to compute.
        generate: ``generate(range(start, stop))`` yields this rank's share of the images with those
            indices as uint8 batches [N, C, H, W], in any split over batches and ranks. An image
            must depend on its index alone.
        references: Statistics of the real images, by detector name.
        detectors: Detectors on ``device``, by name.
        device: Where features and their sums are computed.
        num_images: Number of images instead of that of the metrics.

    A row holds metric, value, num_images, detector and its hash, reference and its hash and
    count, seconds since the start, and a list of warnings. The caller adds how the images were
    made. Raises ValueError for a reference of another detector and for a wrong number of images.
    """
    start_sec = time.monotonic()
    warnings = {
        name: references[name].check_detector(detectors[name])
        for name in {metric.detector for metric in metrics}
    }
    counts = [metric.image_count(references[metric.detector], num_images) for metric in metrics]
    if counts and min(counts) < 2:
        raise ValueError(f"A metric needs at least 2 images; got {min(counts)}.")
    statistics: dict[str, FeatureStatistics] = {}
    rows: dict[str, dict[str, Any]] = {}
    done = 0
    for stop in sorted(set(counts)):
        pending = [metric for metric, count in zip(metrics, counts, strict=True) if count >= stop]
        names = list(dict.fromkeys(metric.detector for metric in pending))
        collected = collect_statistics(
            [detectors[name] for name in names], generate(range(done, stop)), device
        )
        for name, part in zip(names, collected, strict=True):
            statistics[name] = statistics[name].merged(part) if name in statistics else part
        for metric, count in zip(metrics, counts, strict=True):
            if count == stop:
                rows[metric.name] = _row(
                    metric,
                    stop,
                    statistics[metric.detector],
                    references[metric.detector],
                    detectors[metric.detector],
                    warnings[metric.detector],
                    start_sec,
                )
        done = stop
    return [rows[metric.name] for metric in metrics]


def _row(
    metric: MetricSpec,
    num_images: int,
    statistics: FeatureStatistics,
    reference: Reference,
    detector: Detector,
    warnings: list[str],
    start_sec: float,
) -> dict[str, Any]:
    if statistics.count != num_images:
        raise ValueError(
            f"{metric.name}: needs {num_images} images, but got {statistics.count}. Provide as "
            "many, or give the number of images to score."
        )
    warnings = list(warnings)
    for count, what in ((num_images, "images"), (reference.count, "reference images")):
        if count is not None and count <= detector.num_features:
            warnings.append(
                f"low count: {count} {what} for {detector.num_features} features; the distance is "
                "biased upwards and comparable only at equal counts"
            )
    return dict(
        metric=metric.name,
        value=distributed.on_main(lambda: metric.distance(statistics, reference)),
        num_images=num_images,
        detector=detector.name,
        detector_hash=detector.hash,
        reference=reference.source,
        reference_hash=reference.hash,
        reference_count=reference.count,
        seconds=round(distributed.broadcast_object(time.monotonic() - start_sec), 3),
        warnings=warnings,
    )
