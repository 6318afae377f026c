"""Measure what training, sampling, data loading and attention cost on this machine."""

import click

from benchmarks.options import (
    AttentionOptions,
    LoadingOptions,
    MetricsOptions,
    SampleOptions,
    TrainOptions,
)
from dnnlib.cli import run
from dnnlib.click_options import takes


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
    from benchmarks.train import measure

    measure(options)


@main.command()
@takes(SampleOptions)
def sample(options: SampleOptions) -> None:
    """Time sampling, and guidance against one doubled batch, with random weights.

    Guidance evaluates the network on a doubled batch; it is compared with sampling twice as many
    images without it. Latents are timed without their decoding.
    """
    from benchmarks.sample import measure

    measure(options)


@main.command()
@takes(LoadingOptions)
def data(options: LoadingOptions) -> None:
    """Time the loader against decoding the same files with Pillow in one process.

    For latents, against copying them out of memory-mapped files.
    """
    from benchmarks.data import measure

    measure(options)


@main.command()
@takes(AttentionOptions)
def attention(options: AttentionOptions) -> None:
    """Time the ways to compute attention, forward and backward, at a preset's shapes.

    Rows are the stages of the model with their windows; the last row is all blocks of the network.
    """
    from benchmarks.attention import measure

    measure(options)


@main.command()
@takes(MetricsOptions)
def metrics(options: MetricsOptions) -> None:
    """Time the extraction of Inception outputs, and distances against other ways to them.

    "Detector alone" sees images that are in memory already; "from files" decodes them as well, and
    should be as fast as the slower of the two. Weights are random.
    """
    from benchmarks.metrics import measure

    measure(options)


if __name__ == "__main__":
    run(main)
