"""References computed from images, once: they are cached by the content of the images."""

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from dnnlib.files import cache_dir
from metrics.features import Detector, Feature
from metrics.reference import (
    Reference,
    References,
    from_main,
    read_references,
    save_references,
)
from metrics.statistics import FeatureSet, collect_features
from torch_utils import distributed

MAX_VECTORS = 200_000
_SUBSET_SEED = 0


def vector_subset(count: int) -> np.ndarray:
    """Return, by image index, whether an image's vectors are kept, bool [count].

    All are, up to :data:`MAX_VECTORS`; of more images, a fixed random choice of as many.
    """
    keep = np.ones(count, bool)
    if count > MAX_VECTORS:
        keep[np.random.default_rng(_SUBSET_SEED).permutation(count)[MAX_VECTORS:]] = False
    return keep


def compute_references(
    needs: Mapping[Feature, Collection[str]],
    detectors: Mapping[str, Detector],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device | str,
    *,
    num_images: int,
    dataset_hash: str | None = None,
    source: str = "",
) -> References:
    """Return features of the images of all ranks, each computed once. Collective.

    Args:
        needs: What to know of each feature: ``moments``, ``vectors`` or both.
        detectors: On ``device``, by name.
        batches: This rank's images with their indices, as for
            :func:`metrics.statistics.collect_features`; may be empty.
        num_images: How many images all ranks have together; another number is an error.
        dataset_hash, source: See :class:`Reference`.

    Raises ValueError if the number of images is wrong or below 2.
    """
    if num_images < 2:
        raise ValueError(
            f"{source or 'The dataset'}: has {num_images} image; a reference needs at least 2."
        )
    keep = vector_subset(num_images)
    sets = collect_features(detectors, needs, batches, device, keep)

    def reference(feature: Feature, found: FeatureSet) -> Reference:
        vectors = None if found.vectors is None else found.vectors.array
        counts = [] if found.moments is None else [(found.moments.count, num_images)]
        if vectors is not None:
            counts.append((len(vectors), int(keep.sum())))
        for count, expected in counts:
            if count != expected:
                raise ValueError(
                    f"{source or 'The dataset'}: gave {count} images for the reference "
                    f"statistics; expected {expected}."
                )
        return Reference(
            feature=feature,
            mu=None if found.moments is None else found.moments.mean(),
            sigma=None if found.moments is None else found.moments.covariance(),
            vectors=vectors,
            num_vectors=0 if found.vectors is None else int(keep.sum()),
            count=num_images,
            detector_hash=detectors[feature.detector].hash,
            dataset_hash=dataset_hash,
            source=source,
        )

    references: References = {}

    def build() -> None:
        references.update({feature: reference(feature, found) for feature, found in sets.items()})

    # Only rank 0 has the vectors, and every rank must hear if their number is wrong.
    distributed.on_main(build)
    if not distributed.is_main():
        build()
    return references


def cache_path(content_hash: str, feature: Feature, detector_hash: str, kind: str) -> Path:
    """Return where one feature of a dataset is cached; ``kind`` is ``moments`` or ``vectors``."""
    key = hashlib.sha256(f"{content_hash} {detector_hash}".encode()).hexdigest()[:32]
    return cache_dir() / "references" / f"{feature.detector}-{feature.output}-{key}-{kind}.npz"


def references_for(
    needs: Mapping[Feature, Collection[str]],
    detectors: Mapping[str, Detector],
    batches: Callable[[Sequence[int]], Iterable[tuple[torch.Tensor, torch.Tensor]]],
    content_hash: str,
    device: torch.device | str,
    *,
    num_images: int,
    source: str = "",
) -> References:
    """Return features of a dataset, from the cache if they were ever computed. Collective.

    Args:
        needs, detectors, num_images, source: As for :func:`compute_references`.
        batches: Called at most once, for all that is not cached, with the indices of the images
            that are needed; returns this rank's share of them, with their indices.
        content_hash: Identity of the images, equal on every rank.

    A cache file that cannot be used is named on the console and replaced.
    """
    found: dict[tuple[Feature, str], Reference] = {}
    missing: dict[Feature, list[str]] = {}
    for feature, wanted in needs.items():
        for kind in wanted:
            detector = detectors[feature.detector]
            path = cache_path(content_hash, feature, detector.hash, kind)

            def read(path: Path = path, feature: Feature = feature, kind: str = kind) -> References:
                return _read_cache(path, content_hash, feature, detectors[feature.detector], kind)

            cached = from_main(read)
            if cached:
                found[feature, kind] = cached[feature]
            else:
                missing.setdefault(feature, []).append(kind)
    if missing:
        indices: Sequence[int] = range(num_images)
        if not any("moments" in kinds for kinds in missing.values()):
            indices = np.flatnonzero(vector_subset(num_images)).tolist()
        made = compute_references(
            missing,
            detectors,
            batches(indices),
            device,
            num_images=num_images,
            dataset_hash=content_hash,
            source=source,
        )
        for feature, kinds in missing.items():
            for kind in kinds:
                path = cache_path(content_hash, feature, made[feature].detector_hash, kind)
                part = _only(made[feature], kind)
                found[feature, kind] = part
                distributed.on_main(lambda path=path, part=part: _write_cache(path, part))
    result: References = {}
    for (feature, kind), part in found.items():
        if feature not in result:
            result[feature] = dataclasses.replace(part, source=source or part.source)
            continue
        names = ("mu", "sigma") if kind == "moments" else ("vectors", "num_vectors")
        changes = {name: getattr(part, name) for name in names}
        result[feature] = dataclasses.replace(result[feature], **changes)
    return result


def _only(reference: Reference, kind: str) -> Reference:
    if kind == "moments":
        return dataclasses.replace(reference, vectors=None, num_vectors=0, labels=None)
    return dataclasses.replace(reference, mu=None, sigma=None)


def _read_cache(
    path: Path, content_hash: str, feature: Feature, detector: Detector, kind: str
) -> References:
    if not path.is_file():
        return {}
    try:
        references = read_references(path)
        if feature not in references or kind not in references[feature].knows:
            raise ValueError(f"{path}: holds no {kind} of {feature}.")
        references[feature].check_detector(detector)
        if references[feature].dataset_hash != content_hash:
            raise ValueError(f"{path}: made from other images.")
    except ValueError as error:
        print(f"Cached reference statistics cannot be used and are made anew. {error}", flush=True)
        return {}
    return references


def _write_cache(path: Path, reference: Reference) -> None:
    try:
        save_references(path, {reference.feature: reference})
    except OSError as error:
        print(f"Reference statistics could not be cached in {path}: {error}.", flush=True)
