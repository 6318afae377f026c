"""Statistics of detector outputs, accumulated over batches and ranks."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import torch

from metrics.detectors import Detector, DetectorOutput
from torch_utils import distributed

Batch = tuple[torch.Tensor, torch.Tensor]  # Image indices int64 [N], uint8 images [N, C, H, W].
_MAX_DIM = 4096


class OutputMoments:
    """Count, mean and covariance of a detector's vectors, from float64 sums.

    Sums are taken about a shift, the mean of this rank's first batch, so that the covariance is not
    the difference of two large numbers: a constant value gets a variance of 0 up to rounding. The
    split into batches and over ranks affects the result only through float64 rounding.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        """``device`` holds the sums; on GPUs every rank must pass its own, even without images."""
        if dim > _MAX_DIM:
            raise ValueError(
                f"The covariance of {dim:,} values would take {8e-9 * dim**2:,.1f} GB and minutes; "
                f"accepted: at most {_MAX_DIM:,} values. For the pixels of larger images use "
                "kid_pixels, which needs no covariance."
            )
        self.dim = dim
        self.count = 0
        self._shift = torch.zeros(dim, dtype=torch.float64, device=device)
        self._sum = torch.zeros_like(self._shift)
        self._second = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self._reduced = False

    @torch.inference_mode()
    def append(self, vectors: torch.Tensor) -> None:
        """Add the vectors [N, dim] of N images, on any device, without synchronising with it."""
        assert not self._reduced, "statistics of all ranks take no more vectors"
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            got = list(vectors.shape)
            raise ValueError(f"Got vectors of shape {got}; expected [N, {self.dim}].")
        if len(vectors) == 0:
            return
        x = vectors.to(self._shift.device, torch.float64)
        if self.count == 0:
            self._shift = x.mean(dim=0)
        x = x - self._shift
        self._sum = self._sum + x.sum(dim=0)
        self._second = torch.addmm(self._second, x.T, x)
        self.count += len(vectors)

    @torch.inference_mode()
    def all_reduce(self) -> None:
        """Replace this rank's statistics by those of all ranks. Collective; call it once."""
        assert not self._reduced, "these are the statistics of all ranks already"
        total = self._shift * self.count + self._sum
        counted = torch.cat([total, total.new_tensor([self.count])])
        distributed.all_reduce_sum(counted)
        count = round(counted[-1].item())
        mean = counted[:-1] / max(count, 1)
        # Second moments add up over ranks only when taken about the same point: the overall mean.
        offset = mean - self._shift
        cross = torch.outer(offset, self._sum)
        second = self._second - cross - cross.T + self.count * torch.outer(offset, offset)
        self._second = distributed.all_reduce_sum(second)
        self._shift, self._sum, self.count = mean, torch.zeros_like(mean), count
        self._reduced = True

    def merged(self, other: "OutputMoments") -> "OutputMoments":
        """Return the statistics of both sets of images; either both or neither is all-reduced.

        Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
        sample variances" (1979), Eq. 2.1.
        """
        assert (self._reduced, self.dim) == (other._reduced, other.dim)
        result = OutputMoments(self.dim, self._shift.device)
        result.count = self.count + other.count
        result._reduced = self._reduced
        if result.count:
            offset = other._mean() - self._mean()
            result._shift = self._mean() + offset * (other.count / result.count)
            spread = torch.outer(offset, offset) * (self.count * other.count / result.count)
            result._second = self._about_mean() + other._about_mean() + spread
        return result

    def mean(self) -> np.ndarray:
        """Return the mean [dim], float64; ValueError without images or if it is not finite."""
        if self.count == 0:
            raise ValueError("There are no images to take statistics of.")
        return _finite(self._mean())

    def covariance(self) -> np.ndarray:
        """Return the covariance [dim, dim], float64, with divisor count - 1.

        Raises ValueError for fewer than two images and for values that are not finite.
        """
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 images; got {self.count}.")
        covariance = self._about_mean() / (self.count - 1)
        return _finite((covariance + covariance.T) / 2)

    def _mean(self) -> torch.Tensor:
        return self._shift + self._sum / max(self.count, 1)

    def _about_mean(self) -> torch.Tensor:
        return self._second - torch.outer(self._sum, self._sum) / max(self.count, 1)


def _finite(values: torch.Tensor) -> np.ndarray:
    values = values.cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError("The detector's outputs are not finite (NaN or infinity).")
    return values


