"""Scores of generated images: any number of metrics, computed in one pass over the images."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dnnlib.errors import NotFiniteError, refusal
from metrics.detectors import Detector, DetectorOutput
from metrics.metric import Comparison, MetricSpec, needed_outputs
from metrics.reference import Reference, References
from metrics.statistics import Batch, Collected, collect_outputs
from torch_utils import distributed

GenerateFn = Callable[[range], Iterable[Batch]]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A metric with its number of images, its detector, and the reference it compares with."""

    metric: MetricSpec
    num_images: int
    detector: Detector
    reference: Reference | None
    warnings: list[str]


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

    No image is generated twice or seen by a detector twice: a metric that takes fewer images than
    another uses the first ones. To this end ``generate`` is called with consecutive index ranges.

    Args:
        metrics: The metrics to compute.
        generate: ``generate(range(start, stop))`` yields this rank's share of the images with those
            indices, in any order and any split over batches and ranks, each with its index. An
            image must depend on its index alone.
        references: Statistics of the real images.
        detectors: Detectors on ``device``, by name.
        device: Where outputs, their sums and the metrics are computed.
        num_images: Number of generated images; overrides that of each metric.
        labels: ``labels(n)`` returns the class of each of the first n images, int64 [n]. With it,
            rows also hold values per class; a metric with a reference needs labelled vectors in it.
        class_names: Names of the classes.

    A row holds metric, value (the headline), values (all), num_images, the detector with its hash,
    preprocessing and precision, the reference with its hash and count, spread (total variance of
    the generated side over that of the real one), seconds since the start, and a list of warnings.
    The caller adds how the images were made. Raises ValueError if a reference lacks what a metric
    needs or comes from another detector, and for a wrong number of images; NotFiniteError for
    values that are not finite.
    """
    start_sec = time.monotonic()
    plans = [_plan(metric, references, detectors, num_images) for metric in metrics]
    collected: dict[DetectorOutput, Collected] = {}
    rows: dict[str, dict[str, Any]] = {}
    done = 0
    for stop in sorted({plan.num_images for plan in plans}):
        pending = [plan for plan in plans if plan.num_images >= stop]
        needs = needed_outputs((plan.metric for plan in pending), per_class=labels is not None)
        parts = collect_outputs(detectors, needs, generate(range(done, stop)), device)
        for output, part in parts.items():
            collected[output] = collected[output].merged(part) if output in collected else part
        classes = None if labels is None else (labels(stop), class_names)
        for plan in pending:
            if plan.num_images == stop:
                found = collected[plan.metric.output]
                row = distributed.on_main(functools.partial(_row, plan, found, classes, device))
                seconds = distributed.broadcast_object(time.monotonic() - start_sec)
                rows[plan.metric.name] = dict(row, seconds=round(seconds, 3))
        done = stop
    return [rows[metric.name] for metric in metrics]


def _plan(
    metric: MetricSpec,
    references: References,
    detectors: Mapping[str, Detector],
    num_images: int | None,
) -> _Plan:
    """Return how a metric is computed; raises ValueError if it cannot be."""
    detector = detectors[metric.output.detector]
    reference = _reference_of(metric, references)
    count = metric.image_count(reference, num_images)
    if count < metric.at_least:
        raise ValueError(f"{metric.name}: needs at least {metric.at_least} images; got {count}.")
    if metric.needs == "vectors" and reference and reference.num_vectors < metric.at_least:
        there = f"{reference.source} has {reference.num_vectors}"
        raise refusal(metric.name, but=f"needs at least {metric.at_least} real images; {there}")
    warnings = [] if reference is None else reference.check_detector(detector)
    warnings += _count_warnings(metric, count, reference, detector)
    return _Plan(metric, count, detector, reference, warnings)


def _reference_of(metric: MetricSpec, references: References) -> Reference | None:
    if not metric.has_reference:
        return None
    reference = references.get(metric.output)
    if reference is not None:
        reference = reference.of(metric.needs)
    if reference is None or metric.needs not in reference.knows:
        source = next((found.source for found in references.values()), "the reference")
        but = f"{source} holds no {metric.needs} of {metric.output}"
        remedy = f"make it again with `fid.py ref --metrics={metric.name}`"
        remedy = f"give the images themselves as the reference, or {remedy}"
        raise refusal(metric.name, but=but, remedy=remedy)
    return reference


def _count_warnings(
    metric: MetricSpec, num_images: int, reference: Reference | None, detector: Detector
) -> list[str]:
    if metric.subset_size is not None:
        size = min(num_images, reference.num_vectors)
        found = f"low count: subsets of {size} images instead of {metric.subset_size:,}"
        few = size < metric.subset_size
        return [f"{found}; they overlap, and their spread is too small"] if few else []
    if metric.needs != "moments":
        return []
    dim = detector.outputs[metric.output.name]
    return [
        f"low count: {count} {what} for {dim} dimensions; the distance is biased upwards and "
        "comparable only at equal counts"
        for count, what in ((num_images, "images"), (reference.count, "reference images"))
        if count is not None and count <= dim
    ]


def _row(
    plan: _Plan, found: Collected, classes: tuple | None, device: torch.device | str
) -> dict[str, Any]:
    """Return the row of a metric, on rank 0; ``classes`` are :func:`_per_class`'s labels, names."""
    metric, reference, detector = plan.metric, plan.reference, plan.detector
    if found.count != plan.num_images:
        but = f"needs {plan.num_images} images, but got {found.count}"
        remedy = "provide as many, or give the number of images to score"
        raise refusal(metric.name, but=but, remedy=remedy)
    if metric.needs == "moments":
        moments = (found.moments.mean(), found.moments.covariance())
        real_moments = (reference.mu, reference.sigma)
        comparison = Comparison(fake_moments=moments, real_moments=real_moments, device=device)
    else:
        real = None if reference is None else reference.vectors
        comparison = Comparison(fake=found.vectors.array, real=real, device=device)
    try:
        values = metric.compute(comparison)
    except ValueError as error:
        source = "" if reference is None else f" against {reference.source}"
        raise ValueError(f"{metric.name}{source}: {error}") from error
    if not np.isfinite(list(values.values())).all():
        raise NotFiniteError(
            f"{metric.name}: the values are not finite ({values}); check the outputs of "
            f"{metric.output} with --detector-precision=fp32."
        )
    row = dict(metric=metric.name, value=next(iter(values.values())), values=values)
    if reference is not None:
        row["spread"] = _relative_spread(comparison)
    if classes is not None:
        per_class = _per_class(plan, found.vectors.array, *classes, device)
        row.update(dict(per_class=per_class) if per_class else {})
    if reference is not None:
        row.update(reference=reference.source, reference_hash=reference.hash)
        row["reference_count"] = reference.count
        if reference.images is not None:
            channels, height, width, formats = reference.images
            row["reference_images"] = f"{width}x{height}x{channels}, {formats}"
        if metric.needs == "vectors":
            row["reference_vectors"] = reference.num_vectors
    return dict(
        row,
        num_images=plan.num_images,
        detector=str(metric.output),
        detector_hash=detector.hash,
        preprocessing=detector.preprocessing,
        detector_precision=detector.precision,
        warnings=plan.warnings,
    )


