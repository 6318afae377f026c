"""The parts of the benchmarks that depend on the model family: data, shapes and baselines."""

import dataclasses
import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

import families
from benchmarks.measure import describe_device
from benchmarks.options import MEASURED, measured_preset
from benchmarks.plain_data import PlainLatents, PlainPictures
from configs.presets import PRESETS
from data.convert.convert import convert_images
from data.convert.source import Source
from data.latents.record import LABELS_FILE, RECORD_FILE, LatentRecord, latent_shard_name
from dnnlib.errors import refusal
from dnnlib.files import sha256_of_file, write_json
from dnnlib.text import format_count
from models import ModelConfig
from training.config import RunConfig
from training.family import TrainingData
from training.report import forward_flops, num_parameters

NUM_SYNTHETIC_IMAGES = 2048


def dit_size(config: RunConfig) -> dict[str, Any]:
    """Return the arguments of diffusers' DiTTransformer2DModel for a network of the same size.

    Raises ValueError unless the model is one stack of blocks of one width on a grid of tokens.
    """
    size = _KINDS[config.family].dit_size
    if size is None:
        known = [n for n in MEASURED if _KINDS[PRESETS[n].run.family].dit_size is not None]
        but = f"{config.preset} is not built like the DiT of diffusers, which is one stack of "
        but += "blocks of one width on a grid of latents, with a class as its condition"
        raise refusal("--against", "diffusers", but=but, accepted=", ".join(known))
    return size(config.model)


def run_on_pixels(name: str) -> RunConfig:
    """Return the run of a preset; raises ValueError for one that trains on latents."""
    config = measured_preset(name).run
    if _KINDS[config.family].make is not make_pictures:
        raise ValueError(f"--preset: {name} trains on latents; choose an image preset.")
    return config


def describe_run(config: RunConfig, device: torch.device) -> str:
    """Return two lines: the device, and the model with its parameters and FLOPs."""
    flops = f"{format_count(forward_flops(config))}FLOP an image forward"
    model = f"{config.preset}: {num_parameters(config):,} parameters, {flops}"
    return f"{describe_device(device)}\n{model}"


@contextmanager
def dataset_of(
    config: RunConfig, data: str | None, num_images: int | None = None
) -> Iterator[TrainingData]:
    """Open ``data``; if it is None, open synthetic images or latents in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            num_images = num_images or NUM_SYNTHETIC_IMAGES
            data = str(_KINDS[config.family].make(Path(folder), config.model, num_images))
            config = config.changed("data", hflip=config.data.hflip and data.endswith(".zip"))
        config = config.changed("data", data=data, cache=False)
        yield families.of(config).open_data(config)


def describe_items(config: RunConfig, dataset: TrainingData) -> str:
    """Return a phrase that describes the items of a run's dataset."""
    return _KINDS[config.family].describe(dataset)


def bare_reading(
    config: RunConfig, dataset: TrainingData, num_images: int
) -> tuple[str, Callable[[], None]]:
    """Return the name and the function of the least work that reading ``num_images`` items takes.

    For images, that is decoding files that are already in memory with Pillow; for latents, copying
    each out of its memory-mapped file.
    """
    return _KINDS[config.family].bare_reading(dataset, num_images)


def plain_dataset(config: RunConfig, dataset: TrainingData, folder: Path) -> Dataset:
    """Return a plain dataset of the same items, with one file per item in ``folder``."""
    return _KINDS[config.family].plain_data(dataset, folder)


def attention_stages(config: RunConfig) -> list[tuple[int, int, int, int]]:
    """Return (grid, window, width, attention blocks) of each stage; edges are in tokens."""
    return _KINDS[config.family].stages(config.model)


