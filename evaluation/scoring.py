"""Scores of images against real ones: detectors, references and score rows of metrics."""

import dataclasses
import functools
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from data.images.dataset import ImageDataset, open_images
from dnnlib.downloads import fetch
from dnnlib.errors import refusal
from evaluation.images import ImageSource, formats_of, read_images, shape_of, size_text
from metrics.config import DetectorConfig
from metrics.detectors import Detector, DetectorOutput, ImageShape, get_detector
from metrics.metric import MetricSpec, needed_outputs
from metrics.reference import References, load_references
from metrics.reference_cache import references_for, vector_subset
from metrics.score import score
from metrics.statistics import Batch
from models import ModelConfig
from torch_utils import distributed

Needs = Mapping[DetectorOutput, Sequence[str]]
_STATISTICS_SUFFIXES = (".npz", ".pkl")


def make_detectors(
    names: Iterable[str], config: DetectorConfig, shape: ImageShape | None, device: torch.device
) -> dict[str, Detector]:
    """Return the detectors called ``names``, each with its settings in ``config``. Collective."""
    return {
        name: get_detector(name, device, image_shape=shape, **config.arguments(name))
        for name in dict.fromkeys(names)
    }


def dataset_references(
    dataset: ImageDataset,
    needs: Needs,
    detectors: Mapping[str, Detector],
    device: torch.device,
    batch: int = 64,
) -> References:
    """Return the references that ``needs`` asks for, of all images of a dataset. Collective.

    They come from the cache if possible. If the dataset has labels, vectors carry their class.
    """
    references = references_for(
        needs,
        detectors,
        lambda indices: read_images(dataset, batch, "Reference", indices),
        distributed.on_main(lambda: dataset.content_hash),
        device,
        num_images=len(dataset),
        source=dataset.name,
    )
    names, images = tuple(dataset.class_names), (*shape_of(dataset), formats_of(dataset))
    labels = None if dataset.labels is None else dataset.labels[vector_subset(len(dataset))]
    for output, reference in references.items():
        own = labels if reference.num_vectors else None
        known = dict(images=images, class_names=names, labels=own)
        references[output] = dataclasses.replace(reference, **known)
    return references


class RealImages:
    """The real images that metrics compare with: a dataset, a file of statistics, or both in one.

    Args:
        location: An open dataset; a folder or zip of images; an ``.npz`` of this project, of EDM or
            of ADM; or a ``.pkl`` of EDM2. A file of statistics may be a URL.

    Attributes:
        image_shape: (C, H, W); None if the statistics do not state it.
        formats: File formats of the images, such as ``png``; None if the statistics do not state
            them.
    """

    def __init__(self, location: str | ImageDataset) -> None:
        self._dataset, self._statistics = None, None
        if not isinstance(location, str):
            self._dataset = location
            self.image_shape, self.formats = shape_of(location), formats_of(location)
            return
        path, arrays = distributed.in_turn(lambda: _fetch_arrays(location))
        if arrays is None or "arr_0" in arrays:
            self._dataset = open_images(path)
        if arrays is not None and (self._dataset is None or "mu" in arrays):
            self._statistics = load_references(location)
        self.image_shape, self.formats = None, None
        if self._dataset is not None:
            self.image_shape, self.formats = shape_of(self._dataset), formats_of(self._dataset)
        for found in (self._statistics or {}).values():
            if self.image_shape is None and found.images is not None:
                *shape, self.formats = found.images
                self.image_shape = tuple(shape)

    def knows_classes(self) -> bool:
        """Return whether classes are known, as scores per class require."""
        if self._statistics is not None:
            return any(found.labels is not None for found in self._statistics.values())
        return self._dataset.labels is not None

    def references(
        self, needs: Needs, detectors: Mapping[str, Detector], device: torch.device, batch: int = 64
    ) -> References:
        """Return the stored statistics, and whatever else of ``needs`` images allow to compute.

        Collective.
        """
        known = dict(self._statistics or {})
        if self._dataset is None:
            return known
        missing: dict[DetectorOutput, list[str]] = {}
        for output, kinds in needs.items():
            there = known[output].knows if output in known else ()
            missing[output] = [kind for kind in kinds if kind not in there]
        missing = {output: kinds for output, kinds in missing.items() if kinds}
        made = dataset_references(self._dataset, missing, detectors, device, batch)
        for output, found in made.items():
            # A file of ADM holds moments of all images, and the first 10,000 images themselves.
            before = known.get(output)
            known[output] = found if before is None else dataclasses.replace(before, sample=found)
        return known


def _fetch_arrays(location: str) -> tuple[str, tuple[str, ...] | None]:
    """Return a local path and the names of the arrays in that file; None for folders and zips."""
    if not location.endswith(_STATISTICS_SUFFIXES):
        return location, None
    path = fetch(location)
    if path.suffix == ".npz" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            return str(path), tuple(name.removesuffix(".npy") for name in file.namelist())
    return str(path), ()


