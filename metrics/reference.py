"""Reference statistics of real images: computed once, kept in ``.npz`` files, checked when read."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.files import atomic_write, cache_dir, fetch
from metrics.features import Detector
from metrics.statistics import collect_statistics
from torch_utils import distributed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """Mean and covariance of a detector's features over a set of real images.

    Attributes:
        mu: [D], float64.
        sigma: [D, D], float64, with divisor count - 1.
        count: Number of images; None if the file does not tell, as with EDM's.
        detector, detector_hash: What made the features; None if the file does not tell.
        dataset_hash: Content hash of the images; None if unknown.
        source: Where the statistics come from, for people.
        metadata: Further plain values that the file carries.
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None = None
    detector: str | None = None
    detector_hash: str | None = None
    dataset_hash: str | None = None
    source: str = ""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Hexadecimal identity: of images and detector where known, else of the numbers.

        The numbers' last bits depend on batch size and ranks; images and detector do not.
        """
        digest = hashlib.sha256()
        if self.dataset_hash and self.detector_hash:
            digest.update(f"{self.dataset_hash} {self.detector_hash} {self.count}".encode())
        else:
            digest.update(np.ascontiguousarray(self.mu))
            digest.update(np.ascontiguousarray(self.sigma))
        return digest.hexdigest()

    def check_detector(self, detector: Detector) -> list[str]:
        """Return warnings about the use with ``detector``; raise ValueError if it is another."""
        if self.detector_hash is not None and self.detector_hash != detector.hash:
            raise ValueError(
                f"{self.source}: these reference statistics were made by the detector "
                f"'{self.detector}' ({self.detector_hash[:12]}), but '{detector.name}' "
                f"({detector.hash[:12]}) is in use; compute them anew with `fid.py ref`."
            )
        if self.mu.size != detector.num_features:
            raise ValueError(
                f"{self.source}: these reference statistics have {self.mu.size} features, but the "
                f"detector '{detector.name}' has {detector.num_features}; compute them anew with "
                "`fid.py ref`."
            )
        if self.detector_hash is None:
            return [f"{self.source} does not tell which detector made it"]
        return []

    def save(self, path: str | os.PathLike) -> None:
        """Write an ``.npz`` file that :func:`read_reference` reads, atomically."""
        description = {name: getattr(self, name) for name in _DESCRIPTION}
        with atomic_write(path) as file:
            np.savez(
                file,
                mu=self.mu,
                sigma=self.sigma,
                description=np.array(json.dumps(dict(description, metadata=dict(self.metadata)))),
            )


_DESCRIPTION = ("count", "detector", "detector_hash", "dataset_hash")


def read_reference(path: str | os.PathLike) -> Reference:
    """Return the statistics in an ``.npz`` file; nothing in it is executed.

    Reads this project's files and any others with ``mu`` and ``sigma``, such as EDM's; those have
    no count and no detector. Raises ValueError for a file that is damaged or lacks them.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            mu, sigma = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
            text = str(file["description"]) if "description" in file.files else "{}"
        fields = json.loads(text)
        metadata = dict(fields.pop("metadata", {}))
        fields = {name: fields.get(name) for name in _DESCRIPTION}
        if not isinstance(fields["count"], int | None):
            raise ValueError(f"its count is {fields['count']!r}")
    # What a damaged or foreign file makes NumPy and zipfile raise has no common base.
    except Exception as error:
        raise ValueError(
            f"{path}: damaged, or no .npz file with the arrays 'mu' and 'sigma' "
            f"({type(error).__name__}: {error})."
        ) from error
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
        raise ValueError(
            f"{path}: mu has shape {list(mu.shape)} and sigma {list(sigma.shape)}; expected [D] "
            "and [D, D]."
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path}: the reference statistics are not finite.")
    return Reference(mu=mu, sigma=sigma, source=str(path), metadata=metadata, **fields)


def load_reference(location: str) -> Reference:
    """Return the statistics in a file named by path or URL, on every rank.

    Collective: rank 0 reads; errors, as of :func:`read_reference`, are raised on every rank.
    """
    return _from_main(
        lambda: dataclasses.replace(read_reference(fetch(location)), source=str(location))
    )


