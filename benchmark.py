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
    short_help="Time training steps of this code and of others.",
)
@takes(TrainOptions)
def train(config: ModelConfig, options: TrainOptions) -> None:
    """Time training steps of this code and of others with the same network or one of its size.

    The plain baseline has attention as batched matrix products, contiguous NCHW images, eager fp32,
    an Adam and a weight average that go parameter by parameter. --against=diffusers is a DiT of the
    package diffusers of the same width, depth, heads and tokens in its usual loop, in the same
    precisions. Data and augmentation are the same on all sides.
    """
    from benchmarks.train import measure

    measure(config, options)


@main.command(
    cls=ConfigCommand, base=measured_model, short_help="Time sampling, with guidance and without."
)
@takes(SampleOptions)
def sample(config: ModelConfig, options: SampleOptions) -> None:
    """Time sampling, and guidance against one doubled batch, with random weights.

    Guidance evaluates the network on a doubled batch; it is compared with sampling twice as many
    images without it. Latents are timed without their decoding. --against=diffusers is a DiT of the
    package diffusers of the same width, depth, heads and tokens under its own scheduler.
    """
    from benchmarks.sample import measure

    measure(config, options)


@main.command(short_help="Time the loader, from the disk or a web server.")
@takes(LoadingOptions)
def data(options: LoadingOptions) -> None:
    """Time the loader against decoding the same files with Pillow in one process.

    Latents are compared with copying them out of memory-mapped files. Without --data, a second
    table compares the loader with a plain Dataset and DataLoader that opens one file for each item:
    of 32x32 and 256x256 pictures and of latents.

    With --delay, the loader is compared with itself: reading from a web server that answers late,
    and reading from the disk.
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
    cls=ConfigCommand, base=measured_model, short_help="Time the ways to compute attention."
)
@takes(AttentionOptions)
def attention(config: ModelConfig, options: AttentionOptions) -> None:
    """Time the ways to compute attention, forward and backward, at a preset's shapes.

    Rows are the stages of the model with their windows, and medians of wall time; below, what all
    blocks of the network take.
    """
    from benchmarks.attention import measure

    measure(config, options)


@main.command(short_help="Time detectors and distances.")
@takes(MetricsOptions)
def metrics(options: MetricsOptions) -> None:
    """Time the extraction of Inception outputs, and distances against other ways to them.

    "Detector alone" sees images that are in memory already; "from files" decodes them as well, and
    should be as fast as the slower of the two. Weights are random.
    """
    from benchmarks.metrics import measure

    measure(options)


@main.command(
    cls=ConfigCommand,
    base=measured_model,
    short_help="Time how long training stands still for a state.",
)
@takes(StateOptions)
def states(config: ModelConfig, options: StateOptions) -> None:
    """Time how long training stands still when a state is written, against torch.save.

    States are copied, and written by a process of their own: with nothing that limits it, and as if
    the disk were slow. The first one comes soon after the start of a run.
    """
    from benchmarks.states import measure

    measure(config, options)


@main.command(short_help="Measure one GPU on made-up data.")
@takes(GpuOptions)
def gpu(options: GpuOptions) -> None:
    """Measure one GPU on made-up data: matrix products, attention, training, sampling and more.

    Takes 18 minutes at most. Each part has a time of its own and says what it left out. Results of
    parts that were measured before stay in the file; the table has its name with .md. At the end
    are the defaults that the measurements speak against.
    """
    from benchmarks.gpu import measure

    measure(options)


@main.command(short_help="Predict training on 1 to 4,096 GPUs.")
@takes(ScalingOptions)
def scaling(options: ScalingOptions) -> None:
    """Predict the step, its parts and the loss to failures, from 1 to 4,096 GPUs.

    Nothing is measured without --measure: the model and its assumptions are in docs/scaling.md. The
    first table shares the preset's batch among all GPUs; in the second, each has an eighth of it.
    """
    from benchmarks.scaling.command import show

    show(options)


if __name__ == "__main__":
    run(main)
