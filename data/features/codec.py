"""The codec of feature-conditioned models: normalises stored latents and features."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import torch

from data.images.dataset import Cond
from encoders.autoencoder import Autoencoder
from torch_utils import rng
from torch_utils.pictures import to_uint8

_SMALLEST_STD = 1e-6


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Per-channel mean and standard deviation of raw latents, CLS tokens and patches.

    Tensors are float32, [c] for latents and [D] for CLS tokens and patches. Text features are used
    without normalisation.
    """

    latent_mean: torch.Tensor
    latent_std: torch.Tensor
    cls_mean: torch.Tensor
    cls_std: torch.Tensor
    patches_mean: torch.Tensor
    patches_std: torch.Tensor

    @classmethod
    def of(cls, statistics: Mapping[str, Any], device: torch.device | str = "cpu") -> Self:
        """Return the statistics in a feature folder's record, or in a snapshot trained on one."""
        fields = {}
        for name, key in (("latent", "vae"), ("cls", "cls"), ("patches", "patches")):
            for part in ("mean", "std"):
                values = torch.tensor(statistics[key][part], dtype=torch.float32, device=device)
                fields[f"{name}_{part}"] = values
            # Keeps a constant channel at zero instead of dividing by zero.
            fields[f"{name}_std"] = fields[f"{name}_std"].clamp(min=_SMALLEST_STD)
        return cls(**fields)

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Return raw latents [N, c, h, w] normalised to zero mean and unit variance, float32."""
        centred = latents.to(torch.float32) - self.latent_mean[:, None, None]
        return centred / self.latent_std[:, None, None]

    def denormalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the autoencoder's raw latents of normalised ones, float32 [N, c, h, w]."""
        mean, std = self.latent_mean[:, None, None], self.latent_std[:, None, None]
        return latents.to(torch.float32) * std + mean

    def normalise_features(self, cond: Cond) -> Cond:
        """Return conditions with normalised visual features, all features in float32."""
        cond = dict(cond)
        for name in ("cls", "patches"):
            if name in cond:
                mean, std = getattr(self, f"{name}_mean"), getattr(self, f"{name}_std")
                cond[name] = (cond[name].to(torch.float32) - mean) / std
        if "text" in cond:
            cond["text"] = cond["text"].to(torch.float32)
        return cond


class FeatureCodec:
    """Normalises stored latents and features for the network, and decodes latents.

    Args:
        statistics: Statistics of the training data, on the device of the batches.
        autoencoder: Encodes images and decodes latents; None if neither is needed.
    """

    def __init__(self, statistics: FeatureStatistics, autoencoder: Autoencoder | None) -> None:
        self.statistics, self._autoencoder = statistics, autoencoder

    def draw(self, step: rng.Step) -> None:
        """Return None: encoding stored latents and features needs no randomness."""

    def encode(
        self, latents: torch.Tensor, cond: Cond, drawn: None = None
    ) -> tuple[torch.Tensor, Cond]:
        """Return normalised latents [N, c, h, w] and conditions, float32."""
        return self.statistics.normalise(latents), self.statistics.normalise_features(cond)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Return normalised posterior means [N, c, h, w] of uint8 images [N, 3, H, W]."""
        channels = self._autoencoder.latent_channels
        return self.statistics.normalise(self._autoencoder.moments(images)[:, :channels])

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the uint8 images [N, 3, H, W] that normalised latents [N, c, h, w] decode to."""
        return self.pictures(self.statistics.denormalise(x))

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the uint8 images [N, 3, H, W] that stored raw latents [N, c, h, w] decode to."""
        raw = latents.to(self._autoencoder.device, torch.float32)
        return to_uint8(self._autoencoder.decode_raw(raw))

    def facts(self) -> dict[str, Any]:
        """Return what a score row records about the decoding."""
        return dict(vae_hash=self._autoencoder.sha256)