def check_images(
    metrics: Sequence[MetricSpec],
    source: ImageSource,
    real: RealImages | None,
    num_images: int | None,
    num_blocks: int,
) -> list[str]:
    """Return warnings about scoring ``source``. Raises ValueError if it cannot be scored.

    It cannot if it has too few images, or if its shape does not fit that of the real images.
    """
    warnings: list[str] = []
    real_shape = None if real is None else real.image_shape
    formats = None if real is None else real.formats
    if formats is not None and ("jpeg" in formats) != ("jpeg" in source.formats):
        warnings.append(
            f"the images are {source.formats} and the reference is {formats}: traces of JPEG "
            "compression count as a difference"
        )
    if real_shape is not None and real_shape != source.image_shape:
        (channels, *size), (real_channels, *real_size) = source.image_shape, real_shape
        if channels != real_channels:
            raise ValueError(
                f"The images have {channels} channel(s) and the reference has {real_channels}; "
                "compare images of the same kind (grayscale 1, RGB 3)."
            )
        height, width = size
        but = f"the images are {width}x{height} and the reference is {real_size[1]}x{real_size[0]}"
        for metric in metrics:
            if metric.output.detector == "pixels":
                remedy = "pixels can be compared at equal sizes only"
                raise refusal(metric.name, but=but, remedy=remedy)
        warnings.append(but)
    for metric in metrics:
        if num_images is not None or not metric.at_most_dataset:
            _check_count(metric, num_images or metric.num_images, source, num_blocks)
    return warnings


def _check_count(metric: MetricSpec, wanted: int, source: ImageSource, num_blocks: int) -> None:
    if source.num_images is not None and wanted * num_blocks > source.num_images:
        blocks = f" in each of {num_blocks} blocks" if num_blocks > 1 else ""
        remedy, fewer = "provide more", source.num_images // num_blocks
        if fewer >= metric.at_least:
            remedy = f"provide as many, or score fewer with --num-images={fewer} (the row says so)"
        but = f"needs {wanted:,} images{blocks}, but there are {source.num_images:,}"
        raise refusal(metric.name, but=but, remedy=remedy)


def score_images(
    metrics: Sequence[MetricSpec],
    source: ImageSource,
    references: References,
    detectors: Mapping[str, Detector],
    device: torch.device,
    *,
    num_images: int | None = None,
    per_class: bool = False,
    num_blocks: int = 1,
) -> list[dict[str, Any]]:
    """Return one score row per metric, with all facts on how it was computed. Collective.

    With ``num_blocks`` above 1, as many disjoint blocks of consecutive images (seeds) are scored. A
    row is then that of the first block, and ``noise_band`` in it has the spread over all blocks.

    Args:
        num_images: Images in a block; None for as many as each metric wants.
        per_class: Whether rows have scores per class, if classes are known.
    """
    counts = [metric.image_count(references.get(metric.output), num_images) for metric in metrics]
    for metric, count in zip(metrics, counts, strict=True):
        _check_count(metric, count, source, num_blocks)
    warnings = []
    has_labels = per_class and source.labels(range(1)) is not None
    names = {found.class_names for found in references.values() if found.labels is not None}
    if has_labels and names - {source.class_names}:
        has_labels = False
        warnings.append("the classes have other names than the reference's: no numbers per class")

    def score_block(start: int) -> list[dict[str, Any]]:
        def generate(indices: range) -> Iterable[Batch]:
            shifted = range(start + indices.start, start + indices.stop)
            for batch_indices, images in source.batches(shifted):
                yield batch_indices - start, images

        def labels(count: int) -> np.ndarray:
            return source.labels(range(start, start + count))

        rows = score(
            metrics,
            generate,
            references,
            detectors,
            device,
            num_images=num_images,
            labels=labels if has_labels else None,
            class_names=source.class_names,
        )
        for row in rows:
            row["warnings"] = warnings + row["warnings"]
            images = range(start, start + row["num_images"])
            row.update(distributed.on_main(functools.partial(source.passport, images)))
        return rows

    blocks = [score_block(block * max(counts)) for block in range(num_blocks)]
    if num_blocks == 1:
        return blocks[0]
    return [{**rows[0], "noise_band": _noise_band(rows)} for rows in zip(*blocks, strict=True)]


