"""The data of a run, and how a loader's batch becomes what the network denoises."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dnnlib.addresses import is_address
from models import LatentModelConfig, ModelConfig
from torch_utils import rng
from training.augment import AugmentParams, AugmentPipe, make_augment_pipe
from training.autoencoder import Autoencoder, load_autoencoder, normalise
from training.config import RunConfig
from training.dataset import Cond, ImageDataset, MirroredImages, open_dataset
from training.feature_data import FeatureDataset
from training.feature_record import is_feature_folder
from training.feature_statistics import FeatureStatistics
from training.feature_streaming import StreamedFeatures
from training.latent_archive import is_latent_folder, read_record
from training.latents import LatentDataset
from training.pictures import image_grid, mixed_grid, save_image
from training.sets import SetDataset

_NUM_REALS = 64

TrainingData = ImageDataset | MirroredImages | LatentDataset | SetDataset | FeatureDataset


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
            :class:`~training.latents.LatentDataset` yields.
        has_std: Whether the latter tell the posterior's standard deviation beside its mean.
    """

    def __init__(
        self,
        model: LatentModelConfig,
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


def open_training_data(config: RunConfig) -> TrainingData:
    """Return the dataset of a run: images, sets of them, the latents of an archive, or features.

    Raises ValueError if there is none, or if it is of the wrong kind for the model.
    """
    data, is_latent_model = config.data, isinstance(config.model, LatentModelConfig)
    if config.features is not None:
        return _open_features(config)
    if data.data is not None and is_feature_folder(data.data):
        raise ValueError(
            f"--data: {data.data} holds features, but preset {config.preset} does not train on "
            "them; give images, or a preset such as nanodit."
        )
    if data.data is not None and is_latent_folder(data.data):
        if not is_latent_model:
            raise ValueError(
                f"--data: {data.data} holds latents, but preset {config.preset} trains on pixels; "
                "give the images, or a preset of latent models."
            )
        if data.cache:
            raise ValueError("--cache has no effect on latents, which need no decoding.")
        check_resolution(config, read_record(data.data).resolution)
        return LatentDataset(
            data.data,
            use_labels=data.cond,
            max_size=data.max_size,
            seed=config.training.seed,
            hflip=data.hflip,
        )
    if config.sets is not None:
        images = open_dataset(data, seed=config.training.seed, use_labels=None)
        check_resolution(config, images.resolution)
        return SetDataset(
            images,
            config.sets,
            sample_size=config.model.sample_size,
            seed=config.training.seed,
            use_labels=data.cond,
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


def _open_features(config: RunConfig) -> FeatureDataset:
    data, streaming = config.data, config.features.streaming
    is_remote = data.data is not None and is_address(data.data)
    if is_remote and not streaming:
        raise ValueError(f"--data: got {data.data}; add --streaming, which reads addresses.")
    if not is_remote and (data.data is None or not is_feature_folder(data.data)):
        raise ValueError(
            f"--data: got {data.data}; preset {config.preset} trains on a folder made by "
            "dataset_tool.py features."
        )
    for option, value, reason in (
        ("--cond", data.cond, "there are no class labels"),
        ("--hflip", data.hflip, "mirrored latents do not belong to the features of an image"),
        ("--cache", data.cache, "nothing is decoded"),
        ("--max-size", data.max_size, "prepare fewer images with --max-images"),
    ):
        if value:
            raise ValueError(f"{option} has no effect on features: {reason}.")
    kind = StreamedFeatures if streaming else FeatureDataset
    return kind(data.data, text_lengths=config.features.text_lengths)


def open_autoencoder(
    model: ModelConfig, vae: str | None, device: torch.device
) -> Autoencoder | None:
    """Return the autoencoder of a latent model, or None for a model of pixels.

    ``vae`` says where it is now, if not where ``model`` has it. Raises ValueError if it is not
    there, is not the one that the latents are of, or if a model of pixels is given one.
    """
    if not isinstance(model, LatentModelConfig):
        if vae is not None:
            raise ValueError(f"--vae: got {vae}, but this model makes images without one.")
        return None
    location = vae or model.vae
    if location is None:
        raise ValueError("--vae is missing: name the autoencoder that decodes the latents.")
    autoencoder = load_autoencoder(location, device, expected_hash=model.vae_hash)
    check_autoencoder(model, autoencoder)
    return autoencoder


def check_autoencoder(model: LatentModelConfig, autoencoder: Autoencoder) -> None:
    """Raise ValueError if an autoencoder's latents or images are not those of a model."""
    for what, option, own, there in (
        ("channels of the latents", "--latent-channels", model.latent_channels, "latent_channels"),
        ("downsampling", "--latent-downsampling", model.latent_downsampling, "downsampling"),
        ("channels of the images", None, model.img_channels, "img_channels"),
        ("scale", None, model.latent_scale, "scale"),
        ("shift", None, model.latent_shift, "shift"),
    ):
        found = getattr(autoencoder, there)
        if found != own:
            remedy = "use the one that the model was made for"
            if option is not None:
                remedy += f", or train with {option}={found}"
            raise ValueError(
                f"--vae: {autoencoder.location} has {what} {found:g}, but the model has {own:g}; "
                f"{remedy}."
            )


def check_resolution(config: RunConfig, resolution: int) -> None:
    """Raise ValueError if the images of a run's data have another size than its model makes."""
    expected = config.model.resolution
    if resolution != expected:
        raise ValueError(
            f"--resolution: this run expects {expected}x{expected} images, but {config.data.data} "
            f"holds {resolution}x{resolution}. Give --resolution={resolution} or another preset, "
            f"or convert the data with dataset_tool.py convert --resolution={expected}."
        )


def make_inputs(
    config: RunConfig,
    dataset: TrainingData,
    autoencoder: Autoencoder | None,
    device: torch.device,
) -> PixelInputs | LatentInputs | FeatureInputs:
    """Return how a run's batches become inputs of its network on ``device``.

    A latent model needs its ``autoencoder`` for pictures, and for a dataset of images.
    """
    if isinstance(dataset, FeatureDataset):
        statistics = FeatureStatistics.of(dataset.record.statistics, device)
        return FeatureInputs(statistics, autoencoder)
    if not isinstance(config.model, LatentModelConfig):
        return PixelInputs(make_augment_pipe(config.training.augment))
    if isinstance(dataset, LatentDataset):
        has_std = dataset.record.kind == "mean-std"
        return LatentInputs(config.model, autoencoder, has_std=has_std)
    return LatentInputs(config.model, autoencoder, from_images=True)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Return images in [-1, 1] as uint8: clip(127.5 x + 128), as EDM rounds."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)


def save_reals(
    dataset: TrainingData, pictures: Callable[[torch.Tensor], torch.Tensor], path: str | Path
) -> None:
    """Write a grid of 64 images, spread evenly over the dataset (sorted by class if labelled).

    Of sets, as many as hold about as many images are shown, each in a row. ``pictures`` makes uint8
    images [..., C, H, W] of what the dataset yields.
    """
    if isinstance(dataset, FeatureDataset):
        num = min(_NUM_REALS, dataset.num_images)
        chosen = np.linspace(0, dataset.num_images - 1, num).round().astype(int)
        images = [pictures(dataset.latents(index)[None])[0].cpu() for index in chosen.tolist()]
        save_image(mixed_grid([images[row : row + 8] for row in range(0, num, 8)]), path)
        return
    if isinstance(dataset, SetDataset):
        batch, _ = dataset.__getitems__(range(-(-_NUM_REALS // dataset.sample_size)))
        save_image(image_grid(pictures(batch).flatten(0, 1), columns=dataset.sample_size), path)
        return
    order = np.arange(dataset.num_images)
    if dataset.labels is not None:
        order = np.argsort(dataset.labels, kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, min(_NUM_REALS, len(order))).round().astype(int)]
    batch, _ = dataset.__getitems__(chosen.tolist())
    save_image(image_grid(pictures(batch), columns=8), path)
