"""Files of detector outputs for the images of each cell, from which a sweep can continue.

``outputs/KEY/START-STOP.npz`` holds the outputs of one batch of images, and is written atomically.
``sweep.json`` records what determines the outputs besides the cell itself.
"""

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.resumable import check_claim, check_folder, claim
from dnnlib.errors import refusal
from dnnlib.files import atomic_write
from metrics.detectors import DetectorOutput

CLAIM = "sweep.json"
_WHAT = "outputs of a sweep"
_NAME = re.compile(r"(\d+)-(\d+)\.npz")


class Store:
    """The detector outputs in a folder; a ``key`` names the images of a cell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self) -> None:
        """Raise ValueError if the folder is not one of a sweep and cannot become one."""
        check_folder(self.folder, _WHAT, lambda path: (path / CLAIM).is_file(), "--outdir")

    def check_claim(self, protocol: Mapping[str, Any]) -> None:
        """Raise ValueError if the folder holds outputs that were made under another protocol."""
        check_claim(self.folder / CLAIM, protocol, "--outdir", _WHAT)

    def claim(self, protocol: Mapping[str, Any]) -> None:
        """Record what determines the outputs. Raises ValueError if the folder holds others."""
        claim(self.folder / CLAIM, protocol, "--outdir", _WHAT)

    def missing(self, key: str, stop: int) -> list[range]:
        """Return the images before ``stop`` that have no outputs, as ranges."""
        found, start = [], 0
        for known, _ in self._files(key):
            if start < min(known.start, stop):
                found.append(range(start, min(known.start, stop)))
            start = max(start, known.stop)
        return [*found, range(start, stop)] if start < stop else found

    def write(self, key: str, images: range, outputs: Mapping[DetectorOutput, np.ndarray]) -> None:
        """Store the outputs, float32 [N, D] each, of N images."""
        with atomic_write(self._path(key, images)) as file:
            np.savez(file, **{str(output): vectors for output, vectors in outputs.items()})

    def read(self, key: str, output: DetectorOutput, stop: int) -> np.ndarray:
        """Return one output of the images before ``stop``, float32 [stop, D].

        All of them must have been written. Raises ValueError for a damaged file.
        """
        parts, start = [], 0
        for known, path in self._files(key):
            if start >= stop:
                break
            if known.start <= start < known.stop:
                vectors = _read(path, str(output), len(known))
                parts.append(vectors[start - known.start : stop - known.start])
                start = known.stop
        assert start >= stop, "the images were not made"
        return np.concatenate(parts)

    def _path(self, key: str, images: range) -> Path:
        return self.folder / "outputs" / key / f"{images.start:08d}-{images.stop:08d}.npz"

    def _files(self, key: str) -> Iterator[tuple[range, Path]]:
        """Yield the images in each file of a cell and its path, in the order of the images."""
        folder = self.folder / "outputs" / key
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                if match := _NAME.fullmatch(path.name):
                    yield range(int(match[1]), int(match[2])), path


def batches(images: Sequence[range], batch: int) -> list[range]:
    """Return ranges of images divided into parts of at most ``batch``."""
    return [
        range(start, min(start + batch, own.stop))
        for own in images
        for start in range(own.start, own.stop, batch)
    ]


def _read(path: Path, name: str, num: int) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as file:
            vectors = file[name]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise refusal(path, but=f"damaged ({error})", remedy="delete it to make it anew") from None
    if vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != num:
        but = f"holds {vectors.dtype} of shape {list(vectors.shape)}"
        raise refusal(path, but=but, remedy="delete it to make it anew")
    return vectors
