"""Models of an autoencoder's latents, class-conditional or unconditional: latent DiffiT."""

from collections.abc import Collection
from typing import Any

import torch

from data.images.dataset import MirroredImages
from data.latents.codec import LatentCodec
from data.latents.dataset import LatentDataset
from data.latents.record import is_latent_folder, read_record
from encoders.autoencoder import AUTOENCODER, Autoencoder, load_autoencoder
from families.checks import refuse_augmentation
from families.image import (
    ImageFamily,
    check_resolution,
    open_images_of,
    with_path,
)
from families.next_steps import image_steps
from families.runs import LatentRun
from models import LatentModelConfig, ScaledLatentConfig
from training.checkpoint import Snapshot
from training.family import Codec, TrainingData

_NUM_ENCODED = 16  # Images that an inspection encodes: few, as the autoencoder is slow.


class LatentFamily(ImageFamily):
    """Latents of images, which an autoencoder decodes."""

    run = LatentRun
    library_bytes = 105 << 20

    def check(self, run: LatentRun, given: Collection[str]) -> LatentRun:
        if run.model.vae is not None:
            AUTOENCODER.check_location(run.model.vae)
        return super().check(run, given)

    def open_data(
        self, run: LatentRun, path: str | None = None, split: str = "train"
    ) -> TrainingData:
        run = with_path(run, path)
        data = run.data
        if data.data is not None and is_latent_folder(data.data):
            if data.cache:
                raise ValueError("--cache has no effect on latents, which need no decoding.")
            check_resolution(run, read_record(data.data).resolution)
            settings = dict(use_labels=data.cond, max_size=data.max_size, hflip=data.hflip)
            latents = LatentDataset(data.data, seed=run.training.seed, **settings)
            return latents.hold_out(data.validation_share) if data.validation_share else latents
        dataset = open_images_of(run)
        if run.model.vae is None:
            raise ValueError(
                f"--data: {data.data} holds images, but preset {run.preset} trains on latents; "
                "encode them with dataset_tool.py encode and give the result, or name the "
                "autoencoder with --vae to encode while training."
            )
        return MirroredImages(dataset) if data.hflip else dataset

    def fit(self, run: LatentRun, data: TrainingData | None, num_classes: int = 0) -> LatentRun:
        if data is not None:
            check_resolution(run, data.resolution)
            if isinstance(data, LatentDataset):
                run = _fit_to_latents(run, data)
        run = super().fit(run, data, num_classes)
        refuse_augmentation(run, "latents")
        return run

    def open_codec(
        self, run: LatentRun, data: TrainingData, device: torch.device
    ) -> tuple[LatentRun, Codec]:
        autoencoder = load_autoencoder(run.model.vae, device, expected_hash=run.model.vae_hash)
        run = run.changed(
            "model",
            vae=autoencoder.location,
            vae_hash=autoencoder.sha256,
            latent_scale=autoencoder.scale,
            latent_shift=autoencoder.shift,
        )
        check_autoencoder(run.model, autoencoder)
        return run, LatentCodec(run.model, autoencoder, **_stored_form(data))

    def snapshot_codec(self, snapshot: Snapshot, vae: str | None, device: torch.device) -> Codec:
        model = snapshot.config.model
        return LatentCodec(model, _open_autoencoder(model, vae, device))

    def encoder_codec(self, run: LatentRun, data: TrainingData, device: torch.device) -> Codec:
        form = _stored_form(data)
        autoencoder = _open_autoencoder(run.model, None, device) if form["from_images"] else None
        return LatentCodec(run.model, autoencoder, **form)

    def _real_images(self, run: LatentRun, data: TrainingData, metric: str) -> Any:
        if isinstance(data, LatentDataset):
            raise ValueError(
                f"--metrics: {metric} compares images, but {data.path} holds latents; give the "
                "images that they were made from, or their statistics, with --metrics-ref."
            )
        return super()._real_images(run, data, metric)

    def _num_encoded(self, data: TrainingData) -> int | None:
        return None if isinstance(data, LatentDataset) else _NUM_ENCODED

    def _expected_std(self, run: LatentRun) -> dict[str, Any]:
        expected = super()._expected_std(run)
        return dict(std=1.0, std_from="latents") if expected["std"] is None else expected

    def describe(self, run: LatentRun) -> dict[str, str]:
        model = run.model
        scale = "" if model.latent_scale is None else f", scale {model.latent_scale:g}"
        shape = "x".join(map(str, model.input_shape))
        return {"latents": f"{shape} of {model.vae or 'the autoencoder in --data'}{scale}"}

    def next_steps(self, run: LatentRun) -> dict[str, str]:
        location = run.data.data
        has_images = location is not None and not is_latent_folder(location)
        return image_steps(run, location if has_images else None)


