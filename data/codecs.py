"""What a loader's batch becomes for the network, and back."""

import torch

from data.features.statistics import FeatureStatistics
from data.images.augment import AugmentParams, AugmentPipe
from data.images.dataset import Cond
from encoders.autoencoder import Autoencoder, normalise
from models import ScaledLatentConfig
from torch_utils import rng
from torch_utils.pictures import to_uint8


class PixelInputs:
    """Images in [-1, 1], augmented.

    Args:
        augment_pipe: Geometric augmentation, if any; its labels [N, 9] join the conditions.
    """

    def __init__(self, augment_pipe: AugmentPipe | None = None) -> None:
        self._augment_pipe = augment_pipe

    def draw(
        self, *, seed: int, cur_nimg: int, batch: int, shape: tuple[int, ...], device: torch.device
    ) -> AugmentParams | None:
        """Return the augmentation of the global batch that starts at image ``cur_nimg``."""
        if self._augment_pipe is None:
            return None
        generator = rng.step_generator(seed, cur_nimg, rng.STREAM_AUGMENT, device)
        return self._augment_pipe.draw(batch, generator, device)

    def prepare(
        self, images: torch.Tensor, cond: Cond, drawn: AugmentParams | None
    ) -> tuple[torch.Tensor, Cond]:
        """Return float32 images [N, C, H, W] of uint8 ones, with the conditions."""
        images = images.to(torch.float32) / 127.5 - 1
        if self._augment_pipe is not None:
            images, labels = self._augment_pipe.apply(images, drawn)
            cond = {**cond, "augment": labels}
        return images, cond

    def pictures(self, images: torch.Tensor) -> torch.Tensor:
        """Return the uint8 images [N, C, H, W] of a loader's batch."""
        return images


class LatentInputs:
    """Latents drawn from the autoencoder's posterior: anew each time that an image is seen.

    Args:
        model: Tells the latents' channels and their normalisation.
        autoencoder: Decodes for pictures, and encodes batches that are images still.
        from_images: Whether batches are uint8 images [N, C, H, W], to be encoded now, or what
            :class:`~data.latents.dataset.LatentDataset` yields.
        has_std: Whether the latter tell the posterior's standard deviation beside its mean.
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

    def draw(
        self, *, seed: int, cur_nimg: int, batch: int, shape: tuple[int, ...], device: torch.device
    ) -> torch.Tensor | None:
        """Return standard normal numbers [batch, *shape] for the global batch at ``cur_nimg``."""
        if not self._is_random:
            return None
        generator = rng.step_generator(seed, cur_nimg, rng.STREAM_POSTERIOR, device)
        return torch.randn(batch, *shape, generator=generator, device=device)

    def prepare(
        self, batch: torch.Tensor, cond: Cond, drawn: torch.Tensor | None
    ) -> tuple[torch.Tensor, Cond]:
        """Return normalised float32 latents [N, c, h, w], with the conditions."""
        moments = self._autoencoder.moments(batch) if self._from_images else batch
        return self._normalise(moments, drawn), cond

    def pictures(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the uint8 images [N, C, H, W] of a loader's batch, decoded if it is latents."""
        if self._from_images:
            return batch
        means = self._normalise(batch[:, : self._model.latent_channels], None)
        return to_uint8(self._autoencoder.decode(means))

    def _normalise(self, moments: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        model = self._model
        return normalise(
            moments, noise, model.latent_scale, model.latent_shift, model.latent_channels
        )


class FeatureInputs:
    """Normalised latents and features.

    Args:
        statistics: Of the data, on the device.
        autoencoder: Decodes for pictures.
    """

    def __init__(self, statistics: FeatureStatistics, autoencoder: Autoencoder) -> None:
        self._statistics, self._autoencoder = statistics, autoencoder

    def draw(
        self, *, seed: int, cur_nimg: int, batch: int, shape: tuple[int, ...], device: torch.device
    ) -> None:
        """Return nothing: what is stored is what a network sees."""

    def prepare(self, latents: torch.Tensor, cond: Cond, drawn: None) -> tuple[torch.Tensor, Cond]:
        """Return latents and conditions, normalised, in float32."""
        statistics = self._statistics
        return statistics.normalise(latents), statistics.normalise_features(cond)

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the uint8 images [N, C, H, W] of a loader's batch."""
        return to_uint8(self._autoencoder.decode_raw(latents))
