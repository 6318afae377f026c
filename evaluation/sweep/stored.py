"""Images and a detector in their place, to score stored outputs like those of any other images."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from evaluation.images import SnapshotImages
from metrics.detectors import Detector, DetectorOutput
from metrics.statistics import Batch
from torch_utils import distributed

_BATCH = 1024


class StoredImages:
    """The images of a snapshot; :meth:`batches` yields their numbers in place of pixels.

    They are input for :class:`StoredDetector`. Rank 0 yields all of them, other ranks none.
    """

    num_images = None

    def __init__(self, source: SnapshotImages) -> None:
        self.labels, self.passport = source.labels, source.passport
        self.image_shape, self.formats = source.image_shape, source.formats
        self.class_names = source.class_names

    def batches(self, indices: Sequence[int]) -> Iterable[Batch]:
        if distributed.is_main():
            for part in torch.tensor(indices).split(_BATCH):
                yield part, part


class StoredDetector:
    """A detector that looks its outputs up instead of computing them.

    ``read(output=...)`` returns a stored output for all images, float32 [N, D].
    """

    def __init__(self, detector: Detector, read: Callable[[DetectorOutput], np.ndarray]) -> None:
        self.name, self.outputs, self.hash = detector.name, detector.outputs, detector.hash
        self.preprocessing, self.precision = detector.preprocessing, detector.precision
        self._read, self._known = read, {}

    def __call__(self, images: torch.Tensor, outputs: Collection[str]) -> dict[str, Any]:
        """Return the named outputs, float32 [N, D] each, of images given by their numbers [N]."""
        for name in outputs:
            if name not in self._known:
                vectors = self._read(output=DetectorOutput(self.name, name))
                self._known[name] = torch.from_numpy(vectors)
        return {name: self._known[name][images.cpu()].to(images.device) for name in outputs}