def make_pictures(folder: Path, model: ModelConfig, num_images: int) -> Path:
    """Write a zip of images in ten classes; its PNGs are about as large as those of photographs."""
    resolution, channels, num_classes = model.resolution, model.img_channels, 10

    def picture(index: int) -> np.ndarray:
        rng = np.random.default_rng(index)
        coarse = rng.normal(0, 50, [channels, resolution // 8 + 2, resolution // 8 + 2])
        planes = [Image.fromarray(plane.astype(np.float32)) for plane in coarse]
        size = (resolution, resolution)
        smooth = [np.asarray(plane.resize(size, Image.Resampling.BICUBIC)) for plane in planes]
        pixels = np.stack(smooth, axis=2) + 128
        pixels = (pixels + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)
        return pixels[:, :, 0] if channels == 1 else pixels

    source = Source(
        name="synthetic pictures",
        num_images=num_images,
        item=picture,
        image_name=str,
        labels=[index % num_classes for index in range(num_images)],
        class_names=[f"class {index}" for index in range(num_classes)],
    )
    convert_images(source, folder / "synthetic.zip", num_workers=1)
    return folder / "synthetic.zip"


def make_latents(folder: Path, model: ModelConfig, num_images: int) -> Path:
    """Write a folder of random, labelled latents with the shape that a model expects."""
    shape = (num_images, 1, 2 * model.latent_channels, *model.input_shape[1:])
    moments = np.random.default_rng(0).standard_normal(shape, np.float32)
    moments /= model.latent_scale or 1
    moments[:, :, model.latent_channels :] = 0.1
    shard = folder / latent_shard_name(0)
    np.save(shard, moments.astype(np.float16))
    np.save(folder / LABELS_FILE, np.arange(num_images, dtype=np.int64) % model.num_classes)
    names = ("vae", "vae_hash", "source", "source_hash", "input_transform")
    record = LatentRecord(
        num_images=num_images,
        resolution=model.resolution,
        img_channels=model.img_channels,
        latent_shape=list(model.input_shape),
        kind="mean-std",
        mirrored=False,
        scale=model.latent_scale or 1.0,
        shift=model.latent_shift,
        **dict.fromkeys(names, "none"),
        class_names=[f"class {index}" for index in range(model.num_classes)],
        labels_sha256=sha256_of_file(folder / LABELS_FILE),
        precision="fp32",
        shard_size=num_images,
        shards=[dict(file=shard.name, num_images=num_images, sha256=sha256_of_file(shard))],
        packages={},
    )
    write_json(folder / RECORD_FILE, record.to_dict())
    return folder


def _describe_pictures(dataset: TrainingData) -> str:
    mean = dataset.archive.num_bytes / dataset.num_images
    size = f"{dataset.resolution}x{dataset.resolution}x{dataset.img_channels}"
    return f"{size} images, {mean:.0f} bytes each"


def _describe_latents(dataset: TrainingData) -> str:
    return f"latents of {'x'.join(map(str, dataset.latent_shape))}, float16 mean and std"


def _decode_pictures(dataset: TrainingData, num_images: int) -> tuple[str, Callable[[], None]]:
    files = [dataset.archive.read(index % len(dataset)) for index in range(num_images)]
    return "Pillow alone", lambda: [np.asarray(Image.open(io.BytesIO(file))) for file in files]


def _copy_latents(dataset: TrainingData, num_images: int) -> tuple[str, Callable[[], None]]:
    shards = [np.load(dataset.path / s["file"], mmap_mode="r") for s in dataset.record.shards]
    places = [(array, row) for array in shards for row in range(len(array))]
    read = [places[index % len(places)] for index in range(num_images)]
    return "memory map alone", lambda: [array[row, 0].copy() for array, row in read]


def _dit_size_of_latents(model: ModelConfig) -> dict[str, Any]:
    if model.mlp_ratio != 4:
        but = "the MLPs of the DiT of diffusers are four times as wide as its tokens"
        raise refusal("--mlp-ratio", f"{model.mlp_ratio:g}", but=but)
    return dict(
        num_attention_heads=model.num_heads,
        attention_head_dim=model.hidden_dim // model.num_heads,
        in_channels=model.input_shape[0],
        out_channels=model.out_channels,
        num_layers=model.num_blocks,
        sample_size=model.input_shape[1],
        patch_size=model.patch_size,
        num_embeds_ada_norm=max(model.num_classes, 1),
    )


def _stages_of_levels(model: ModelConfig) -> list[tuple[int, int, int, int]]:
    # Every stage but the last, the bottleneck, has the same number of blocks in the decoder.
    counts = [2 * count for count in model.blocks_per_stage[:-1]] + [model.blocks_per_stage[-1]]
    return list(zip(model.grids, model.windows, model.widths, counts, strict=True))


def _one_stage(model: ModelConfig) -> list[tuple[int, int, int, int]]:
    return [(model.grid, model.grid, model.hidden_dim, model.num_blocks)]


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How the benchmarks treat the models of one family."""

    make: Callable[[Path, ModelConfig, int], Path]  # Returns the path of the data in the folder.
    describe: Callable[[TrainingData], str]
    bare_reading: Callable[[TrainingData, int], tuple[str, Callable[[], None]]]
    stages: Callable[[ModelConfig], list[tuple[int, int, int, int]]]
    plain_data: Callable[[TrainingData, Path], Dataset]
    dit_size: Callable[[ModelConfig], dict[str, Any]] | None = None


_PICTURES = _Kind(
    make_pictures, _describe_pictures, _decode_pictures, _stages_of_levels, PlainPictures
)
# Feature-conditioned models are missing: there is no plain network yet to compare them with.
_KINDS = {
    "image": _PICTURES,
    "latent": _Kind(
        make_latents,
        _describe_latents,
        _copy_latents,
        _one_stage,
        PlainLatents,
        _dit_size_of_latents,
    ),
    "sets": dataclasses.replace(_PICTURES, stages=_one_stage),
}
