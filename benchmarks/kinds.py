"""What is measured of each kind of model: whatever depends on the kind is asked here."""

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

import families
from benchmarks.measure import describe_device
from benchmarks.synthetic import make_archive, make_latents
from configs.presets import PRESETS, Preset, get_preset
from dnnlib.text import format_count
from models import ModelConfig
from training.config import RunConfig
from training.family import TrainingData
from training.report import forward_flops, num_parameters

NUM_SYNTHETIC_IMAGES = 2048


def measured_preset(name: str) -> Preset:
    """Return a preset that can be measured; raises ValueError for any other."""
    preset = get_preset(name)
    if name not in MEASURED:
        raise ValueError(
            f"--preset: got {name}, of which nothing is measured yet; accepted: "
            f"{', '.join(MEASURED)}."
        )
    return preset


def with_section(config: RunConfig, section: str, **changes: Any) -> RunConfig:
    """Return a run with other values in one of its sections."""
    changed = dataclasses.replace(getattr(config, section), **changes)
    return dataclasses.replace(config, **{section: changed})


def run_to_sample(preset: Preset) -> RunConfig:
    """Return a preset's run with what its data would decide, so that it can be guided."""
    return families.of(preset.run).example_run(preset.run, preset.num_classes)


def run_on_pixels(name: str) -> RunConfig:
    """Return the run of a preset; raises ValueError for one that trains on latents."""
    config = measured_preset(name).run
    if _KINDS[config.family].make is not _make_pictures:
        raise ValueError(f"--preset: {name} is of latents; give one of images.")
    return config


def describe_run(config: RunConfig, device: torch.device) -> str:
    """Return what is measured where, in two lines."""
    flops = f"{format_count(forward_flops(config))}FLOP an image forward"
    model = f"{config.preset}: {num_parameters(config):,} parameters, {flops}"
    return f"{describe_device(device)}\n{model}"


@contextmanager
def dataset_of(config: RunConfig, data: str | None) -> Iterator[TrainingData]:
    """Open ``data``, or pictures (or latents) made for the occasion in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            data = _KINDS[config.family].make(Path(folder), config.model)
            config = with_section(config, "data", hflip=config.data.hflip and data.endswith(".zip"))
        config = with_section(config, "data", data=data, cache=False)
        yield families.of(config).open_data(config)


def describe_items(config: RunConfig, dataset: TrainingData) -> str:
    """Return what a run's dataset holds, in a phrase."""
    return _KINDS[config.family].describe(dataset)


def bare_reading(
    config: RunConfig, dataset: TrainingData, num_images: int
) -> tuple[str, Callable[[], None]]:
    """Return the name of the least that reading images takes, and the function that does it.

    That is decoding the files, already in memory, with Pillow; or, for latents, copying each out of
    its memory-mapped file.
    """
    return _KINDS[config.family].bare_reading(dataset, num_images)


def attention_stages(config: RunConfig) -> list[tuple[int, int, int, int]]:
    """Return the grid, window, width and number of attention blocks of each stage of a model."""
    return _KINDS[config.family].stages(config.model)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What is measured of the models of a family, and on what data.

    Attributes:
        make: Writes data for a model into a folder, and returns where they are.
        describe: Returns what a dataset holds.
        bare_reading: See :func:`bare_reading`.
        stages: See :func:`attention_stages`.
    """

    make: Callable[[Path, ModelConfig], str]
    describe: Callable[[TrainingData], str]
    bare_reading: Callable[[TrainingData, int], tuple[str, Callable[[], None]]]
    stages: Callable[[ModelConfig], list[tuple[int, int, int, int]]]


def _make_pictures(folder: Path, model: ModelConfig) -> str:
    path = folder / "synthetic.zip"
    make_archive(
        path,
        num_images=NUM_SYNTHETIC_IMAGES,
        resolution=model.resolution,
        channels=model.img_channels,
        num_classes=10,
    )
    return str(path)


def _make_latents(folder: Path, model: ModelConfig) -> str:
    make_latents(folder / "latents", num_images=NUM_SYNTHETIC_IMAGES, model=model)
    return str(folder / "latents")


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


def _stages_of_levels(model: ModelConfig) -> list[tuple[int, int, int, int]]:
    # All stages but the last have as many blocks again in the decoder.
    counts = [2 * count for count in model.blocks_per_stage[:-1]] + [model.blocks_per_stage[-1]]
    return list(zip(model.grids, model.windows, model.widths, counts, strict=True))


def _one_stage(model: ModelConfig) -> list[tuple[int, int, int, int]]:
    return [(model.grid, model.grid, model.hidden_dim, model.num_blocks)]


_PICTURES = _Kind(_make_pictures, _describe_pictures, _decode_pictures, _stages_of_levels)
# There is no plain network yet to compare feature-conditioned models with.
_KINDS = {
    "image": _PICTURES,
    "latent": _Kind(_make_latents, _describe_latents, _copy_latents, _one_stage),
    "sets": dataclasses.replace(_PICTURES, stages=_one_stage),
}
MEASURED = [name for name, preset in PRESETS.items() if _KINDS.get(preset.run.family)]
