"""Vision transformers as detectors, through Hugging Face's transformers: DINOv2 and CLIP."""

import math
import types
from collections.abc import Collection

import torch
from torch import nn

from encoders.loading import Pretrained
from metrics.network import NetworkDetector

DINOV2_LOCATION = "facebook/dinov2-large"
DINOV2_SIZE = 224
CLIP_LOCATION = "openai/clip-vit-large-patch14-336"
# Channel statistics that the networks were trained with, of values in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# What features depend on that the weights do not show.
_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads")
# Where a folder has safetensors, those are read; CLIP's published one has a pickle.
_DETECTOR = dict(noun="detector", files="config.json and weights", extra="detectors", pickles=True)
DINOV2 = Pretrained(option="--dinov2", class_name="Dinov2Model", kinds=("dinov2",), **_DETECTOR)
CLIP = Pretrained(
    option="--clip",
    class_name="CLIPVisionModelWithProjection",
    kinds=("clip", "clip_vision_model"),
    **_DETECTOR,
)


class _VisionTransformer(NetworkDetector):
    """A transformer that sees images resized to a square, normalised channel by channel."""

    def __init__(
        self,
        network: nn.Module,
        device: torch.device | str,
        *,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        num_features: int,
        precision: str = "float32",
    ) -> None:
        self.outputs = types.MappingProxyType({"features": num_features})
        self._size = size
        self._mean = torch.tensor(mean, device=device)[:, None, None]
        self._std = torch.tensor(std, device=device)[:, None, None]
        self.preprocessing = f"antialiased bicubic to {size}, (x / 255 - mean) / std"
        settings = {setting: getattr(network.config, setting) for setting in _SETTINGS}
        identity = f"{self.name}, {self.preprocessing}, {mean}, {std}, {settings}"
        super().__init__(network, device, identity=identity, precision=precision)

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

    def __init__(
        self, network: nn.Module, device: torch.device | str, precision: str = "float32"
    ) -> None:
        """``network`` is a ``transformers.Dinov2Model``; its position embeddings are resized."""
        embeddings = network.embeddings
        grid = DINOV2_SIZE // network.config.patch_size
        embeddings.position_embeddings = nn.Parameter(
            resize_positions(embeddings.position_embeddings.detach(), grid)
        )
        super().__init__(
            network,
            device,
            size=DINOV2_SIZE,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            num_features=network.config.hidden_size,
            precision=precision,
        )

    @classmethod
    def load(
        cls, location: str | None, device: torch.device | str, precision: str = "float32"
    ) -> "DinoV2Detector":
        """Return the detector with weights from a local folder or a Hugging Face id. Collective."""
        return cls(DINOV2.load(location or DINOV2_LOCATION), device, precision)

    def _extract(self, x: torch.Tensor, outputs: Collection[str]) -> dict[str, torch.Tensor]:
        return {"features": self._network(pixel_values=x).last_hidden_state[:, 0]}


class ClipDetector(_VisionTransformer):
    """CLIP's image embedding, scaled to unit length, for CMMD.

    Sources: Radford et al., arXiv:2103.00020 (network); Jayasumana et al., arXiv:2401.09603 (use as
    a metric).
    """

    name = "clip"

    def __init__(
        self, network: nn.Module, device: torch.device | str, precision: str = "float32"
    ) -> None:
        """``network`` is a ``transformers.CLIPVisionModelWithProjection``."""
        super().__init__(
            network,
            device,
            size=network.config.image_size,
            mean=CLIP_MEAN,
            std=CLIP_STD,
            num_features=network.config.projection_dim,
            precision=precision,
        )

    @classmethod
    def load(
        cls, location: str | None, device: torch.device | str, precision: str = "float32"
    ) -> "ClipDetector":
        """Return the detector with weights from a local folder or a Hugging Face id. Collective."""
        return cls(CLIP.load(location or CLIP_LOCATION), device, precision)

    def _extract(self, x: torch.Tensor, outputs: Collection[str]) -> dict[str, torch.Tensor]:
        embeddings = self._network(pixel_values=x).image_embeds.float()
        return {"features": nn.functional.normalize(embeddings, dim=1)}


def resize_positions(positions: torch.Tensor, grid: int) -> torch.Tensor:
    """Return position embeddings [1, 1 + n^2, D] for a grid [1, 1 + grid^2, D], the CLS one first.

    As in DINOv2's own code: bicubic, without averaging, by the scale (grid + 0.1) / n, whose offset
    once guarded against rounding. transformers resizes to the exact grid instead, which gives
    slightly different features; a published FD-DINOv2 comes from the former.
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
