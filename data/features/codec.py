"""Stored latents and features: what a batch of them is to the network, and back."""

from typing import Any

import torch

from data.features.statistics import FeatureStatistics
from data.images.dataset import Cond
from encoders.autoencoder import Autoencoder
from torch_utils import rng
from torch_utils.pictures import to_uint8


class FeatureCodec:
    """Latents and features, normalised.

    Args:
        statistics: Of the training data, on the device.
        autoencoder: Decodes latents; may be None where nothing is decoded.
    """

    def __init__(self, statistics: FeatureStatistics, autoencoder: Autoencoder | None) -> None:
        self._statistics, self._autoencoder = statistics, autoencoder

    def draw(self, step: rng.Step) -> None:
        """Return nothing: the network sees what is stored."""

    def encode(
        self, latents: torch.Tensor, cond: Cond, drawn: None = None
    ) -> tuple[torch.Tensor, Cond]:
        """Return latents [N, c, h, w] and conditions, normalised, in float32."""
        return self._statistics.normalise(latents), self.encode_cond(cond)

    def encode_cond(self, cond: Cond) -> Cond:
        """Return conditions with normalised visual features, all features in float32."""
        return self._statistics.normalise_features(cond)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Return uint8 images [N, 3, H, W] of normalised latents [N, c, h, w]."""
        return self.pictures(self._statistics.denormalise(x))

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the uint8 images [N, 3, H, W] of stored latents [N, c, h, w]."""
        raw = latents.to(self._autoencoder.device, torch.float32)
        return to_uint8(self._autoencoder.decode_raw(raw))

    def facts(self) -> dict[str, Any]:
        """Return what a score row says of the decoding."""
        return dict(vae_hash=self._autoencoder.sha256)
