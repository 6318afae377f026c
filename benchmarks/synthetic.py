"""Data made for a measurement: pictures, and latents, of any size."""

from pathlib import Path

import numpy as np
from PIL import Image

from data.convert.convert import convert_images
from data.convert.source import Source
from data.latents.record import LABELS_FILE, RECORD_FILE, LatentRecord, latent_shard_name
from dnnlib.files import sha256_of_file, write_json
from models import ScaledLatentConfig


def make_archive(
    path: Path, *, num_images: int, resolution: int, channels: int, num_classes: int
) -> None:
    """Write a zip of synthetic pictures, about as large as photographs of that size are as PNG."""

    def picture(index: int) -> np.ndarray:
        rng = np.random.default_rng(index)
        coarse = rng.normal(0, 50, [channels, resolution // 8 + 2, resolution // 8 + 2])
        size = (resolution, resolution)
        smooth = [
            Image.fromarray(plane.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
            for plane in coarse
        ]
        pixels = np.stack([np.asarray(plane) for plane in smooth], axis=2) + 128
        pixels = (pixels + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)
        return pixels[:, :, 0] if channels == 1 else pixels

    source = Source(
        name="synthetic pictures",
        num_images=num_images,
        item=picture,
        image_name=str,
        labels=[index % num_classes for index in range(num_images)] if num_classes else None,
        class_names=[f"class {index}" for index in range(num_classes)] if num_classes else None,
    )
    convert_images(source, path, num_workers=1)


def make_latents(path: Path, *, num_images: int, model: ScaledLatentConfig) -> None:
    """Write an archive of random latents, labelled, of the shape that a model expects."""
    shape = (num_images, 1, 2 * model.latent_channels, *model.input_shape[1:])
    moments = np.random.default_rng(0).standard_normal(shape, np.float32)
    moments /= model.latent_scale or 1
    moments[:, :, model.latent_channels :] = 0.1
    path.mkdir()
    shard = path / latent_shard_name(0)
    np.save(shard, moments.astype(np.float16))
    labels = np.arange(num_images, dtype=np.int64) % model.num_classes
    np.save(path / LABELS_FILE, labels)
    record = LatentRecord(
        num_images=num_images,
        resolution=model.resolution,
        img_channels=model.img_channels,
        latent_shape=list(model.input_shape),
        kind="mean-std",
        mirrored=False,
        scale=model.latent_scale or 1.0,
        shift=model.latent_shift,
        vae="none",
        vae_hash="none",
        source="random numbers",
        source_hash="none",
        class_names=[f"class {index}" for index in range(model.num_classes)],
        labels_sha256=sha256_of_file(path / LABELS_FILE),
        input_transform="none",
        precision="fp32",
        shard_size=num_images,
        shards=[dict(file=shard.name, num_images=num_images, sha256=sha256_of_file(shard))],
        packages={},
    )
    write_json(path / RECORD_FILE, record.to_dict())
