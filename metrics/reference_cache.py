"""References that are computed from images once and cached by the images' content hash."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from dnnlib.errors import refusal
from dnnlib.files import cache_dir
from metrics.detectors import Detector, DetectorOutput
from metrics.reference import Reference, References, from_main, read_references, save_references
from metrics.statistics import Batch, collect_outputs
from torch_utils import distributed

MAX_VECTORS = 200_000
_SUBSET_SEED = 0
# The fields of a reference that hold each kind, with their values when that kind is not known.
_FIELDS = {"moments": dict(mu=None, sigma=None), "vectors": dict(vectors=None, num_vectors=0)}


def vector_subset(count: int) -> np.ndarray:
    """Return for each image index whether the image's vectors are kept, bool [count].

    Up to :data:`MAX_VECTORS` images, all are kept; of more, a fixed random subset of that size.
    """
    keep = np.ones(count, bool)
    if count > MAX_VECTORS:
        keep[np.random.default_rng(_SUBSET_SEED).permutation(count)[MAX_VECTORS:]] = False
    return keep


def compute_references(
    needs: Mapping[DetectorOutput, Collection[str]],
    detectors: Mapping[str, Detector],
    batches: Iterable[Batch],
    device: torch.device | str,
    *,
    num_images: int,
    dataset_hash: str | None = None,
    source: str = "",
) -> References:
    """Return the references computed from the images of all ranks. Collective.

    ``needs``, ``detectors``, ``batches`` and ``device`` are those of
    :func:`~metrics.statistics.collect_outputs`; ``dataset_hash`` and ``source`` go into each
    :class:`Reference`. Raises ValueError for fewer than 2 images, or if the batches of all ranks
    together do not hold ``num_images``.
    """
    name = source or "The dataset"
    if num_images < 2:
        raise ValueError(f"{name}: has {num_images} image; a reference needs at least 2.")
    keep = vector_subset(num_images)
    collected = collect_outputs(detectors, needs, batches, device, keep)

    references: References = {}
    # Only rank 0 has the vectors, but every rank must learn if their number is wrong.
    with distributed.together():
        for output, found in collected.items():
            known, counts = {}, []
            if found.moments is not None:
                counts.append((found.moments.count, num_images))
                known.update(mu=found.moments.mean(), sigma=found.moments.covariance())
            if found.vectors is not None:
                vectors, num_vectors = found.vectors.array, int(keep.sum())
                counts += [] if vectors is None else [(len(vectors), num_vectors)]
                known.update(vectors=vectors, num_vectors=num_vectors)
            for count, expected in counts:
                if count != expected:
                    but = f"gave {count} images for the reference statistics"
                    raise refusal(name, but=but, remedy=f"expected {expected}")
            references[output] = Reference(
                **known,
                output=output,
                count=num_images,
                detector_hash=detectors[output.detector].hash,
                dataset_hash=dataset_hash,
                source=source,
            )
    return references


def cache_path(content_hash: str, output: DetectorOutput, detector_hash: str, kind: str) -> Path:
    """Return the cache file of one output of a dataset; ``kind`` is ``moments`` or ``vectors``."""
    key = hashlib.sha256(f"{content_hash} {detector_hash}".encode()).hexdigest()[:32]
    return cache_dir() / "references" / f"{output.detector}-{output.name}-{key}-{kind}.npz"


def references_for(
    needs: Mapping[DetectorOutput, Collection[str]],
    detectors: Mapping[str, Detector],
    batches: Callable[[Sequence[int]], Iterable[Batch]],
    content_hash: str,
    device: torch.device | str,
    *,
    num_images: int,
    source: str = "",
) -> References:
    """Return the references of a dataset, from the cache or computed and then cached. Collective.

    Arguments are those of :func:`compute_references`, except ``content_hash``, which identifies the
    images, and ``batches``: it is called at most once, with the indices of the images that are
    needed, and returns this rank's share of those images with their indices. A cache file that
    cannot be used is reported on the console and replaced.
    """
    wanted = [(output, kind) for output, kinds in needs.items() for kind in kinds]
    found: dict[tuple[DetectorOutput, str], Reference] = {}
    missing: dict[DetectorOutput, list[str]] = {}
    for output, kind in wanted:
        detector = detectors[output.detector]
        cached = from_main(functools.partial(_read_cache, content_hash, output, detector, kind))
        if cached:
            found[output, kind] = cached[output]
        else:
            missing.setdefault(output, []).append(kind)
    if missing:
        indices: Sequence[int] = range(num_images)
        if not any("moments" in kinds for kinds in missing.values()):
            indices = np.flatnonzero(vector_subset(num_images)).tolist()
        facts = dict(num_images=num_images, dataset_hash=content_hash, source=source)
        made = compute_references(missing, detectors, batches(indices), device, **facts)
        for output, kind in wanted:
            if (output, kind) not in found:
                other = _FIELDS["vectors" if kind == "moments" else "moments"]
                found[output, kind] = dataclasses.replace(made[output], **other)
                distributed.on_main(functools.partial(_write_cache, found[output, kind], kind))
    result: References = {}
    for output, kind in wanted:
        part = found[output, kind]
        own = {name: getattr(part, name) for name in _FIELDS[kind]}
        before = result.get(output, part)
        result[output] = dataclasses.replace(before, **own, source=source or before.source)
    return result


def _read_cache(
    content_hash: str, output: DetectorOutput, detector: Detector, kind: str
) -> References:
    path = cache_path(content_hash, output, detector.hash, kind)
    if not path.is_file():
        return {}
    try:
        references = read_references(path)
        if output not in references or kind not in references[output].knows:
            raise ValueError(f"{path}: holds no {kind} of {output}.")
        references[output].check_detector(detector)
        if references[output].dataset_hash != content_hash:
            raise ValueError(f"{path}: made from other images.")
    except ValueError as error:
        print(
            f"Cached reference statistics cannot be used and are computed again. {error}",
            flush=True,
        )
        return {}
    return references


def _write_cache(reference: Reference, kind: str) -> None:
    path = cache_path(reference.dataset_hash, reference.output, reference.detector_hash, kind)
    try:
        save_references(path, {reference.output: reference})
    except OSError as error:
        print(f"Reference statistics could not be cached in {path}: {error}.", flush=True)
