"""The codec of latent models: moments or images to normalised latents, and back to images."""

from typing import Any

import torch

from data.images.dataset import Cond
from encoders.autoencoder import Autoencoder, normalise
from models import ScaledLatentConfig
from torch_utils import rng
from torch_utils.pictures import to_uint8


class LatentCodec:
    """Samples latents from the autoencoder's posterior, anew each time an image is seen.

    Args:
        model: Channels of the latents and their normalisation.
        autoencoder: Decodes latents, and encodes batches of images; None if neither is needed.
        from_images: Whether batches are uint8 images [N, C, H, W], to be encoded on the fly, or the
            moments that :class:`~data.latents.dataset.LatentDataset` yields.
        has_std: Whether moments include the posterior's standard deviation, or only its mean.
    """

    def __init__(
        self,
        model: ScaledLatentConfig,
        autoencoder: Autoencoder | None,
        *,
        from_images: bool = False,
        has_std: bool = True,
    ) -> None:
        self._model, self._autoencoder = model, autoencoder
        self._from_images = from_images
        self._is_random = from_images or has_std

    def draw(self, step: rng.Step) -> torch.Tensor | None:
        """Return standard normal noise [batch, c, h, w] for the global batch, or None for means."""
        if not self._is_random:
            return None
        generator = step.generator(rng.STREAM_POSTERIOR)
        return torch.randn(step.batch, *step.shape, generator=generator, device=step.device)

    def encode(
        self, batch: torch.Tensor, cond: Cond, drawn: torch.Tensor | None
    ) -> tuple[torch.Tensor, Cond]:
        """Return normalised latents, float32 [N, c, h, w], and the unchanged conditions.

        With ``drawn`` None, the latents are the posterior's means.
        """
        moments = self._autoencoder.moments(batch) if self._from_images else batch
        return self._normalise(moments, drawn), cond

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Return normalised posterior means [N, c, h, w] of uint8 images [N, C, H, W]."""
        return self._normalise(self._autoencoder.moments(images), None)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the uint8 images [N, C, H, W] that normalised latents [N, c, h, w] decode to."""
        return to_uint8(self._autoencoder.decode(x.to(torch.float32)))

    def pictures(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the uint8 images [N, C, H, W] of a loader's batch, decoded if it holds latents."""
        if self._from_images:
            return batch
        return self.decode(self._normalise(batch[:, : self._model.latent_channels], None))

    def facts(self) -> dict[str, Any]:
        """Return what a score row records about the decoding."""
        return dict(vae_hash=self._autoencoder.sha256)

    def _normalise(self, moments: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        model = self._model
        return normalise(
            moments, noise, model.latent_scale, model.latent_shift, model.latent_channels
        )
