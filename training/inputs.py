"""The data of a run, and how a loader's batch becomes what the network denoises."""

import torch

from models import LatentModelConfig
from torch_utils import rng
from training.augment import AugmentParams, AugmentPipe, make_augment_pipe
from training.autoencoder import Autoencoder, normalise
from training.config import RunConfig
from training.dataset import Cond, ImageDataset, open_dataset
from training.latents import LatentDataset, MirroredImages, is_latent_archive

TrainingData = ImageDataset | MirroredImages | LatentDataset


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
        autoencoder: Decodes for pictures, and encodes batches that are images still.
        from_images: Whether batches are uint8 images [N, C, H, W], to be encoded now, or what
            :class:`~training.latents.LatentDataset` yields.
        has_std: Whether the latter tell the posterior's standard deviation beside its mean.
    """

    def __init__(
        self, autoencoder: Autoencoder, *, from_images: bool = False, has_std: bool = True
    ) -> None:
        self._autoencoder = autoencoder
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
        return self._normalise(self._moments(batch), drawn), cond

    def pictures(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the uint8 images [N, C, H, W] of a loader's batch, decoded if it is latents."""
        if self._from_images:
            return batch
        channels = self._autoencoder.latent_channels
        means = batch[:, :channels].to(self._autoencoder.device)
        return to_uint8(self._autoencoder.decode(self._normalise(means, None)))

    @torch.no_grad()
    def _moments(self, batch: torch.Tensor) -> torch.Tensor:
        return self._autoencoder.moments(batch) if self._from_images else batch

    def _normalise(self, moments: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        autoencoder = self._autoencoder
        return normalise(
            moments, noise, autoencoder.scale, autoencoder.shift, autoencoder.latent_channels
        )


def open_training_data(config: RunConfig) -> TrainingData:
    """Return the dataset of a run: images, or the latents of an archive.

    Raises ValueError if there is none, or if it is of the wrong kind for the model.
    """
    data, is_latent_model = config.data, isinstance(config.model, LatentModelConfig)
    if data.data is not None and is_latent_archive(data.data):
        if not is_latent_model:
            raise ValueError(
                f"--data: {data.data} holds latents, but preset {config.preset} trains on pixels; "
                "give the images, or a preset of latent models."
            )
        if data.cache:
            raise ValueError("--cache has no effect on latents, which need no decoding.")
        return LatentDataset(
            data.data,
            use_labels=data.cond,
            max_size=data.max_size,
            seed=config.training.seed,
            hflip=data.hflip,
        )
    dataset = open_dataset(data, seed=config.training.seed)
    if is_latent_model and config.model.vae is None:
        raise ValueError(
            f"--data: {data.data} holds images, but preset {config.preset} trains on latents; "
            "encode them with dataset_tool.py encode and give the result, or name the autoencoder "
            "with --vae to encode while training."
        )
    return MirroredImages(dataset) if data.hflip else dataset


def make_inputs(
    config: RunConfig, dataset: TrainingData, autoencoder: Autoencoder | None
) -> PixelInputs | LatentInputs:
    """Return how a run's batches become inputs of its network."""
    if autoencoder is None:
        return PixelInputs(make_augment_pipe(config.training.augment))
    if isinstance(dataset, LatentDataset):
        return LatentInputs(autoencoder, has_std=dataset.has_std)
    return LatentInputs(autoencoder, from_images=True)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Return images in [-1, 1] as uint8: clip(127.5 x + 128), as EDM rounds."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)
