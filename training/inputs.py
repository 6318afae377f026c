"""The data of a run, and how a loader's batch becomes what the network denoises."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data.codecs import FeatureInputs, LatentInputs, PixelInputs
from data.features.dataset import FeatureDataset
from data.features.record import is_feature_folder
from data.features.statistics import FeatureStatistics
from data.features.streaming import StreamedFeatures
from data.fewshot.sets import SetDataset
from data.images.augment import make_augment_pipe
from data.images.dataset import ImageDataset, MirroredImages, open_dataset
from data.latents.dataset import LatentDataset
from data.latents.record import is_latent_folder, read_record
from dnnlib.addresses import is_address
from encoders.autoencoder import Autoencoder
from models import ScaledLatentConfig
from torch_utils.pictures import image_grid, mixed_grid, save_image
from training.config import RunConfig

_NUM_REALS = 64

TrainingData = ImageDataset | MirroredImages | LatentDataset | SetDataset | FeatureDataset


def open_training_data(config: RunConfig) -> TrainingData:
    """Return the dataset of a run: images, sets of them, the latents of an archive, or features.

    Raises ValueError if there is none, or if it is of the wrong kind for the model.
    """
    data, is_latent_model = config.data, isinstance(config.model, ScaledLatentConfig)
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
    if not isinstance(config.model, ScaledLatentConfig):
        return PixelInputs(make_augment_pipe(config.training.augment))
    if isinstance(dataset, LatentDataset):
        has_std = dataset.record.kind == "mean-std"
        return LatentInputs(config.model, autoencoder, has_std=has_std)
    return LatentInputs(config.model, autoencoder, from_images=True)


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
