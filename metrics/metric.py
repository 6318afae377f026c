"""The metrics by name, and the function that computes any number of them in one pass."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dnnlib.config import did_you_mean
from metrics.features import Detector, Feature
from metrics.frechet import frechet_distance, frechet_distance_of_samples
from metrics.inception_score import inception_score
from metrics.manifold import density_coverage, precision_recall
from metrics.mmd import kernel_distance, rbf_mmd
from metrics.reference import Reference, References
from metrics.statistics import FeatureSet, collect_features
from torch_utils import distributed

Values = dict[str, float]
Batch = tuple[torch.Tensor, torch.Tensor]  # Image indices int64 [N], uint8 images [N, C, H, W].
GenerateFn = Callable[[range], Iterable[Batch]]
_NUM_SPLITS = 10
_SUBSET_SIZE = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One feature of generated images and of real ones, as a metric sees them on rank 0.

    Attributes:
        fake: Vectors [N, D] of the generated images in the order of their indices; None for a
            metric of moments.
        real: Vectors [M, D] of real images; None for a metric of moments or without a reference.
        fake_moments, real_moments: Mean [D] and covariance [D, D]; None where the vectors stand
            for them.
        device: Where to compute.
    """

    fake: np.ndarray | None = None
    real: np.ndarray | None = None
    fake_moments: tuple[np.ndarray, np.ndarray] | None = None
    real_moments: tuple[np.ndarray, np.ndarray] | None = None
    device: torch.device | str = "cpu"


def _frechet(name: str) -> Callable[[Comparison], Values]:
    def compute(it: Comparison) -> Values:
        if it.fake_moments is None or it.real_moments is None:
            return {name: frechet_distance_of_samples(it.fake, it.real)}
        return {name: frechet_distance(*it.fake_moments, *it.real_moments)}

    return compute


def _kernel_distance(it: Comparison) -> Values:
    mean, std = kernel_distance(it.real, it.fake, subset_size=_SUBSET_SIZE, device=it.device)
    return {"kid": mean, "kid_std": std}


def _inception_score(it: Comparison) -> Values:
    mean, std = inception_score(it.fake, num_splits=_NUM_SPLITS)
    return {"is": mean, "is_std": std}


def _precision_recall(it: Comparison) -> Values:
    precision, recall = precision_recall(it.real, it.fake, k=3, device=it.device)
    return {"precision": precision, "recall": recall}


def _density_coverage(it: Comparison) -> Values:
    density, coverage = density_coverage(it.real, it.fake, k=5, device=it.device)
    return {"density": density, "coverage": coverage}