def compute_reference(
    batches: Iterable[torch.Tensor],
    detector: Detector,
    device: torch.device | str,
    *,
    num_images: int | None = None,
    dataset_hash: str | None = None,
    source: str = "",
    metadata: Mapping[str, Any] | None = None,
) -> Reference:
    """Return the statistics of the images of all ranks. Collective.

    Args:
        batches: This rank's images, uint8 [N, C, H, W]; may be empty.
        detector: On ``device``.
        num_images: How many images all ranks have together; another number is an error.
        dataset_hash, source, metadata: See :class:`Reference`.

    Raises ValueError if the number of images is wrong or below 2.
    """
    (statistics,) = collect_statistics([detector], batches, device)
    if num_images is not None and statistics.count != num_images:
        raise ValueError(
            f"{source or 'The dataset'}: gave {statistics.count} images for the reference "
            f"statistics; expected {num_images}."
        )
    return Reference(
        mu=statistics.mean(),
        sigma=statistics.covariance(),
        count=statistics.count,
        detector=detector.name,
        detector_hash=detector.hash,
        dataset_hash=dataset_hash,
        source=source,
        metadata=dict(metadata or {}),
    )


def cache_path(content_hash: str, detector: Detector) -> Path:
    """Return where the statistics of a dataset under a detector are cached."""
    key = hashlib.sha256(f"{content_hash} {detector.hash}".encode()).hexdigest()[:32]
    return cache_dir() / "references" / f"{detector.name}-{key}.npz"


def reference_for(
    batches: Callable[[], Iterable[torch.Tensor]],
    content_hash: str,
    detector: Detector,
    device: torch.device | str,
    *,
    num_images: int | None = None,
    source: str = "",
) -> Reference:
    """Return the statistics of a dataset, from the cache if they were ever computed. Collective.

    Args:
        batches: Called only if nothing usable is cached; returns this rank's share of all images
            as uint8 batches [N, C, H, W]. It and its arguments as for :func:`compute_reference`.
        content_hash: Identity of the images, equal on every rank.
        detector: Its hash and ``content_hash`` name the cache file.

    A cache file that cannot be used is named on the console and replaced.
    """
    path = cache_path(content_hash, detector)
    cached = _from_main(lambda: _read_cache(path, content_hash, detector))
    if cached is not None:
        return dataclasses.replace(cached, source=source or cached.source)
    reference = compute_reference(
        batches(),
        detector,
        device,
        num_images=num_images,
        dataset_hash=content_hash,
        source=source,
    )
    distributed.on_main(lambda: _write_cache(path, reference))
    return reference


def _read_cache(path: Path, content_hash: str, detector: Detector) -> Reference | None:
    if not path.is_file():
        return None
    try:
        reference = read_reference(path)
        reference.check_detector(detector)
        if reference.dataset_hash != content_hash:
            raise ValueError(f"{path}: made from other images.")
    except ValueError as error:
        print(f"Cached reference statistics cannot be used and are made anew. {error}", flush=True)
        return None
    return reference


def _write_cache(path: Path, reference: Reference) -> None:
    try:
        reference.save(path)
    except OSError as error:
        print(f"Reference statistics could not be cached in {path}: {error}.", flush=True)


def _from_main(function: Callable[[], Reference | None]) -> Reference | None:
    """Return rank 0's statistics on every rank, or None if it has none."""
    box: list[Reference | None] = []
    distributed.on_main(lambda: box.append(function()))
    tree = None
    if box and box[0] is not None:
        tree = {field.name: getattr(box[0], field.name) for field in dataclasses.fields(Reference)}
        tree.update(mu=torch.from_numpy(tree["mu"]), sigma=torch.from_numpy(tree["sigma"]))
    tree = distributed.broadcast_tree(tree)
    if tree is None:
        return None
    return Reference(**{**tree, "mu": tree["mu"].numpy(), "sigma": tree["sigma"].numpy()})
