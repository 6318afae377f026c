"""Mean and covariance of features, accumulated batch by batch and over ranks."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from metrics.features import Detector
from torch_utils import distributed


class FeatureStatistics:
    """Count, mean and covariance of feature vectors, from sums in float64.

    Sums are taken about a shift, the mean of this rank's first batch, so that the covariance does
    not come from the difference of two large numbers: a constant feature gets a variance of 0 to
    rounding. The result depends on how the images were split into batches and over ranks only
    through the rounding of float64.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        """``device`` holds the sums; on GPUs every rank must name its own, even without images."""
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


def collect_statistics(
    detectors: Sequence[Detector], batches: Iterable[torch.Tensor], device: torch.device | str
) -> list[FeatureStatistics]:
    """Return the statistics of the images of all ranks, one per detector. Collective.

    Args:
        detectors: Networks on ``device``; each sees every image once.
        batches: This rank's images, uint8 [N, C, H, W] on any device; may be empty.
        device: Where features and sums are computed.
    """
    statistics = [FeatureStatistics(detector.num_features, device) for detector in detectors]
    for images in batches:
        images = images.to(device, non_blocking=True)
        # The generator behind `batches` runs outside of this mode, as it would without metrics.
        with torch.inference_mode():
            for detector, accumulated in zip(detectors, statistics, strict=True):
                accumulated.append(detector(images))
    for accumulated in statistics:
        accumulated.all_reduce()
    return statistics
