"""Detectors: they map images to vectors, whose distributions the metrics compare."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dnnlib.config import unknown

if TYPE_CHECKING:
    import torch

ImageShape = tuple[int, int, int]  # C, H, W


class DetectorOutput(NamedTuple):
    """One output of one detector, which metrics compare; written as ``detector/name``."""

    detector: str
    name: str = "features"

    def __str__(self) -> str:
        return f"{self.detector}/{self.name}"

    @classmethod
    def parse(cls, text: str) -> DetectorOutput:
        """Return the output that ``text``, of the form ``detector/name``, stands for."""
        return cls(*text.split("/", 1))


class Detector(Protocol):
    """Maps images to vectors, and identifies exactly how it does so."""

    name: str
    outputs: Mapping[str, int]  # Length of the vectors of each output, by its name.
    hash: str  # Covers weights, preprocessing and arithmetic; equal hashes mean equal outputs.
    preprocessing: str  # How images become the network's input: one line, as shown to people.
    precision: str  # Arithmetic of the network, ``float32`` or ``bfloat16``.

    def __call__(
        self, images: torch.Tensor, outputs: Collection[str] = ("features",)
    ) -> dict[str, torch.Tensor]:
        """Return float32 vectors [N, D] of uint8 images [N, C, H, W] for each of ``outputs``.

        The vector of an image depends on that image alone.
        """


class PixelDetector:
    """The pixels themselves, scaled to [0, 1]; needs no network and suits small images."""

    name = "pixels"
    precision = "float32"

    def __init__(self, image_shape: ImageShape) -> None:
        self.image_shape = tuple(image_shape)
        self.preprocessing = f"x / 255 of {'x'.join(map(str, image_shape))} [C, H, W], flattened"
        self.outputs = {"features": math.prod(image_shape)}
        identity = f"pixels: uint8/255, flattened from CHW {list(image_shape)}"
        self.hash = hashlib.sha256(identity.encode()).hexdigest()

    def __call__(
        self, images: torch.Tensor, outputs: Collection[str] = ("features",)
    ) -> dict[str, torch.Tensor]:
        """Return the pixels of uint8 images [N, C, H, W] as float32 [N, C * H * W] in [0, 1].

        Raises ValueError for another dtype, and for shapes other than that of the constructor.
        """
        import torch

        assert set(outputs) <= set(self.outputs)
        if images.dtype != torch.uint8 or images.shape[1:] != self.image_shape:
            got = f"{images.dtype} images of shape {list(images.shape[1:])}"
            expected = f"expected uint8 of shape {list(self.image_shape)}"
            raise ValueError(f"The pixel detector got {got}; {expected}.")
        return {"features": images.flatten(1).to(torch.float32) / 255}


DETECTORS = ("inception", "dinov2", "clip", "pixels")


def get_detector(
    name: str,
    device: torch.device | str,
    *,
    image_shape: ImageShape | None = None,
    location: str | None = None,
    convention: str = "tensorflow",
    precision: str = "float32",
) -> Detector:
    """Return the detector of that name on ``device``. Collective: rank 0 reads the weights.

    Args:
        name: One of :data:`DETECTORS`.
        device: Device on which the detector runs and expects its images.
        image_shape: C, H, W of the images; only ``pixels`` needs it.
        location: Weights to use instead of the published ones: a path or URL for ``inception``, a
            local folder or Hugging Face id for ``dinov2`` and ``clip``.
        convention: Input convention of ``inception``: ``tensorflow`` or ``pytorch-fid``.
        precision: Arithmetic of the network: ``float32`` or ``bfloat16``.

    Raises ValueError for an unknown name, for weights that cannot be used, and for a ``location``
    given to ``pixels``.
    """
    if name not in DETECTORS:
        raise unknown("detector", name, DETECTORS)
    if name == "pixels":
        if location is not None:
            raise ValueError(f"The pixel detector has no weights; got {location!r}. Leave it out.")
        assert image_shape is not None, "the pixel detector needs the image shape"
        return PixelDetector(image_shape)
    if name == "inception":
        from metrics.inception import InceptionDetector

        return InceptionDetector.load(location, device, convention=convention, precision=precision)
    from metrics.vit import ClipDetector, DinoV2Detector

    detector_class = DinoV2Detector if name == "dinov2" else ClipDetector
    return detector_class.load(location, device, precision)