class OutputVectors:
    """The detector's vectors of the images in ``keep`` (None: all); on rank 0 once gathered."""

    def __init__(self, dim: int, keep: np.ndarray | None = None) -> None:
        self.dim = dim
        self._keep = keep
        self._indices: list[torch.Tensor] = []
        self._vectors: list[torch.Tensor] = []
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self.indices: np.ndarray | None = None
        self.array: np.ndarray | None = None

    def append(self, indices: torch.Tensor, vectors: torch.Tensor) -> None:
        """Add the vectors [N, dim], on any device, of the images ``indices`` [N]."""
        # Fetch the batch before this one, so that the device always has work queued.
        self._fetch()
        self._last = indices, vectors

    def _fetch(self) -> None:
        if self._last is None:
            return
        (indices, vectors), self._last = self._last, None
        vectors = vectors.to("cpu", torch.float32)
        if self._keep is not None:
            kept = torch.from_numpy(self._keep[indices.numpy()])
            indices, vectors = indices[kept], vectors[kept]
        self._indices.append(indices)
        self._vectors.append(vectors)

    def gather(self) -> None:
        """Set ``indices`` [N] and ``array`` [N, dim] of all ranks on rank 0. Collective.

        They are sorted by image index; ``array`` is float32. Raises ValueError for vectors that are
        not finite.
        """
        self._fetch()
        indices = torch.cat([torch.empty(0, dtype=torch.int64), *self._indices])
        vectors = torch.cat([torch.empty(0, self.dim), *self._vectors])
        self._indices, self._vectors = [], []
        indices, vectors = distributed.gather_rows(indices), distributed.gather_rows(vectors)
        with distributed.together():
            if indices is not None:
                order = torch.argsort(indices, stable=True)
                self.indices, self.array = indices[order].numpy(), _finite(vectors[order])
                assert (np.diff(self.indices) > 0).all(), "an image came twice"

    def merged(self, other: "OutputVectors") -> "OutputVectors":
        """Return these vectors followed by those of ``other``. Both must have been gathered."""
        result = OutputVectors(self.dim)
        if self.array is not None:
            result.indices = np.concatenate([self.indices, other.indices])
            result.array = np.concatenate([self.array, other.array])
        return result


@dataclasses.dataclass
class Collected:
    """What was kept of one detector output for a set of images: moments, vectors, or both."""

    moments: OutputMoments | None = None
    vectors: OutputVectors | None = None

    @property
    def count(self) -> int:
        """Number of images; with vectors alone, only rank 0 knows it."""
        return len(self.vectors.array) if self.moments is None else self.moments.count

    def merged(self, other: "Collected") -> "Collected":
        """Return what both sides kept, for the images of both, which must not overlap."""
        pairs = (self.moments, other.moments), (self.vectors, other.vectors)
        return Collected(*(a.merged(b) if a and b else None for a, b in pairs))


def collect_outputs(
    detectors: Mapping[str, Detector],
    needs: Mapping[DetectorOutput, Collection[str]],
    batches: Iterable[Batch],
    device: torch.device | str,
    keep: np.ndarray | None = None,
) -> dict[DetectorOutput, Collected]:
    """Return the statistics of detector outputs over the images of all ranks. Collective.

    Args:
        detectors: Detectors on ``device``, by name; each sees every image once.
        needs: What to keep of each output: ``moments``, ``vectors`` or both.
        batches: This rank's images as ``(indices int64 [N] on the CPU, uint8 [N, C, H, W] on any
            device)``; may be empty.
        device: Where outputs and their sums are computed.
        keep: Images whose vectors are kept, as a bool for each image index; None keeps all.
    """
    collected: dict[DetectorOutput, Collected] = {}
    names: dict[str, list[str]] = {}  # Names of the outputs, by detector.
    for output, wanted in needs.items():
        dim = detectors[output.detector].outputs[output.name]
        collected[output] = Collected(
            OutputMoments(dim, device) if "moments" in wanted else None,
            OutputVectors(dim, keep) if "vectors" in wanted else None,
        )
        names.setdefault(output.detector, []).append(output.name)
    with distributed.together():
        for indices, images in batches:
            images = images.to(device, non_blocking=True)
            # Entered per batch, so that the generator behind `batches` runs outside this mode.
            with torch.inference_mode():
                for detector, wanted in names.items():
                    for name, vectors in detectors[detector](images, wanted).items():
                        found = collected[DetectorOutput(detector, name)]
                        if found.moments is not None:
                            found.moments.append(vectors)
                        if found.vectors is not None:
                            found.vectors.append(indices, vectors)
    for found in collected.values():
        if found.moments is not None:
            found.moments.all_reduce()
        if found.vectors is not None:
            found.vectors.gather()
    return collected
