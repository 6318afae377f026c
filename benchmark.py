"""Measure what training, sampling, data loading and attention cost on this machine."""

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch

from benchmarks.attention import benchmark_attention
from benchmarks.loading import benchmark_data
from benchmarks.measure import describe_device, make_archive, make_latents
from benchmarks.metrics import benchmark_extraction, benchmark_frechet
from benchmarks.sampling import benchmark_sample
from benchmarks.training import benchmark_train
from configs.presets import PRESETS, Preset, get_preset
from data.latents.dataset import LatentDataset
from dnnlib.cli import run
from dnnlib.text import format_count
from models import ScaledLatentConfig
from torch_utils import distributed
from training.config import RunConfig
from training.inputs import TrainingData, open_training_data
from training.report import forward_flops, num_parameters
from training.runs import fit_to_data, with_data_facts

_NUM_SYNTHETIC_IMAGES = 2048


# There is no plain network yet to compare those of features with.
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


def common_options(command: click.Command) -> click.Command:
    """Add the options that every measurement has."""
    rounds = click.option(
        "--rounds",
        default=7,
        show_default=True,
        type=click.IntRange(min=1),
        help="Turns of everything compared; medians count.",
    )
    preset = click.option(
        "--preset", default="cifar10", show_default=True, help=f"Model: {', '.join(MEASURED)}."
    )
    return preset(rounds(command))


def precision_option(*choices: str):
    return click.option(
        "--precision", default=choices[-1], show_default=True, type=click.Choice(choices)
    )


data_option = click.option(
    "--data", help="Zip or folder made by dataset_tool.py.  [default: synthetic pictures]"
)


@click.group(context_settings=dict(help_option_names=["-h", "--help"]))
def main() -> None:
    """Measure what this machine makes of this code. Nothing else should run meanwhile.

    \b
    Examples:
      python benchmark.py train --preset=cifar10
      python benchmark.py train --preset=cifar10 --batch-gpu=256 --compile --workers=4   # GPU
      python benchmark.py train --preset=imagenet256 --batch-gpu=128 --precision=bf16 --compile
      python benchmark.py sample --preset=cifar10 --batch=16 --steps=6
      python benchmark.py data --preset=cifar10
      python benchmark.py attention --preset=cifar10
      python benchmark.py metrics --preset=cifar10
    """


@main.command()
@common_options
@data_option
@click.option("--batch-gpu", default=16, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--steps", type=click.IntRange(min=1), help="Steps a turn.  [default: 1, on a GPU 20]"
)
@precision_option("fp32", "bf16", "both")
@click.option("--compile/--no-compile", default=False, help="Compile this code's network.")
@click.option("--tf32/--no-tf32", default=False, help="TF32 products on both sides in fp32.")
@click.option("--workers", type=click.IntRange(min=0), help="Loader processes of each side.")
def train(
    preset: str,
    rounds: int,
    data: str | None,
    batch_gpu: int,
    steps: int | None,
    precision: str,
    compile: bool,
    tf32: bool,
    workers: int | None,
) -> None:
    """Time training steps of this code and of a plain baseline of the same network.

    The baseline has attention as batched matrix products, contiguous NCHW images, eager fp32, an
    Adam and a weight average that go parameter by parameter; data and augmentation are the same.
    """
    device = distributed.init()
    config = measured_preset(preset).run
    training = dataclasses.replace(
        config.training, batch=batch_gpu, batch_gpu=batch_gpu, compile=compile, tf32=tf32
    )
    config = dataclasses.replace(config, training=training)
    if workers is not None:
        config = dataclasses.replace(
            config, logging=dataclasses.replace(config.logging, workers=workers)
        )
    with dataset_of(config, data) as dataset:
        config = fit_to_data(config, dataset)
        print_header(config, device)
        on_gpu = device.type == "cuda"
        text = benchmark_train(
            config,
            dataset,
            device,
            precisions=("fp32", "bf16") if precision == "both" else (precision,),
            num_rounds=rounds,
            num_steps=steps or (20 if on_gpu else 1),
            num_warmup=5 if on_gpu else 1,
        )
    click.echo(f"batch {batch_gpu}{', compiled' if compile else ''}{', TF32' if tf32 else ''}")
    click.echo(text)


