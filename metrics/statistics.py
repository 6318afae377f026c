"""Features of many images, accumulated batch by batch and over ranks."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import torch

from metrics.features import Detector, Feature
from torch_utils import distributed

_MAX_FEATURES = 20_000


class FeatureStatistics:
    """Count, mean and covariance of feature vectors, from sums in float64.

    Sums are taken about a shift, the mean of this rank's first batch, so that the covariance does
    not come from the difference of two large numbers: a constant feature gets a variance of 0 to
    rounding. The result depends on how the images were split into batches and over ranks only
    through the rounding of float64.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        """``device`` holds the sums; on GPUs every rank must name its own, even without images."""
        if num_features > _MAX_FEATURES:
            raise ValueError(
                f"The covariance of {num_features:,} values would take "
                f"{8e-9 * num_features**2:,.0f} GB; at most {_MAX_FEATURES:,} values are taken "
                "(pixel distances suit small images)."
            )
        self.num_features = num_features
        self.count = 0
        self._shift = torch.zeros(num_features, dtype=torch.float64, device=device)
        self._sum = torch.zeros_like(self._shift)
        self._second = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)
        self._reduced = False

    @torch.inference_mode()
    def append(self, features: torch.Tensor) -> None:
        """Add features [N, num_features] of N images, on any device. Does not wait for it."""
        assert not self._reduced, "statistics of all ranks take no more features"
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(
                f"Got features of shape {list(features.shape)}; expected [N, {self.num_features}]."
            )
        if len(features) == 0:
            return
        x = features.to(self._shift.device, torch.float64)
        if self.count == 0:
            self._shift = x.mean(dim=0)
        x = x - self._shift
        self._sum = self._sum + x.sum(dim=0)
        self._second = torch.addmm(self._second, x.T, x)
        self.count += len(features)

    @torch.inference_mode()
    def all_reduce(self) -> None:
        """Turn the statistics of this rank into those of all ranks. Collective, once."""
        assert not self._reduced, "these are the statistics of all ranks already"
        total = self._shift * self.count + self._sum
        counted = torch.cat([total, total.new_tensor([self.count])])
        distributed.all_reduce_sum(counted)
        count = round(counted[-1].item())
        mean = counted[:-1] / max(count, 1)
        # Second moments about the mean of all ranks can be added; those about each rank's own
        # shift cannot.
        offset = mean - self._shift
        cross = torch.outer(offset, self._sum)
        second = self._second - cross - cross.T + self.count * torch.outer(offset, offset)
        self._second = distributed.all_reduce_sum(second)
        self._shift, self._sum, self.count = mean, torch.zeros_like(mean), count
        self._reduced = True

    def merged(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Return the statistics of the images of both. Both must be of one rank, or of all.

        Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
        sample variances" (1979), Eq. 2.1.
        """
        assert self._reduced == other._reduced
        assert self.num_features == other.num_features
        result = FeatureStatistics(self.num_features, self._shift.device)
        result.count = self.count + other.count
        result._reduced = self._reduced
        if result.count:
            offset = other._mean() - self._mean()
            result._shift = self._mean() + offset * (other.count / result.count)
            spread = torch.outer(offset, offset) * (self.count * other.count / result.count)
            result._second = self._about_mean() + other._about_mean() + spread
        return result

    def mean(self) -> np.ndarray:
        """Return the mean [num_features] in float64. Raises ValueError without images."""
        if self.count == 0:
            raise ValueError("There are no images to take statistics of.")
        return _finite(self._mean())

    def covariance(self) -> np.ndarray:
        """Return the covariance [num_features, num_features] in float64, with divisor count - 1.

        Raises ValueError for fewer than two images.
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
        raise ValueError("The detector's features are not finite (NaN or infinity).")
    return values


class FeatureVectors:
    """The feature vectors of images, kept by image index; complete on rank 0 after gathering.

    Only images for which ``keep`` is true are kept; None keeps all.
    """

    def __init__(self, num_features: int, keep: np.ndarray | None = None) -> None:
        self.num_features = num_features
        self._keep = keep
        self._indices: list[torch.Tensor] = []
        self._vectors: list[torch.Tensor] = []
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self.indices: np.ndarray | None = None
        self.array: np.ndarray | None = None

    def append(self, indices: torch.Tensor, vectors: torch.Tensor) -> None:
        """Add the vectors [N, num_features], on any device, of the images ``indices`` [N]."""
        # A batch is fetched from the device once the next one is under way.
        self._fetch()
        self._last = indices, vectors

    def _fetch(self) -> None:
        if self._last is None:
            return
        indices, vectors = self._last
        self._last = None
        vectors = vectors.to("cpu", torch.float32)
        if self._keep is not None:
            kept = torch.from_numpy(self._keep[indices.numpy()])
            indices, vectors = indices[kept], vectors[kept]
        self._indices.append(indices)
        self._vectors.append(vectors)

    def gather(self) -> None:
        """Have rank 0 know the vectors of all ranks, in the order of the images. Collective.

        Sets ``indices`` [N] and ``array`` [N, num_features], float32, on rank 0. Raises ValueError
        for vectors that are not finite.
        """
        self._fetch()
        indices = torch.cat([torch.empty(0, dtype=torch.int64), *self._indices])
        vectors = torch.cat([torch.empty(0, self.num_features), *self._vectors])
        self._indices, self._vectors = [], []
        indices, vectors = distributed.gather_rows(indices), distributed.gather_rows(vectors)

        def order() -> None:
            order = torch.argsort(indices, stable=True)
            self.indices = indices[order].numpy()
            self.array = _finite(vectors[order])
            assert (np.diff(self.indices) > 0).all(), "an image came twice"

        distributed.on_main(order)

    def merged(self, other: "FeatureVectors") -> "FeatureVectors":
        """Return the vectors of both, those of ``other`` after these. Both must be gathered."""
        result = FeatureVectors(self.num_features)
        if self.array is not None:
            result.indices = np.concatenate([self.indices, other.indices])
            result.array = np.concatenate([self.array, other.array])
        return result


@dataclasses.dataclass
class FeatureSet:
    """What is known of one feature of a set of images: moments, vectors, or both."""

    moments: FeatureStatistics | None = None
    vectors: FeatureVectors | None = None

    def merged(self, other: "FeatureSet") -> "FeatureSet":
        """Return what both know, of the images of both; they must not overlap."""
        moments = self.moments is not None and other.moments is not None
        vectors = self.vectors is not None and other.vectors is not None
        return FeatureSet(
            self.moments.merged(other.moments) if moments else None,
            self.vectors.merged(other.vectors) if vectors else None,
        )


def collect_features(
    detectors: Mapping[str, Detector],
    needs: Mapping[Feature, Collection[str]],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device | str,
    keep: np.ndarray | None = None,
) -> dict[Feature, FeatureSet]:
    """Return the features of the images of all ranks, each computed once. Collective.

    Args:
        detectors: Networks on ``device``, by name; each sees every image once.
        needs: What to keep of each feature: ``moments``, ``vectors`` or both.
        batches: This rank's images as ``(indices int64 [N] on the CPU, uint8 [N, C, H, W] on any
            device)``; may be empty.
        device: Where features and their sums are computed.
        keep: Which images' vectors are kept, bool by index; None keeps all.
    """
    sets = {
        feature: FeatureSet(
            FeatureStatistics(width, device) if "moments" in wanted else None,
            FeatureVectors(width, keep) if "vectors" in wanted else None,
        )
        for feature, wanted in needs.items()
        for width in [detectors[feature.detector].outputs[feature.output]]
    }
    outputs = {
        name: tuple(feature.output for feature in needs if feature.detector == name)
        for name in dict.fromkeys(feature.detector for feature in needs)
    }
    with distributed.together():
        for indices, images in batches:
            images = images.to(device, non_blocking=True)
            # The generator behind `batches` runs outside of this mode, as without metrics.
            with torch.inference_mode():
                for name, wanted in outputs.items():
                    for output, vectors in detectors[name](images, wanted).items():
                        found = sets[Feature(name, output)]
                        if found.moments is not None:
                            found.moments.append(vectors)
                        if found.vectors is not None:
                            found.vectors.append(indices, vectors)
    for found in sets.values():
        if found.moments is not None:
            found.moments.all_reduce()
        if found.vectors is not None:
            found.vectors.gather()
    return sets
