"""Detectors: what turns images into the feature vectors that distributions are compared by."""

import hashlib
from collections.abc import Callable
from typing import Protocol

import torch

from dnnlib.config import did_you_mean
from metrics.inception import InceptionDetector

ImageShape = tuple[int, int, int]  # C, H, W


class Detector(Protocol):
    """Maps images to features and names exactly how.

    Attributes:
        name: Name in the registry.
        num_features: Length of a feature vector.
        hash: Hexadecimal digest of weights and preprocessing; equal hashes mean equal features.
    """

    name: str
    num_features: int
    hash: str

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 features [N, num_features] of uint8 images [N, C, H, W].

        Each image's features depend on that image alone.
        """
        ...


class PixelDetector:
    """The pixels themselves, as values in [0, 1]: needs no network, suits small images."""

    name = "pixels"

    def __init__(self, image_shape: ImageShape) -> None:
        self.image_shape = tuple(image_shape)
        self.num_features = image_shape[0] * image_shape[1] * image_shape[2]
        identity = f"pixels: uint8/255, flattened from CHW {list(image_shape)}"
        self.hash = hashlib.sha256(identity.encode()).hexdigest()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the pixels of uint8 images [N, C, H, W] as float32 [N, C * H * W] in [0, 1]."""
        if images.dtype != torch.uint8 or images.shape[1:] != self.image_shape:
            raise ValueError(
                f"The pixel detector got {images.dtype} images of shape {list(images.shape[1:])}; "
                f"expected uint8 of shape {list(self.image_shape)}, as the reference has."
            )
        return images.flatten(1).to(torch.float32) / 255


def _make_pixels(
    device: torch.device | str, image_shape: ImageShape | None, weights: str | None
) -> Detector:
    if weights is not None:
        raise ValueError(f"The pixel detector has no weights; got {weights!r}. Leave it out.")
    assert image_shape is not None, "the pixel detector needs the image shape"
    return PixelDetector(image_shape)


def _make_inception(
    device: torch.device | str, image_shape: ImageShape | None, weights: str | None
) -> Detector:
    return InceptionDetector.load(weights, device)


Factory = Callable[[torch.device | str, ImageShape | None, str | None], Detector]

DETECTORS: dict[str, Factory] = {"inception": _make_inception, "pixels": _make_pixels}


def get_detector(
    name: str,
    device: torch.device | str,
    *,
    image_shape: ImageShape | None = None,
    weights: str | None = None,
) -> Detector:
    """Return the detector of that name on ``device``. Collective: rank 0 reads the weights.

    Args:
        name: A key of :data:`DETECTORS`.
        device: Where images will be.
        image_shape: C, H, W of the images; the pixel detector needs it.
        weights: Path or URL of the weights instead of the published ones.

    Raises ValueError for an unknown name and for weights that cannot be used.
    """
    if name not in DETECTORS:
        raise ValueError(
            f"Unknown detector {name!r}; accepted: {', '.join(DETECTORS)}."
            f"{did_you_mean(name, DETECTORS)}"
        )
    return DETECTORS[name](device, image_shape, weights)