@main.command()
@common_options
@precision_option("bf16", "fp32")
@click.option("--batch", default=16, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--steps", type=click.IntRange(min=1), help="Sampling steps.  [default: the preset's]"
)
def sample(preset: str, rounds: int, precision: str, batch: int, steps: int | None) -> None:
    """Time sampling, and guidance against one doubled batch, with random weights."""
    device = distributed.init()
    config = measured_preset(preset).run
    sampling = dataclasses.replace(config.sampling, steps=steps or config.sampling.steps)
    num_classes = measured_preset(preset).num_classes or 10  # Guidance needs some.
    if config.sets is not None:
        num_classes = 0  # It is the support that is guided by.
    config = with_data_facts(config, config.model.img_channels, num_classes)
    print_header(config, device)
    text = benchmark_sample(
        config, device, precision=precision, batch=batch, sampling=sampling, num_rounds=rounds
    )
    click.echo(f"{sampling.sampler}, {sampling.steps} steps, {precision}")
    click.echo(text)


@main.command()
@common_options
@data_option
@click.option("--batch", type=click.IntRange(min=1), help="Images.  [default: the preset's]")
@click.option("--batches", default=8, show_default=True, type=click.IntRange(min=1))
def data(preset: str, rounds: int, data: str | None, batch: int | None, batches: int) -> None:
    """Time the loader against decoding the same files with Pillow in one process.

    For latents, against copying them out of memory-mapped files.
    """
    config = measured_preset(preset).run
    batch = batch or config.training.batch
    with dataset_of(config, data) as dataset:
        click.echo(describe_device(torch.device("cpu")))
        click.echo(f"{_describe_items(dataset)}, batch {batch}")
        text = benchmark_data(
            dataset, batch=batch, workers=(0, 1, 2), num_batches=batches, num_rounds=rounds
        )
    click.echo(text)


@main.command()
@common_options
@precision_option("bf16", "fp32")
@click.option("--batch", default=16, show_default=True, type=click.IntRange(min=1))
@click.option("--calls", default=3, show_default=True, type=click.IntRange(min=1))
def attention(preset: str, rounds: int, precision: str, batch: int, calls: int) -> None:
    """Time the ways to compute attention, forward and backward, at a preset's shapes."""
    device = distributed.init()
    config = measured_preset(preset).run
    print_header(config, device)
    click.echo(f"batch {batch}, {precision}")
    click.echo(
        benchmark_attention(
            config, device, precision=precision, batch=batch, num_rounds=rounds, num_calls=calls
        )
    )


@main.command()
@common_options
@data_option
@click.option("--precision", default="fp32,bf16", show_default=True, help="Comma-separated.")
@click.option("--batch", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--images", default=512, show_default=True, type=click.IntRange(min=1))
@click.option("--features", default=2048, show_default=True, type=click.IntRange(min=2))
def metrics(
    preset: str,
    rounds: int,
    data: str | None,
    precision: str,
    batch: int,
    images: int,
    features: int,
) -> None:
    """Time the extraction of Inception features, and the Fréchet distance against sqrtm."""
    names = {"fp32": "float32", "bf16": "bfloat16"}
    unknown = [name for name in precision.split(",") if name not in names]
    if unknown:
        raise click.UsageError(f"--precision: got {unknown[0]!r}; accepted: fp32, bf16.")
    device = distributed.init()
    click.echo(describe_device(device))
    config = measured_preset(preset).run
    if isinstance(config.model, ScaledLatentConfig):
        raise click.UsageError(f"--preset: {preset} is of latents; give one of images.")
    with dataset_of(config, data) as dataset:
        size = f"{dataset.resolution}x{dataset.resolution}x{dataset.img_channels}"
        click.echo(f"{images} images of {size}, batch {batch}")
        text = benchmark_extraction(
            dataset,
            device,
            precisions=tuple(names[name] for name in precision.split(",")),
            batch=batch,
            num_images=images,
            num_rounds=rounds,
        )
    click.echo(text)
    click.echo(
        benchmark_frechet(
            num_features=features, num_samples=2 * features, num_rounds=min(rounds, 3)
        )
    )


def _describe_items(dataset: TrainingData) -> str:
    if isinstance(dataset, LatentDataset):
        return f"latents of {'x'.join(map(str, dataset.latent_shape))}, float16 mean and std"
    mean = dataset.archive.num_bytes / dataset.num_images
    size = f"{dataset.resolution}x{dataset.resolution}x{dataset.img_channels}"
    return f"{size} images, {mean:.0f} bytes each"


@contextmanager
def dataset_of(config: RunConfig, data: str | None) -> Iterator[TrainingData]:
    """Open ``data``, or pictures (or latents) made for the occasion in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        if data is None and isinstance(config.model, ScaledLatentConfig):
            data = str(Path(folder) / "latents")
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, hflip=False))
            make_latents(Path(data), num_images=_NUM_SYNTHETIC_IMAGES, model=config.model)
        elif data is None:
            data = str(Path(folder) / "synthetic.zip")
            make_archive(
                Path(data),
                num_images=_NUM_SYNTHETIC_IMAGES,
                resolution=config.model.resolution,
                channels=config.model.img_channels,
                num_classes=10,
            )
        data_config = dataclasses.replace(config.data, data=data, cache=False)
        yield open_training_data(dataclasses.replace(config, data=data_config))


def print_header(config: RunConfig, device: torch.device) -> None:
    """Say what is measured where."""
    flops = f"{format_count(forward_flops(config))}FLOP an image forward"
    click.echo(describe_device(device))
    click.echo(f"{config.preset}: {num_parameters(config):,} parameters, {flops}")


if __name__ == "__main__":
    run(main)
