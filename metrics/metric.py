"""The metrics by name: what detector output each compares, how, and over how many images.

The code that computes a metric is imported only when it runs, because commands need the names and
descriptions merely for their options.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from dnnlib.config import unknown
from metrics.detectors import DetectorOutput

if TYPE_CHECKING:
    import numpy as np
    import torch

    from metrics.reference import Reference

Values = dict[str, float]
_NUM_SPLITS = 10
_SUBSET_SIZE = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A detector output for generated and for real images, as given to a metric on rank 0.

    Either side is vectors [N, D] in the order of the images, or moments: mean [D] and covariance
    [D, D]. Metrics without a reference have no real side.
    """

    fake: np.ndarray | None = None
    real: np.ndarray | None = None
    fake_moments: tuple[np.ndarray, np.ndarray] | None = None
    real_moments: tuple[np.ndarray, np.ndarray] | None = None
    device: torch.device | str = "cpu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """Definition of a metric."""

    name: str  # On the command line and in score rows.
    output: DetectorOutput  # The detector output that it compares.
    needs: str  # What is kept of the output: ``moments`` or ``vectors``.
    compute: Callable[[Comparison], Values]  # Returns named values; the first is the headline.
    num_images: int  # Number of generated images.
    at_least: int = 2  # The fewest images for which it is defined.
    subset_size: int | None = None  # Images in each random subset, if it draws subsets.
    has_reference: bool = True  # Whether it compares with real images.
    higher_is_better: bool = False  # Whether a higher headline value is better.
    at_most_dataset: bool = False  # Generate no more images than the reference has.
    of_supports: bool = False  # Compares images made from supports with real ones of their classes.
    description: str  # One line for ``--help``.

    def image_count(self, reference: Reference | None, num_images: int | None = None) -> int:
        """Return the number of images to generate; ``num_images`` overrides the metric's own."""
        if num_images is not None:
            return num_images
        if self.at_most_dataset and reference is not None and reference.count is not None:
            return min(self.num_images, reference.count)
        return self.num_images


def _frechet(name: str) -> dict[str, Any]:
    def compute(it: Comparison) -> Values:
        from metrics.frechet import frechet_distance, frechet_distance_of_samples

        if it.fake_moments is None or it.real_moments is None:
            return {name: frechet_distance_of_samples(it.fake, it.real)}
        return {name: frechet_distance(*it.fake_moments, *it.real_moments)}

    return dict(needs="moments", compute=compute)


def _vectors(
    names: tuple[str, ...], load: Callable[[], Callable], **settings: Any
) -> dict[str, Any]:
    """Return the fields of a metric that compares real and generated vectors.

    ``load`` imports and returns the function that computes it, ``names`` are those of its results,
    and ``settings`` are passed on to it.
    """

    def compute(it: Comparison) -> Values:
        found = load()(it.real, it.fake, **settings, device=it.device)
        return dict(zip(names, found if isinstance(found, tuple) else [found], strict=True))

    return dict(needs="vectors", compute=compute)


def _kernel_distance() -> Callable:
    from metrics.mmd import kernel_distance

    return kernel_distance


def _rbf_mmd() -> Callable:
    from metrics.mmd import rbf_mmd

    return rbf_mmd


def _precision_recall() -> Callable:
    from metrics.manifold import precision_recall

    return precision_recall


def _density_coverage() -> Callable:
    from metrics.manifold import density_coverage

    return density_coverage


def _inception_score(it: Comparison) -> Values:
    from metrics.inception_score import inception_score

    mean, std = inception_score(it.fake, num_splits=_NUM_SPLITS)
    return {"is": mean, "is_std": std}


# Endings of the descriptions, one per protocol; {} is the number of images.
FULL = "; {:,} images against the whole dataset"
ALONE = "; {:,} images"
SMALL = " of the pixels in 0..1; min(dataset size, {:,}) images"
SHOTS = (
    " of images made from supports, against images of the same classes; {:,} images, or as many as "
    "there are real ones"
)

INCEPTION, SPATIAL = DetectorOutput("inception"), DetectorOutput("inception", "spatial")
LOGITS, DINOV2 = DetectorOutput("inception", "logits"), DetectorOutput("dinov2")
CLIP, PIXELS = DetectorOutput("clip"), DetectorOutput("pixels")

FID, SFID = _frechet("fid"), _frechet("sfid")
FD_DINOV2, FD_PIXELS = _frechet("fd_dinov2"), _frechet("fd_pixels")
KID = _vectors(("kid", "kid_std"), _kernel_distance, subset_size=_SUBSET_SIZE)
KID["subset_size"] = _SUBSET_SIZE
IS = dict(needs="vectors", compute=_inception_score, at_least=_NUM_SPLITS, has_reference=False)
PR = dict(_vectors(("precision", "recall"), _precision_recall, k=3), at_least=4)
DC = dict(_vectors(("density", "coverage"), _density_coverage, k=5), at_least=6)
for _measure in (IS, PR, DC):
    _measure["higher_is_better"] = True