def _noise_band(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the spread of each value over the blocks; EDM quotes the lowest of three FIDs."""
    band: dict[str, Any] = {}
    for name in rows[0]["values"]:
        values = np.array([row["values"][name] for row in rows])
        found = dict(mean=values.mean(), std=values.std(ddof=1), min=values.min(), max=values.max())
        band[name] = {key: float(value) for key, value in found.items()}
        band[name]["values"] = values.tolist()
    seeds = [row.get("seeds", f"images from {row.get('first_image')}") for row in rows]
    return dict(band, seeds=seeds)


def describe_score(row: Mapping[str, Any], num_classes_shown: int = 20) -> str:
    """Return a score row as text: values, spread, warnings, and the scores of each class."""
    values = ", ".join(f"{name} {value:.6g}" for name, value in row["values"].items())
    if len(row["values"]) == 1:
        values = f"{row['value']:.6g}"
    lines = [f"{row['metric']} {values} ({row['num_images']:,} images)"]
    for name, band in row.get("noise_band", {}).items():
        if name != "seeds":
            spread = "mean {mean:.6g}, std {std:.3g}, min {min:.6g}, max {max:.6g}".format(**band)
            num = len(band["values"])
            lines.append(f"  noise band of {name} over {num} disjoint blocks: {spread}")
    lines += [f"  warning: {warning}" for warning in row["warnings"]]
    classes = row.get("per_class", {})
    for name, found in list(classes.items())[:num_classes_shown]:
        counts = [f"{found['num_images']:,} images"]
        if "reference_count" in found:
            counts.append(f"{found['reference_count']:,} real")
        shown = ", ".join(f"{key} {found[key]:.6g}" for key in row["values"])
        lines.append(f"  class {name}: {shown} ({', '.join(counts)})")
    if len(classes) > num_classes_shown:
        lines.append(f"  ... and {len(classes) - num_classes_shown} more classes (see --json)")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """How images are scored: by which metrics, against what, and how many.

    Attributes:
        metrics: The metrics to compute.
        real: The real images that they compare with; None if no metric needs any.
        detectors: Settings of the detectors.
        num_images: Images per block; None for as many as each metric wants.
        num_blocks: Number of disjoint blocks that are scored, for the spread of the scores.
        batch: Real images per pass of a detector.
    """

    metrics: Sequence[MetricSpec]
    real: RealImages | None = None
    detectors: DetectorConfig = DetectorConfig()
    num_images: int | None = None
    num_blocks: int = 1
    batch: int = 64

    def check(self, source: ImageSource) -> list[str]:
        """Return warnings about scoring ``source``. Raises ValueError if it cannot be scored."""
        return check_images(self.metrics, source, self.real, self.num_images, self.num_blocks)

    def rows(
        self, source: ImageSource, device: torch.device, *, per_class: bool = False
    ) -> list[dict[str, Any]]:
        """Return one score row of ``source`` per metric, with all warnings. Collective."""
        warnings = self.check(source)
        names = sorted({spec.output.detector for spec in self.metrics})
        detectors = make_detectors(names, self.detectors, source.image_shape, device)
        needs = needed_outputs(self.metrics, of_reference=True, per_class=per_class)
        real, references = self.real, {}
        if real is not None:
            references = real.references(needs, detectors, device, self.batch)
        settings = dict(num_images=self.num_images, num_blocks=self.num_blocks)
        rows = score_images(
            self.metrics, source, references, detectors, device, per_class=per_class, **settings
        )
        return [{**row, "warnings": warnings + row["warnings"]} for row in rows]


def check_reference(metrics: Sequence[MetricSpec], ref: str | None, where: str) -> None:
    """Raise ValueError if a metric lacks its reference, or if no metric uses the reference.

    ``where`` names the option of the reference in the error.
    """
    compared = [spec.name for spec in metrics if spec.has_reference]
    if compared and ref is None:
        raise ValueError(f"{where}: {compared[0]} compares with real images; give them.")
    if ref is not None and not compared:
        names = ",".join(spec.name for spec in metrics)
        raise ValueError(f"{where} has no effect with --metrics={names}; leave it out.")


def make_evaluate(
    metrics: Sequence[MetricSpec],
    config: DetectorConfig,
    real: RealImages | None,
    model: ModelConfig,
    device: torch.device,
    parts: tuple[ImageDataset, ImageDataset] | None = None,
) -> Callable[[tuple[str, ...], Callable], list[dict[str, Any]]]:
    """Return the function with which the training loop scores a model's images against real ones.

    With ``parts`` (training images, held-out images), it also returns the rows of
    :class:`evaluation.held_out.HeldOutScores`. Detectors and references are loaded here, so that a
    missing one stops the run before it starts and not hours later. Collective.
    """
    names = sorted({metric.output.detector for metric in metrics})
    found = None if real is None else real.image_shape
    expected = shape_of(model)
    if found is not None and (found[0] != expected[0] or ("pixels" in names and found != expected)):
        but = f"holds images of {size_text(found)}, but the model makes {size_text(expected)}"
        raise refusal("--metrics-ref", but=but, remedy="give images of the same kind")
    detectors = make_detectors(names, config, expected, device)
    needs = needed_outputs(metrics, of_reference=True)
    references = {} if real is None else real.references(needs, detectors, device)
    by_name, further = {metric.name: metric for metric in metrics}, None
    if parts is not None:
        from evaluation.held_out import HeldOutScores

        further = HeldOutScores(metrics, *parts, detectors, device)

    def evaluate(wanted: tuple[str, ...], generate: Callable) -> list[dict[str, Any]]:
        chosen = [by_name[name] for name in wanted]
        rows = score(chosen, generate, references, detectors, device)
        return rows if further is None else rows + further.rows(wanted, generate)

    return evaluate