def _relative_spread(comparison: Comparison) -> float | None:
    """Return the total variance of the generated side over that of the real one; None if 0."""
    it = comparison
    if it.fake_moments is not None and it.real_moments is not None:
        fake, real = (np.trace(sigma) for _, sigma in (it.fake_moments, it.real_moments))
    else:
        fake, real = (np.var(vectors, axis=0, ddof=1).sum() for vectors in (it.fake, it.real))
    return float(fake / real) if real > 0 else None


def _per_class(
    plan: _Plan,
    vectors: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    device: torch.device | str,
) -> dict[str, dict[str, float]]:
    """Return the metric's values and counts for each class with enough images on both sides.

    ``vectors`` [N, D] are those of the generated images, ``labels`` [N] their class indices;
    ``names`` are the names of all classes.
    """
    metric, reference = plan.metric, plan.reference
    if reference is not None:
        reference = reference.of("vectors")
        if reference.vectors is None or reference.labels is None:
            return {}
    names = [str(name) for name in names]
    result: dict[str, dict[str, float]] = {}
    for label in np.unique(labels):
        fake = vectors[labels == label]
        real = None if reference is None else reference.vectors[reference.labels == label]
        counts = dict(num_images=len(fake))
        if real is not None:
            counts["reference_count"] = len(real)
        if min(counts.values()) < metric.at_least:
            continue
        values = metric.compute(Comparison(fake=fake, real=real, device=device))
        name = names[label] if label < len(names) else str(label)
        if names.count(name) > 1:
            name = f"{name} ({label})"
        result[name] = {**values, **counts}
    return result