def _fit_to_latents(run: LatentRun, data: LatentDataset) -> LatentRun:
    model = run.model
    if data.latent_shape != model.input_shape:
        shapes = ["x".join(map(str, shape)) for shape in (model.input_shape, data.latent_shape)]
        raise ValueError(
            f"--data: {run.data.data} holds latents of {shapes[1]}, but this run expects "
            f"{shapes[0]} for {model.resolution}x{model.resolution} images; give "
            f"--latent-channels={data.latent_shape[0]} and "
            f"--latent-downsampling={data.resolution // data.latent_shape[1]}, or encode "
            "the images with another --vae."
        )
    if model.vae is None and model.latent_scale not in (None, data.scale):
        raise ValueError(
            f"--data: {run.data.data} holds latents of scale {data.scale:g}, but preset "
            f"{run.preset} expects latents of scale {model.latent_scale:g}; encode with the "
            f"autoencoder that it is meant for, or give --vae={data.vae} to train on these."
        )
    scaling = dict(latent_scale=data.scale, latent_shift=data.shift)
    return run.changed("model", vae=model.vae or data.vae, vae_hash=data.vae_hash, **scaling)


def _stored_form(data: TrainingData) -> dict[str, bool]:
    """Return the form of a batch, as arguments of LatentCodec."""
    if isinstance(data, LatentDataset):
        return dict(from_images=False, has_std=data.record.kind == "mean-std")
    return dict(from_images=True, has_std=True)


def _open_autoencoder(
    model: ScaledLatentConfig, vae: str | None, device: torch.device
) -> Autoencoder:
    autoencoder = decoder_of(model, vae, device)
    check_autoencoder(model, autoencoder)
    return autoencoder


def decoder_of(model: LatentModelConfig, vae: str | None, device: torch.device) -> Autoencoder:
    """Return the autoencoder of a latent model, loaded from ``vae`` if it has moved.

    Raises ValueError if it is not there, or is not the one that made the latents.
    """
    if vae is None and model.vae is None:
        raise ValueError("--vae is missing: name the autoencoder that decodes the latents.")
    return load_autoencoder(vae or model.vae, device, expected_hash=model.vae_hash)


def check_autoencoder(model: ScaledLatentConfig, autoencoder: Autoencoder) -> None:
    """Raise ValueError if a model needs other latents or images than an autoencoder's.

    Channels, downsampling, scale and shift have to agree.
    """
    for what, option, own, there in (
        ("channels of the latents", "--latent-channels", model.latent_channels, "latent_channels"),
        ("downsampling", "--latent-downsampling", model.latent_downsampling, "downsampling"),
        ("channels of the images", None, model.img_channels, "img_channels"),
        ("scale", None, model.latent_scale, "scale"),
        ("shift", None, model.latent_shift, "shift"),
    ):
        found = getattr(autoencoder, there)
        if found != own:
            remedy = f", or train with {option}={found}" if option else ""
            raise ValueError(
                f"--vae: {autoencoder.location} has {what} {found:g}, but the model has {own:g}; "
                f"use the one that the model was made for{remedy}."
            )


FAMILY = LatentFamily()
