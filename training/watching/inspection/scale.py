"""Whether data have the standard deviation that the model expects."""

import math

import torch
from torch import Tensor

from training.watching.finding import Finding
from training.watching.inspection.sample import Sample

# Factor by which the standard deviation may differ from what is expected. Data differ: it is about
# 0.5 for pixels of photographs, 0.75 for handwritten digits.
_TOLERANCE = dict(sigma_data=1.75, latents=2.0, visual=1.75)
_MIN_ITEMS = 8
_STANDARD_ERRORS = 4.0  # Required beyond the tolerance: 1 in 30,000 by chance.


def measured_std(parts: list[Tensor]) -> tuple[float, float]:
    """Return the standard deviation of values about their channel means, and its relative error.

    Each part is [N, C, ...], such as the images of one size. The error is the standard error of the
    logarithm, estimated from the variation among items. Constant values, or fewer than two items,
    give 0 and infinity.
    """
    num = sum(part[:, 0].numel() for part in parts)
    mean = sum(part.transpose(0, 1).flatten(1).sum(1, dtype=torch.float64) for part in parts) / num
    squares = []
    for part in parts:
        centre = mean.to(part.dtype).reshape(1, -1, *[1] * (part.ndim - 2))
        squares.append((part - centre).square().flatten(1).mean(1, dtype=torch.float64))
    each = torch.cat(squares)
    variance = float(each.mean())
    if variance == 0 or len(each) < 2:
        return 0.0, math.inf
    relative = float(each.std() / len(each) ** 0.5) / variance
    return variance**0.5, relative / 2


def is_far(parts: list[Tensor], expected: float, tolerance: float) -> float | None:
    """Return the standard deviation of parts [N, C, ...] if it is far from ``expected``, else None.

    It is far if it differs by more than the factor ``tolerance`` and four standard errors.
    """
    if sum(map(len, parts)) < _MIN_ITEMS:
        return None
    std, error = measured_std(parts)
    if std == 0:  # Constant data have no scale.
        return None
    distance = abs(math.log(std / expected)) - _STANDARD_ERRORS * error
    return std if distance > math.log(tolerance) else None


def find_wrong_scale(sample: Sample) -> list[Finding]:
    """Return findings on data, latents and features whose scale is not what the model expects."""
    findings = []
    if sample.std is not None:
        parts = [batch.x for batch in sample.batches]
        std = is_far(parts, sample.std, _TOLERANCE[sample.std_from])
        if std is not None:
            findings.append(
                _of_sigma_data(std, sample) if sample.std_from == "sigma_data" else _of_latents(std)
            )
    for name in sample.visual:
        # Positions first, so that the channels are those of the features.
        parts = [
            batch.cond[name].flatten(1, -2).mT if batch.cond[name].ndim > 2 else batch.cond[name]
            for batch in sample.batches
            if name in batch.cond
        ]
        std = is_far(parts, 1.0, _TOLERANCE["visual"])
        if std is not None:
            findings.append(_of_features(std, name))
    return findings


def _of_sigma_data(std: float, sample: Sample) -> Finding:
    return Finding(
        name="sigma_data_wrong",
        message=f"The data have a standard deviation of {std:.3g}, but --sigma-data is "
        f"{sample.std:g}",
        remedy=f"start again with --sigma-data={std:.2g}, or check whether the data are correct",
    )


def _of_latents(std: float) -> Finding:
    return Finding(
        name="latents_scale",
        message=f"Normalised latents have a standard deviation of {std:.3g}, where the model "
        "expects about 1",
        remedy="check whether the data were encoded by the autoencoder that their "
        "record names, and encode them again; an autoencoder's scaling_factor should be 1 over the "
        "standard deviation of its latents",
    )


def _of_features(std: float, name: str) -> Finding:
    what = {"cls": "CLS tokens", "patches": "patches"}[name]
    return Finding(
        name="features_scale",
        message=f"Normalised features of {what} have a standard deviation of {std:.3g}, where the "
        "statistics of the record promise 1",
        remedy="prepare the features again with dataset_tool.py features, or see with "
        "dataset_tool.py verify whether they are damaged",
    )