def _cmmd(it: Comparison) -> Values:
    return {"cmmd": rbf_mmd(it.real, it.fake, device=it.device)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """What a metric's name stands for.

    Attributes:
        name: Name on the command line and in score rows.
        feature: Detector and output that see the images.
        needs: What of the feature is kept: ``moments`` or ``vectors``.
        compute: Named values of the metric; the first is the headline.
        num_images: Number of generated images.
        at_least: The fewest images with which it means anything.
        subset_size: Images in each random subset that it draws; None if it draws none.
        has_reference: Whether real images are compared with.
        at_most_dataset: Generate no more images than the reference has.
        of_supports: Whether it is of images made from supports of a class, against that class.
        description: One line for ``--help``.
    """

    name: str
    feature: Feature
    needs: str
    compute: Callable[[Comparison], Values]
    num_images: int
    at_least: int = 2
    subset_size: int | None = None
    has_reference: bool = True
    at_most_dataset: bool = False
    of_supports: bool = False
    description: str

    def image_count(self, reference: Reference | None, num_images: int | None = None) -> int:
        """Return the number of images to generate; ``num_images`` overrides the metric's own."""
        if num_images is not None:
            return num_images
        if self.at_most_dataset and reference is not None and reference.count is not None:
            return min(self.num_images, reference.count)
        return self.num_images


def _specs() -> Iterable[MetricSpec]:
    """Yield the metrics. Names are StyleGAN's: count of images, neighbours, ``full`` dataset."""
    inception, spatial = Feature("inception"), Feature("inception", "spatial")
    logits, dinov2, clip = Feature("inception", "logits"), Feature("dinov2"), Feature("clip")
    pixels = Feature("pixels")
    neighbours = dict(needs="vectors", compute=_precision_recall, at_least=4)
    coverage = dict(needs="vectors", compute=_density_coverage, at_least=6)
    kid = dict(needs="vectors", compute=_kernel_distance, subset_size=_SUBSET_SIZE)
    rows = {
        "fid{}_full": (inception, dict(needs="moments", compute=_frechet("fid")), "FID"),
        "sfid{}_full": (
            spatial,
            dict(needs="moments", compute=_frechet("sfid")),
            "sFID, of spatial Inception features",
        ),
        "kid{}_full": (inception, kid, "Kernel Inception Distance and its spread"),
        "is{}": (
            logits,
            dict(
                needs="vectors",
                compute=_inception_score,
                has_reference=False,
                at_least=_NUM_SPLITS,
            ),
            "Inception Score and its spread",
        ),
        "pr{}3_full": (inception, neighbours, "Improved precision and recall, k = 3"),
        "dc{}5_full": (inception, coverage, "Density and coverage, k = 5"),
        "fd_dinov2_{}_full": (
            dinov2,
            dict(needs="moments", compute=_frechet("fd_dinov2")),
            "Fréchet distance of DINOv2 features",
        ),
        "cmmd{}_full": (clip, dict(needs="vectors", compute=_cmmd), "CLIP MMD, times 1,000"),
    }
    for name, (feature, fields, text) in rows.items():
        for count in ("10k", "30k", "50k") if name.startswith("cmmd") else ("10k", "50k"):
            number = int(count[:-1]) * 1000
            versus = " against the whole dataset" if fields.get("has_reference", True) else ""
            yield MetricSpec(
                name=name.format(count),
                feature=feature,
                num_images=number,
                description=f"{text}; {number:,} images{versus}",
                **fields,
            )
    of_supports = {
        "fewshot_fid": (inception, dict(needs="moments", compute=_frechet("fid")), "FID"),
        "fewshot_kid": (inception, kid, "Kernel Inception Distance and its spread"),
        "fewshot_pr": (inception, neighbours, "Precision and recall, k = 3,"),
        "fewshot_fd_pixels": (
            pixels,
            dict(needs="moments", compute=_frechet("fd_pixels")),
            "Fréchet distance of pixels",
        ),
        "fewshot_kid_pixels": (pixels, kid, "Kernel distance of pixels and its spread"),
        "fewshot_pr_pixels": (pixels, neighbours, "Precision and recall of pixels, k = 3,"),
    }
    for name, (feature, fields, text) in of_supports.items():
        yield MetricSpec(
            name=name,
            feature=feature,
            num_images=10_000,
            at_most_dataset=True,
            of_supports=True,
            description=f"{text} of images made from supports, against images of the same classes; "
            "10,000 images, or as many as there are real ones",
            **fields,
        )
    small = {
        "fd_pixels": (dict(needs="moments", compute=_frechet("fd_pixels")), "Fréchet distance"),
        "kid_pixels": (kid, "Kernel distance and its spread"),
        "pr_pixels": (neighbours, "Precision and recall, k = 3,"),
        "dc_pixels": (coverage, "Density and coverage, k = 5,"),
    }
    for name, (fields, text) in small.items():
        yield MetricSpec(
            name=name,
            feature=pixels,
            num_images=2_000,
            at_most_dataset=True,
            description=f"{text} of the pixels in 0..1; min(dataset size, 2,000) images",
            **fields,
        )


METRICS: dict[str, MetricSpec] = {spec.name: spec for spec in _specs()}


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


def needed_features(
    metrics: Iterable[MetricSpec], *, of_reference: bool = False, per_class: bool = False
) -> dict[Feature, tuple[str, ...]]:
    """Return what the metrics need to know of each feature of the generated or the real images.

    Numbers per class need the vectors of every feature.
    """
    needs: dict[Feature, dict[str, None]] = {}
    for metric in metrics:
        if metric.has_reference or not of_reference:
            wanted = needs.setdefault(metric.feature, {})
            wanted[metric.needs] = None
            if per_class:
                wanted["vectors"] = None
    return {feature: tuple(sorted(wanted)) for feature, wanted in needs.items()}


def score(
    metrics: Sequence[MetricSpec],
    generate: GenerateFn,
    references: References,
    detectors: Mapping[str, Detector],
    device: torch.device | str,
    *,
    num_images: int | None = None,
    labels: Callable[[int], np.ndarray] | None = None,
    class_names: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return one row per metric, equal on every rank. Collective.

    No image is generated and no feature computed twice: metrics of fewer images use the first ones
    of those of more. ``generate`` is called with consecutive ranges of image indices for that.

    Args:
        metrics: What to compute.
        generate: ``generate(range(start, stop))`` yields this rank's share of the images with those
            indices, in any order and any split over batches and ranks, each with its index. An
            image must depend on its index alone.
        references: What is known of the real images; needed by every metric that has a reference.
        detectors: Detectors on ``device``, by name.
        device: Where features, their sums and the metrics are computed.
        num_images: Number of images instead of that of the metrics.
        labels: ``labels(n)`` is the class of each of the first n images, int64 [n]. With it, rows
            also hold the numbers of each class of which the reference knows labelled vectors.
        class_names: Names of the classes.

    A row holds metric, value (the headline), values (all), num_images, the detector with its hash,
    preprocessing and precision, the reference with its hash and count, seconds since the start,
    and a list of warnings. The caller adds how the images were made. Raises ValueError for a
    reference that lacks what a metric needs or is of another detector, and for a wrong number of
    images.
    """
    start_sec = time.monotonic()
    counts, warnings = {}, {}
    for metric in metrics:
        reference = _reference_of(metric, references)
        counts[metric.name] = metric.image_count(reference, num_images)
        _check_count(metric, counts[metric.name], reference)
        warnings[metric.name] = (
            []
            if reference is None
            else reference.check_detector(detectors[metric.feature.detector])
        )
    sets: dict[Feature, FeatureSet] = {}
    rows: dict[str, dict[str, Any]] = {}
    done = 0
    for stop in sorted(set(counts.values())):
        pending = [metric for metric in metrics if counts[metric.name] >= stop]
        needs = needed_features(pending, per_class=labels is not None)
        collected = collect_features(detectors, needs, generate(range(done, stop)), device)
        for feature, part in collected.items():
            sets[feature] = sets[feature].merged(part) if feature in sets else part
        for metric in pending:
            if counts[metric.name] == stop:
                rows[metric.name] = _row(
                    metric,
                    stop,
                    sets[metric.feature],
                    _reference_of(metric, references),
                    detectors[metric.feature.detector],
                    warnings[metric.name],
                    None if labels is None else labels(stop),
                    class_names,
                    device,
                )
                seconds = distributed.broadcast_object(time.monotonic() - start_sec)
                rows[metric.name]["seconds"] = round(seconds, 3)
        done = stop
    return [rows[metric.name] for metric in metrics]


def _reference_of(metric: MetricSpec, references: References) -> Reference | None:
    if not metric.has_reference:
        return None
    reference = references.get(metric.feature)
    if reference is not None:
        reference = reference.of(metric.needs)
    if reference is None or metric.needs not in reference.knows:
        source = next((found.source for found in references.values()), "the reference")
        raise ValueError(
            f"{metric.name}: {source} holds no {metric.needs} of {metric.feature}; give the images "
            "themselves as the reference, or make it anew with `fid.py ref --metrics="
            f"{metric.name}`."
        )
    return reference


def _check_count(metric: MetricSpec, count: int, reference: Reference | None) -> None:
    if count < metric.at_least:
        raise ValueError(f"{metric.name}: needs at least {metric.at_least} images; got {count}.")
    if metric.needs == "vectors" and reference and reference.num_vectors < metric.at_least:
        raise ValueError(
            f"{metric.name}: needs at least {metric.at_least} real images; {reference.source} has "
            f"{reference.num_vectors}."
        )


def _row(
    metric: MetricSpec,
    num_images: int,
    found: FeatureSet,
    reference: Reference | None,
    detector: Detector,
    warnings: list[str],
    labels: np.ndarray | None,
    class_names: Sequence[str],
    device: torch.device | str,
) -> dict[str, Any]:
    def compute() -> dict[str, Any]:
        count = len(found.vectors.array) if found.moments is None else found.moments.count
        if count != num_images:
            raise ValueError(
                f"{metric.name}: needs {num_images} images, but got {count}. Provide as many, or "
                "give the number of images to score."
            )
        by_moments = metric.needs == "moments"
        comparison = Comparison(
            fake=None if by_moments else found.vectors.array,
            real=None if by_moments or reference is None else reference.vectors,
            fake_moments=_moments(found) if by_moments else None,
            real_moments=(reference.mu, reference.sigma) if by_moments else None,
            device=device,
        )
        try:
            values = metric.compute(comparison)
        except ValueError as error:
            source = "" if reference is None else f" against {reference.source}"
            raise ValueError(f"{metric.name}{source}: {error}") from error
        row = dict(metric=metric.name, value=next(iter(values.values())), values=values)
        if labels is not None:
            classes = _per_class(metric, found, reference, labels, class_names, device)
            if classes:
                row["per_class"] = classes
        if reference is not None:
            row.update(
                reference=reference.source,
                reference_hash=reference.hash,
                reference_count=reference.count,
            )
            if not by_moments:
                row["reference_vectors"] = reference.num_vectors
        return row

    row = distributed.on_main(compute)
    return dict(
        row,
        num_images=num_images,
        detector=str(metric.feature),
        detector_hash=detector.hash,
        preprocessing=detector.preprocessing,
        detector_precision=detector.precision,
        warnings=warnings + _count_warnings(metric, num_images, reference, detector),
    )


def _moments(found: FeatureSet) -> tuple[np.ndarray, np.ndarray]:
    return found.moments.mean(), found.moments.covariance()


def _count_warnings(
    metric: MetricSpec, num_images: int, reference: Reference | None, detector: Detector
) -> list[str]:
    if metric.subset_size is not None:
        size = min(num_images, reference.num_vectors)
        if size >= metric.subset_size:
            return []
        return [
            f"low count: subsets of {size} images instead of {metric.subset_size:,}; they overlap, "
            "and their spread is too small"
        ]
    width = detector.outputs[metric.feature.output]
    sides = [(num_images, "images")]
    if reference is not None:
        sides.append((reference.count, "reference images"))
    if metric.needs != "moments":
        return []
    return [
        f"low count: {count} {what} for {width} features; the distance is biased upwards and "
        "comparable only at equal counts"
        for count, what in sides
        if count is not None and count <= width
    ]


def _per_class(
    metric: MetricSpec,
    found: FeatureSet,
    reference: Reference | None,
    labels: np.ndarray,
    class_names: Sequence[str],
    device: torch.device | str,
) -> dict[str, dict[str, float]]:
    """Return the metric's values and counts for each class that both sides have enough of."""
    if metric.has_reference:
        reference = reference.of("vectors")
        if reference.vectors is None or reference.labels is None:
            return {}
    names = [str(name) for name in class_names]
    classes: dict[str, dict[str, float]] = {}
    for label in np.unique(labels):
        fake = found.vectors.array[labels == label]
        real = None if reference is None else reference.vectors[reference.labels == label]
        fewest = len(fake) if real is None else min(len(fake), len(real))
        if fewest < metric.at_least:
            continue
        values = metric.compute(Comparison(fake=fake, real=real, device=device))
        counts = dict(num_images=len(fake))
        if real is not None:
            counts["reference_count"] = len(real)
        name = names[label] if label < len(names) else str(label)
        if names.count(name) > 1:
            name = f"{name} ({label})"
        classes[name] = {**values, **counts}
    return classes
