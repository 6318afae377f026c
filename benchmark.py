"""Measure what training, sampling, data loading and attention cost on this machine."""

import dataclasses

import click
import torch

import families
from benchmarks.attention import benchmark_attention
from benchmarks.kinds import (
    dataset_of,
    describe_items,
    describe_run,
    measured_preset,
    run_on_pixels,
    run_to_sample,
    with_section,
)
from benchmarks.loading import benchmark_data
from benchmarks.measure import describe_device
from benchmarks.metrics import benchmark_extraction, benchmark_frechet
from benchmarks.options import (
    AttentionOptions,
    LoadingOptions,
    MetricsOptions,
    SampleOptions,
    TrainOptions,
)
from benchmarks.sampling import benchmark_sample
from benchmarks.training import benchmark_train
from dnnlib.cli import run
from dnnlib.click_options import takes
from torch_utils import distributed


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
@takes(TrainOptions)
def train(options: TrainOptions) -> None:
    """Time training steps of this code and of a plain baseline of the same network.

    The baseline has attention as batched matrix products, contiguous NCHW images, eager fp32, an
    Adam and a weight average that go parameter by parameter; data and augmentation are the same.
    """
    device, batch = distributed.init(), options.batch_gpu
    same = dict(compile=options.compile, tf32=options.tf32)
    config = measured_preset(options.preset).run
    config = with_section(config, "training", batch=batch, batch_gpu=batch, **same)
    if options.workers is not None:
        config = with_section(config, "logging", workers=options.workers)
    with dataset_of(config, options.data) as dataset:
        config = families.of(config).fit(config, dataset)
        click.echo(describe_run(config, device))
        text = benchmark_train(config, dataset, device, options)
    compiled, tf32 = ", compiled" * options.compile, ", TF32" * options.tf32
    click.echo(f"batch {batch}{compiled}{tf32}\n{text}")


@main.command()
@takes(SampleOptions)
def sample(options: SampleOptions) -> None:
    """Time sampling, and guidance against one doubled batch, with random weights."""
    device = distributed.init()
    config = run_to_sample(measured_preset(options.preset))
    if options.steps is not None:
        config = with_section(config, "sampling", steps=options.steps)
    click.echo(describe_run(config, device))
    text = benchmark_sample(config, device, options)
    sampling = config.sampling
    click.echo(f"{sampling.sampler}, {sampling.steps} steps, {options.precision}\n{text}")


@main.command()
@takes(LoadingOptions)
def data(options: LoadingOptions) -> None:
    """Time the loader against decoding the same files with Pillow in one process.

    For latents, against copying them out of memory-mapped files.
    """
    config = measured_preset(options.preset).run
    batch = options.batch or config.training.batch
    options = dataclasses.replace(options, batch=batch)
    config = with_section(config, "training", batch=batch)
    with dataset_of(config, options.data) as dataset:
        click.echo(describe_device(torch.device("cpu")))
        click.echo(f"{describe_items(config, dataset)}, batch {options.batch}")
        click.echo(benchmark_data(config, dataset, options, workers=(0, 1, 2)))


@main.command()
@takes(AttentionOptions)
def attention(options: AttentionOptions) -> None:
    """Time the ways to compute attention, forward and backward, at a preset's shapes."""
    device = distributed.init()
    config = measured_preset(options.preset).run
    click.echo(f"{describe_run(config, device)}\nbatch {options.batch}, {options.precision}")
    click.echo(benchmark_attention(config, device, options))


@main.command()
@takes(MetricsOptions)
def metrics(options: MetricsOptions) -> None:
    """Time the extraction of Inception outputs, and the Fréchet distance against sqrtm."""
    unknown = set(options.precision.split(",")) - {"fp32", "bf16"}
    if unknown:
        raise click.UsageError(f"--precision: got {unknown.pop()!r}; accepted: fp32, bf16.")
    device = distributed.init()
    click.echo(describe_device(device))
    config = run_on_pixels(options.preset)
    with dataset_of(config, options.data) as dataset:
        click.echo(f"{options.images} of {describe_items(config, dataset)}, batch {options.batch}")
        text = benchmark_extraction(dataset, device, options)
    num, rounds = options.features, min(options.rounds, 3)
    frechet = benchmark_frechet(num_features=num, num_samples=2 * num, num_rounds=rounds)
    click.echo(f"{text}\n{frechet}")


if __name__ == "__main__":
    run(main)