CMMD = _vectors(("cmmd",), _rbf_mmd)

# Names follow StyleGAN: number of images, number of neighbours, ``full`` for the whole dataset.
_TABLE = (
    ("fid10k_full", INCEPTION, FID, 10_000, FULL, "FID"),
    ("fid50k_full", INCEPTION, FID, 50_000, FULL, "FID"),
    ("sfid10k_full", SPATIAL, SFID, 10_000, FULL, "sFID, of spatial Inception outputs"),
    ("sfid50k_full", SPATIAL, SFID, 50_000, FULL, "sFID, of spatial Inception outputs"),
    ("kid10k_full", INCEPTION, KID, 10_000, FULL, "Kernel Inception Distance and its spread"),
    ("kid50k_full", INCEPTION, KID, 50_000, FULL, "Kernel Inception Distance and its spread"),
    ("is10k", LOGITS, IS, 10_000, ALONE, "Inception Score and its spread"),
    ("is50k", LOGITS, IS, 50_000, ALONE, "Inception Score and its spread"),
    ("pr10k3_full", INCEPTION, PR, 10_000, FULL, "Improved precision and recall, k = 3"),
    ("pr50k3_full", INCEPTION, PR, 50_000, FULL, "Improved precision and recall, k = 3"),
    ("dc10k5_full", INCEPTION, DC, 10_000, FULL, "Density and coverage, k = 5"),
    ("dc50k5_full", INCEPTION, DC, 50_000, FULL, "Density and coverage, k = 5"),
    ("fd_dinov2_10k_full", DINOV2, FD_DINOV2, 10_000, FULL, "Fréchet distance of DINOv2 outputs"),
    ("fd_dinov2_50k_full", DINOV2, FD_DINOV2, 50_000, FULL, "Fréchet distance of DINOv2 outputs"),
    ("cmmd10k_full", CLIP, CMMD, 10_000, FULL, "CLIP MMD, times 1,000"),
    ("cmmd30k_full", CLIP, CMMD, 30_000, FULL, "CLIP MMD, times 1,000"),
    ("cmmd50k_full", CLIP, CMMD, 50_000, FULL, "CLIP MMD, times 1,000"),
    ("fewshot_fid", INCEPTION, FID, 10_000, SHOTS, "FID"),
    ("fewshot_kid", INCEPTION, KID, 10_000, SHOTS, "Kernel Inception Distance and its spread"),
    ("fewshot_pr", INCEPTION, PR, 10_000, SHOTS, "Precision and recall, k = 3,"),
    ("fewshot_fd_pixels", PIXELS, FD_PIXELS, 10_000, SHOTS, "Fréchet distance of pixels"),
    ("fewshot_kid_pixels", PIXELS, KID, 10_000, SHOTS, "Kernel distance of pixels and its spread"),
    ("fewshot_pr_pixels", PIXELS, PR, 10_000, SHOTS, "Precision and recall of pixels, k = 3,"),
    ("fd_pixels", PIXELS, FD_PIXELS, 2_000, SMALL, "Fréchet distance"),
    ("kid_pixels", PIXELS, KID, 2_000, SMALL, "Kernel distance and its spread"),
    ("pr_pixels", PIXELS, PR, 2_000, SMALL, "Precision and recall, k = 3,"),
    ("dc_pixels", PIXELS, DC, 2_000, SMALL, "Density and coverage, k = 5,"),
)

METRICS: dict[str, MetricSpec] = {
    name: MetricSpec(
        name=name,
        output=output,
        num_images=num_images,
        at_most_dataset=protocol in (SMALL, SHOTS),
        of_supports=protocol == SHOTS,
        description=text + protocol.format(num_images),
        **measure,
    )
    for name, output, measure, num_images, protocol, text in _TABLE
}


def get_metric(name: str) -> MetricSpec:
    """Return the metric of that name; raises ValueError that suggests the nearest name."""
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]


def get_metrics(names: Iterable[str]) -> list[MetricSpec]:
    """Return the metrics of those names, each once, in the order given."""
    return [get_metric(name) for name in dict.fromkeys(names)]


def needed_outputs(
    metrics: Iterable[MetricSpec], *, of_reference: bool = False, per_class: bool = False
) -> dict[DetectorOutput, tuple[str, ...]]:
    """Return what the metrics need of each detector output: ``moments``, ``vectors`` or both.

    The needs are those for the generated images or, with ``of_reference``, for the real ones.
    ``per_class`` adds the vectors of every output, which values per class are computed from.
    """
    needs: dict[DetectorOutput, set[str]] = {}
    for metric in metrics:
        if metric.has_reference or not of_reference:
            wanted = {metric.needs, "vectors"} if per_class else {metric.needs}
            needs.setdefault(metric.output, set()).update(wanted)
    return {output: tuple(sorted(wanted)) for output, wanted in needs.items()}
