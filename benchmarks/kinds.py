"""What is measured of each kind of model: whatever depends on the kind is asked here."""

import dataclasses
import functools
import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import describe_device
from benchmarks.synthetic import make_archive, make_latents
from configs.presets import PRESETS, Preset, get_preset
from data.fewshot.episodes import Episodes
from data.latents.dataset import LatentDataset
from dnnlib.text import format_count
from models import ModelConfig, ScaledLatentConfig
from models.latent_diffit import LatentDiffiTConfig
from models.set_dit import SetDiTConfig
from sampling.images import ImageGenerator
from sampling.supports import SupportGenerator
from training.config import RunConfig
from training.inputs import TrainingData, open_training_data
from training.report import forward_flops, num_parameters
from training.runs import with_data_facts

NUM_SYNTHETIC_IMAGES = 2048
# There is no plain network yet to compare feature-conditioned models with.
MEASURED = [name for name, preset in PRESETS.items() if preset.run.features is None]


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
    # Guidance needs classes; what set-conditioned models are guided by is the support.
    num_classes = 0 if preset.run.sets is not None else preset.num_classes or 10
    return with_data_facts(preset.run, preset.run.model.img_channels, num_classes)


def run_on_pixels(name: str) -> RunConfig:
    """Return the run of a preset; raises ValueError for one that trains on latents."""
    config = measured_preset(name).run
    if isinstance(config.model, ScaledLatentConfig):
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
    model = config.model
    with tempfile.TemporaryDirectory() as folder:
        if data is None and isinstance(model, ScaledLatentConfig):
            data = f"{folder}/latents"
            config = with_section(config, "data", hflip=False)
            make_latents(Path(data), num_images=NUM_SYNTHETIC_IMAGES, model=model)
        elif data is None:
            data = f"{folder}/synthetic.zip"
            make_archive(
                Path(data),
                num_images=NUM_SYNTHETIC_IMAGES,
                resolution=model.resolution,
                channels=model.img_channels,
                num_classes=10,
            )
        yield open_training_data(with_section(config, "data", data=data, cache=False))


def describe_items(dataset: TrainingData) -> str:
    """Return what a dataset holds, in a phrase."""
    if isinstance(dataset, LatentDataset):
        return f"latents of {'x'.join(map(str, dataset.latent_shape))}, float16 mean and std"
    mean = dataset.archive.num_bytes / dataset.num_images
    size = f"{dataset.resolution}x{dataset.resolution}x{dataset.img_channels}"
    return f"{size} images, {mean:.0f} bytes each"


def num_indices(config: RunConfig, dataset: TrainingData) -> int | None:
    """Return how many items a dataset holds; None if it draws them by position itself."""
    return len(dataset) if config.sets is None else None


def bare_reading(dataset: TrainingData, num_images: int) -> tuple[str, Callable[[], None]]:
    """Return the name of the least that reading images takes, and the function that does it.

    That is decoding the files, already in memory, with Pillow; or, for latents, copying each out of
    its memory-mapped file.
    """
    if isinstance(dataset, LatentDataset):
        shards = [np.load(dataset.path / s["file"], mmap_mode="r") for s in dataset.record.shards]
        places = [(array, row) for array in shards for row in range(len(array))]
        read = [places[index % len(places)] for index in range(num_images)]
        return "memory map alone", lambda: [array[row, 0].copy() for array, row in read]
    files = [dataset.archive.read(index % len(dataset)) for index in range(num_images)]
    return "Pillow alone", lambda: [np.asarray(Image.open(io.BytesIO(file))) for file in files]


def attention_stages(model: ModelConfig) -> list[tuple[int, int, int, int]]:
    """Return the grid, window, width and number of attention blocks of each stage of a model."""
    if isinstance(model, LatentDiffiTConfig):
        return [(model.grid, model.grid, model.hidden_dim, model.num_blocks)]
    # All stages but the last have as many blocks again in the decoder.
    counts = [2 * count for count in model.blocks_per_stage[:-1]] + [model.blocks_per_stage[-1]]
    return list(zip(model.grids, model.windows, model.widths, counts, strict=True))


def generator_type(model: ModelConfig) -> Callable[..., ImageGenerator]:
    """Return what makes images with a network, which takes the fields of an ImageGenerator."""
    if isinstance(model, SetDiTConfig):
        return functools.partial(SupportGenerator, episodes=_random_support(model))
    return ImageGenerator


def _random_support(model: SetDiTConfig) -> Episodes:
    """Return one support of noise, as many images as in training."""
    size = model.context_size
    return Episodes(
        supports=torch.randint(256, (1, size, *model.input_shape), dtype=torch.uint8),
        classes=np.zeros(1, np.int64),
        class_names=("noise",),
        labels=torch.tensor([model.num_classes]),
        indices=np.full((1, size), -1),
        counts=(1,),
        reals=np.empty(0, np.int64),
        source="noise",
    )
