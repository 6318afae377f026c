"""Statistics of real images, and the files that hold them, checked when they are read."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch

from dnnlib import safe_pickle
from dnnlib.downloads import fetch
from dnnlib.errors import refusal
from dnnlib.files import atomic_write, check_source
from dnnlib.typed import parse_json, typed
from metrics.detectors import Detector, DetectorOutput
from torch_utils import distributed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """One detector output for real images: mean and covariance, vectors, or both.

    Fields that are not known are None.
    """

    output: DetectorOutput
    mu: np.ndarray | None = None  # [D], float64.
    sigma: np.ndarray | None = None  # [D, D], float64, with divisor count - 1.
    # [M, D], float32, on rank 0 only: of all images, or of a fixed subset (reference_cache.py).
    vectors: np.ndarray | None = None
    num_vectors: int = 0  # M, on every rank; 0 if unknown.
    labels: np.ndarray | None = None  # Class index of each vector, int64 [M].
    # Number of images behind mu and sigma, or from which the vectors were chosen. EDM's files do
    # not record it.
    count: int | None = None
    detector_hash: str | None = None  # Identity of the detector that made the outputs.
    dataset_hash: str | None = None  # Content hash of the images.
    # Channels, height, width and file formats of the images, such as (3, 32, 32, "png").
    images: tuple[int, int, int, str] | None = None
    source: str = ""  # Where this comes from, as shown to people.
    class_names: tuple[str, ...] = ()  # Of the classes that ``labels`` indexes; may be empty.
    # Vectors of images other than those behind mu and sigma, as from the samples in ADM's files.
    sample: "Reference | None" = None

    def of(self, kind: str) -> "Reference":
        """Return the reference to use for ``moments`` or ``vectors``: this one, or its sample."""
        return self.sample if kind == "vectors" and self.sample is not None else self

    @property
    def knows(self) -> frozenset[str]:
        """The kinds of statistics that this reference offers: ``moments``, ``vectors``."""
        there = dict(moments=self.mu is not None, vectors=self.of("vectors").num_vectors > 0)
        return frozenset(name for name, known in there.items() if known)

    @property
    def hash(self) -> str:
        """Hexadecimal identity: of images and detector if both are known, else of the statistics.

        Images and detector are preferred because the last bits of the statistics depend on batch
        size and number of ranks. Ask on rank 0, which alone has all of the statistics.
        """
        if self.dataset_hash and self.detector_hash:
            text = f"{self.dataset_hash} {self.detector_hash} {self.output.name} {self.count}"
            return hashlib.sha256(text.encode()).hexdigest()
        digest = hashlib.sha256()
        for array in (self.mu, self.sigma, self.vectors):
            if array is not None:
                digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def check_detector(self, detector: Detector) -> list[str]:
        """Return warnings about a use with ``detector``; ValueError if another one made this."""
        width = detector.outputs[self.output.name]
        widths = {array.shape[-1] for array in (self.mu, self.vectors) if array is not None}
        but, remedy = None, "compute them again with `fid.py ref`"
        if self.detector_hash is not None and self.detector_hash != detector.hash:
            other = f"another detector '{self.output.detector}' ({self.detector_hash[:12]})"
            used = f"{detector.hash[:12]}: {detector.preprocessing}, {detector.precision}"
            but = f"were made by {other} than the one in use ({used})"
        elif others := widths - {width}:
            but = (
                f"have {min(others)} values for {self.output}, but the detector in use has {width}"
            )
        if but is not None:
            raise refusal(self.source, but=f"these reference statistics {but}", remedy=remedy)
        if self.detector_hash is None:
            return [f"{self.source} does not record which detector made it"]
        return []


References = dict[DetectorOutput, Reference]
Arrays = dict[DetectorOutput, dict[str, np.ndarray]]

_KINDS = ("mu", "sigma", "vectors")
_INCEPTION = DetectorOutput("inception")
# These outputs keep the array names of EDM's and ADM's files, so that their programs can read ours.
_PUBLISHED = {_INCEPTION: "{}", DetectorOutput("inception", "spatial"): "{}_s"}
_SHARED = ("count", "dataset_hash", "class_names", "images")
_TYPES = dict(mu=np.float64, sigma=np.float64, vectors=np.float32, labels=np.int64)


class _Description(TypedDict):
    """What a file records besides arrays; all but the hashes is the same for every output."""

    detector_hashes: dict[str, str | None]
    count: int | None
    dataset_hash: str | None
    class_names: list[str]
    images: tuple[int, int, int, str] | None


_UNKNOWN = _Description(
    detector_hashes={}, count=None, dataset_hash=None, class_names=[], images=None
)


def _array_name(output: DetectorOutput, kind: str) -> str:
    return _PUBLISHED.get(output, f"{output.detector}.{output.name}.{{}}").format(kind)


def save_references(path: str | os.PathLike, references: References) -> None:
    """Write references of the same images, in the same order, into one ``.npz`` file, atomically.

    It holds once what is the same for all of them: the labels of vectors, and facts on the images.
    """
    first = next(iter(references.values()))
    shared = {name: getattr(first, name) for name in _SHARED}
    labels = [found.labels for found in references.values() if found.vectors is not None]
    arrays = {} if not labels or labels[0] is None else {"labels": labels[0]}
    assert all(np.array_equal(own, labels[0]) for own in labels), "images in another order"
    for output, reference in references.items():
        assert shared == {name: getattr(reference, name) for name in _SHARED}, "other images"
        own = {_array_name(output, kind): getattr(reference, kind) for kind in _KINDS}
        arrays.update({name: array for name, array in own.items() if array is not None})
    hashes = {str(output): reference.detector_hash for output, reference in references.items()}
    description = dict(shared, detector_hashes=hashes)
    with atomic_write(path) as file:
        np.savez(file, **arrays, description=np.array(json.dumps(description)))


def read_references(path: str | os.PathLike) -> References:
    """Return the statistics of real images in a file; nothing in it is executed.

    Reads this project's ``.npz`` files; EDM's, with ``mu`` and ``sigma``; ADM's
    ``VIRTUAL_*.npz``, which add ``mu_s`` and ``sigma_s`` (their sample images are read by
    :func:`data.images.dataset.open_images`); and EDM2's ``.pkl``, with ``fid`` and ``fd_dinov2``.
    Raises ValueError for a file that is damaged or holds none of these.
    """
    path = Path(path)
    check_source(path, folder=False)
    read = _read_pickle if path.suffix == ".pkl" else _read_npz
    try:
        arrays, description = read(path)
        count = description["count"]
        if count is not None and count < 2:
            raise ValueError(f"count is {count}")
    # The errors that NumPy and zipfile raise for a damaged or foreign file have no common base.
    except Exception as error:
        but = f"damaged, or no file of reference statistics: {error or type(error).__name__}"
        raise refusal(path, but=but) from error
    references = {}
    for output, found in arrays.items():
        references[output] = Reference(
            **_checked(path, output, found),
            output=output,
            num_vectors=len(found.get("vectors", ())),
            count=count,
            detector_hash=description["detector_hashes"].get(str(output)),
            dataset_hash=description["dataset_hash"],
            images=description["images"],
            source=str(path),
            class_names=tuple(description["class_names"]),
        )
    return references


def _read_npz(path: Path) -> tuple[Arrays, _Description]:
    description = _UNKNOWN
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
        if "description" in file.files:
            known = parse_json(str(file["description"]))
            description = typed(_Description, {**_UNKNOWN, **known})
        outputs = [DetectorOutput.parse(name) for name in description["detector_hashes"]]
        arrays: Arrays = {}
        for output in outputs or list(_PUBLISHED):
            names = {kind: _array_name(output, kind) for kind in _KINDS}
            found = {kind: file[name] for kind, name in names.items() if name in file.files}
            if "vectors" in found and "labels" in file.files:
                found["labels"] = file["labels"]
            if found:
                arrays[output] = found
    if not arrays:
        raise ValueError("it has no arrays 'mu' and 'sigma'")
    return arrays, description


def _read_pickle(path: Path) -> tuple[Arrays, _Description]:
    with open(path, "rb") as file:
        content = safe_pickle.load(file)
    if not isinstance(content, dict):
        raise ValueError("it holds no names with statistics")
    names = {"fid": _INCEPTION, "fd_dinov2": DetectorOutput("dinov2")}
    arrays = {}
    for name, output in names.items():
        if name in content:
            arrays[output] = {kind: np.asarray(content[name][kind]) for kind in ("mu", "sigma")}
    if not arrays:
        raise ValueError("it has neither 'fid' nor 'fd_dinov2'")
    count = content.get("num_images")
    return arrays, {**_UNKNOWN, "count": None if count is None else int(count)}


def _checked(
    path: Path, output: DetectorOutput, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the arrays in the types of :class:`Reference`; ValueError if they cannot be used."""
    shapes = {kind: list(array.shape) for kind, array in arrays.items()}
    mu, sigma, vectors, labels = (shapes.get(kind) for kind in _TYPES)
    is_gaussian = mu is not None and len(mu) == 1 and sigma == mu * 2
    if not is_gaussian and not (mu is None and sigma is None):
        but = f"{output} has a mean of shape {mu} and a covariance of shape {sigma}"
        raise refusal(path, but=but, remedy="expected [D] and [D, D]")
    if vectors is not None and len(vectors) != 2:
        raise ValueError(f"{path}: {output} has vectors of shape {vectors}; expected [N, D].")
    if mu is not None and vectors is not None and vectors[1:] != mu:
        but = f"{output} has a mean of {mu[0]} values and vectors of {vectors[1]}"
        raise refusal(path, but=but, remedy="expected as many")
    if labels is not None and labels != vectors[:1]:
        but = f"has labels of shape {labels} for {vectors[0]} vectors of {output}"
        raise refusal(path, but=but, remedy="expected as many")
    checked = {}
    for kind, array in arrays.items():
        expected = np.dtype(_TYPES[kind])
        if array.dtype.kind != expected.kind:
            but = f"{kind} of {output} has the type {array.dtype}"
            raise refusal(path, but=but, remedy=f"expected {expected}")
        with np.errstate(over="ignore"):
            checked[kind] = array.astype(expected, copy=False)
        if not np.isfinite(checked[kind]).all():
            raise ValueError(f"{path}: the reference statistics of {output} are not finite.")
    return checked


def load_references(location: str) -> References:
    """Return the references in a file, on every rank; ``location`` is a path or URL. Collective.

    Rank 0 reads the file, and it alone has the vectors. Errors are those of
    :func:`read_references`, raised on every rank.
    """
    references = from_main(lambda: read_references(fetch(location)))
    return {k: dataclasses.replace(found, source=location) for k, found in references.items()}


def from_main(function: Callable[[], References]) -> References:
    """Return rank 0's references on every rank; rank 0 alone has their vectors. Collective.

    ``function`` is called on rank 0 to make them; its errors are raised on every rank.
    """
    here: References = {}

    def describe() -> dict[str, dict[str, Any]]:
        here.update(function())
        return {str(output): _as_tensors(reference) for output, reference in here.items()}

    trees = distributed.on_main_tree(describe)
    if distributed.is_main():
        return here
    references: References = {}
    for text, tree in trees.items():
        fields = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in tree.items()}
        output = DetectorOutput.parse(text)
        references[output] = Reference(output=output, **fields)
    return references


def _as_tensors(reference: Reference) -> dict[str, Any]:
    return {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in vars(reference).items()
        if name not in ("output", "vectors")
    }
