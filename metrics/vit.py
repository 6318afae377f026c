"""Vision transformers from Hugging Face's transformers as detectors: DINOv2 and CLIP."""

import math
import types
from collections.abc import Collection
from typing import Self

import torch
from torch import nn

from encoders.loading import Pretrained
from metrics.network import NetworkDetector

DINOV2_SIZE = 224
# Settings that the outputs depend on and that cannot be seen from the weights.
_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads")
# Safetensors are preferred, but pickles are allowed, since CLIP is published with one.
_DETECTOR = dict(noun="detector", files="config.json and weights", extra="detectors", pickles=True)


class _VisionTransformer(NetworkDetector):
    """A transformer whose input is images resized to a square and normalised per channel.

    A subclass defines where its weights come from, and the mean and standard deviation of each
    channel, for values in [0, 1], that the network was trained with.
    """

    pretrained: Pretrained
    published: str  # Hugging Face id of the usual weights.
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __init__(
        self, network: nn.Module, device: torch.device | str, precision: str, size: int, dim: int
    ) -> None:
        """``size`` is the side of the input in pixels, ``dim`` the length of the output."""
        self.outputs = types.MappingProxyType({"features": dim})
        self._size = size
        self._mean = torch.tensor(self.mean, device=device)[:, None, None]
        self._std = torch.tensor(self.std, device=device)[:, None, None]
        self.preprocessing = f"antialiased bicubic to {size}, (x / 255 - mean) / std"
        settings = {setting: getattr(network.config, setting) for setting in _SETTINGS}
        identity = f"{self.name}, {self.preprocessing}, {self.mean}, {self.std}, {settings}"
        super().__init__(network, device, identity, precision)

    @classmethod
    def load(
        cls, location: str | None, device: torch.device | str, precision: str = "float32"
    ) -> Self:
        """Return the detector with weights from a local folder or a Hugging Face id. Collective."""
        return cls(cls.pretrained.load(location or cls.published), device, precision)

    def _preprocess(self, images: torch.Tensor) -> torch.Tensor:
        x = nn.functional.interpolate(
            images.to(torch.float32), (self._size, self._size), mode="bicubic", antialias=True
        )
        return (x / 255 - self._mean) / self._std


class DinoV2Detector(_VisionTransformer):
    """The normalised CLS token of DINOv2 at 224x224, for FD-DINOv2.

    Sources: Oquab et al., arXiv:2304.07193 (network); Stein et al., arXiv:2306.04675 (use as a
    metric); preprocessing as in EDM2 (arXiv:2312.02696).
    """

    name = "dinov2"
    pretrained = Pretrained(
        option="--dinov2", class_name="Dinov2Model", kinds=("dinov2",), **_DETECTOR
    )
    published = "facebook/dinov2-large"
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(
        self, network: nn.Module, device: torch.device | str, precision: str = "float32"
    ) -> None:
        """``network`` is a ``transformers.Dinov2Model``, whose position embeddings are resized."""
        embeddings = network.embeddings
        grid = DINOV2_SIZE // network.config.patch_size
        embeddings.position_embeddings = nn.Parameter(
            resize_positions(embeddings.position_embeddings.detach(), grid)
        )
        super().__init__(network, device, precision, DINOV2_SIZE, network.config.hidden_size)

    def _extract(self, x: torch.Tensor, outputs: Collection[str]) -> dict[str, torch.Tensor]:
        return {"features": self._network(pixel_values=x).last_hidden_state[:, 0]}


class ClipDetector(_VisionTransformer):
    """CLIP's image embedding, scaled to unit length, for CMMD.

    Sources: Radford et al., arXiv:2103.00020 (network); Jayasumana et al., arXiv:2401.09603 (use as
    a metric).
    """

    name = "clip"
    kinds = ("clip", "clip_vision_model")
    pretrained = Pretrained(
        option="--clip", class_name="CLIPVisionModelWithProjection", kinds=kinds, **_DETECTOR
    )
    published = "openai/clip-vit-large-patch14-336"
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def __init__(
        self, network: nn.Module, device: torch.device | str, precision: str = "float32"
    ) -> None:
        """``network`` is a ``transformers.CLIPVisionModelWithProjection``."""
        config = network.config
        super().__init__(network, device, precision, config.image_size, config.projection_dim)

    def _extract(self, x: torch.Tensor, outputs: Collection[str]) -> dict[str, torch.Tensor]:
        embeddings = self._network(pixel_values=x).image_embeds.float()
        return {"features": nn.functional.normalize(embeddings, dim=1)}


def resize_positions(positions: torch.Tensor, grid: int) -> torch.Tensor:
    """Return position embeddings [1, 1 + n^2, D] resized to [1, 1 + grid^2, D]; CLS comes first.

    As in DINOv2's own code, interpolation is bicubic, without antialiasing, and by the scale
    (grid + 0.1) / n, whose offset once guarded against rounding. transformers resizes to the exact
    grid instead, which changes the outputs slightly; published FD-DINOv2 scores use DINOv2's code.
    """
    length = math.isqrt(positions.shape[1] - 1)
    if length == grid:
        return positions.clone()
    patches = positions[:, 1:].unflatten(1, (length, length)).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(
        patches.to(torch.float32), scale_factor=(grid + 0.1) / length, mode="bicubic"
    )
    assert patches.shape[2:] == (grid, grid)
    return torch.cat([positions[:, :1], patches.flatten(2).permute(0, 2, 1)], dim=1)
