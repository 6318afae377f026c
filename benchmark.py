"""Measure what training, sampling, data loading and attention cost on this machine."""

import click

from benchmarks.options import (
    AttentionOptions,
    GpuOptions,
    LoadingOptions,
    MetricsOptions,
    SampleOptions,
    ScalingOptions,
    StateOptions,
    TrainOptions,
    measured_model,
)
from dnnlib.cli import ConfigCommand
from dnnlib.click_options import takes
from dnnlib.program import run
from models import ModelConfig


@click.group(context_settings=dict(help_option_names=["-h", "--help"]))
def main() -> None:
    """Measure how fast this code is on this machine. Run nothing else meanwhile.

    \b
    Examples:
      python benchmark.py train --preset=cifar10
      python benchmark.py train --preset=cifar10 --batch-gpu=256 --compile --workers=4  # GPU
      python benchmark.py train --preset=imagenet256 --batch-gpu=128 --precision=bf16 --compile
      python benchmark.py sample --preset=cifar10 --batch=16 --steps=6
      python benchmark.py data --preset=cifar10
      python benchmark.py data --delay=20
      python benchmark.py attention --preset=cifar10
      python benchmark.py metrics --preset=cifar10
      python benchmark.py states --preset=imagenet256-s
      python benchmark.py gpu --out=gpu.json
      python benchmark.py scaling --preset=imagenet256 --gpu=h100
    """


@main.command(
    cls=ConfigCommand,
    base=measured_model,
    short_help="Time training steps against baselines.",
)
@takes(TrainOptions)
def train(config: ModelConfig, options: TrainOptions) -> None:
    """Time training steps against baselines with the same network or one of the same size.

    The plain baseline computes attention as batched matrix products, on contiguous NCHW images in
    eager fp32, and updates Adam and the weight average one parameter at a time. --against=diffusers
    is a DiT from the diffusers package with the same width, depth, heads and tokens, in its usual
    training loop and in the same precisions. Data and augmentation are the same on all sides.
    """
    from benchmarks.train import measure

    measure(config, options)


@main.command(
    cls=ConfigCommand, base=measured_model, short_help="Time sampling with and without guidance."
)
@takes(SampleOptions)
def sample(config: ModelConfig, options: SampleOptions) -> None:
    """Time sampling and the cost of guidance, with random weights.

    Guidance evaluates the network on a doubled batch, so it is compared with sampling twice as many
    images without guidance. Decoding of latents is not timed. --against=diffusers is a DiT from the
    diffusers package with the same width, depth, heads and tokens, under its own scheduler.
    """
    from benchmarks.sample import measure

    measure(config, options)


@main.command(short_help="Time the loader, from the disk or a web server.")
@takes(LoadingOptions)
def data(options: LoadingOptions) -> None:
    """Time the loader against decoding the same files with Pillow in one process.

    For latents, the baseline copies them from memory-mapped files. Without --data, a second table
    compares the loader with a plain Dataset and DataLoader that opens one file per item, for 32x32
    and 256x256 images and for latents.

    With --delay, reading from a slow web server is compared with reading from the disk.
    """
    if options.delay is None:
        from benchmarks.data import measure
    else:
        unused = {"--data": options.data is not None}
        unused["--batches"] = options.batches != LoadingOptions().batches
        for option, is_given in unused.items():
            if is_given:
                but = "which loads whole epochs of data of its own"
                raise ValueError(f"{option} has no effect beside --delay, {but}; leave it out.")
        from benchmarks.remote.loading import measure

    measure(options)


@main.command(
    cls=ConfigCommand, base=measured_model, short_help="Time the attention implementations."
)
@takes(AttentionOptions)
def attention(config: ModelConfig, options: AttentionOptions) -> None:
    """Time the attention implementations, forward and backward, at a preset's shapes.

    Each row is a stage of the model with its window; times are medians of wall time. The total for
    all blocks of the network follows below.
    """
    from benchmarks.attention import measure

    measure(config, options)


@main.command(short_help="Time detectors and distances.")
@takes(MetricsOptions)
def metrics(options: MetricsOptions) -> None:
    """Time Inception extraction, and distances against other ways to compute them.

    "Detector alone" runs on images that are already in memory; "from files" also decodes them, and
    should be as fast as the slower of the two. Weights are random.
    """
    from benchmarks.metrics import measure

    measure(options)


@main.command(
    cls=ConfigCommand,
    base=measured_model,
    short_help="Time how long saving a state pauses training.",
)
@takes(StateOptions)
def states(config: ModelConfig, options: StateOptions) -> None:
    """Time how long writing a state pauses training, against torch.save.

    States are copied, then written by a separate process: once without a limit, and once as if the
    disk were slow. The first state comes soon after the start of a run.
    """
    from benchmarks.states import measure

    measure(config, options)


@main.command(short_help="Measure one GPU on synthetic data.")
@takes(GpuOptions)
def gpu(options: GpuOptions) -> None:
    """Measure one GPU on synthetic data: matrix products, attention, training, sampling and more.

    This takes at most 18 minutes. Each part has its own time limit and reports what it skipped.
    Earlier results of parts that are not measured again stay in the file; the table is written to
    the same name with .md. The last lines list the defaults that the measurements argue against.
    """
    from benchmarks.gpu import measure

    measure(options)


@main.command(short_help="Predict training on 1 to 4,096 GPUs.")
@takes(ScalingOptions)
def scaling(options: ScalingOptions) -> None:
    """Predict the step time, its parts and the time lost to failures, on 1 to 4,096 GPUs.

    Nothing is measured without --measure; docs/scaling.md describes the model and its assumptions.
    The first table divides the preset's batch among all GPUs; in the second, each GPU has an eighth
    of it.
    """
    from benchmarks.scaling.command import show

    show(options)


if __name__ == "__main__":
    run(main)
