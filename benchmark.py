"""Measure what training, sampling, data loading and attention cost on this machine."""

import click

from dnnlib.cli import run
from dnnlib.click_options import LazyGroup


@click.group(
    cls=LazyGroup,
    package="benchmarks",
    summaries={
        "train": "Time training steps of this code and of a plain baseline.",
        "sample": "Time sampling, and guidance against one doubled batch.",
        "data": "Time the loader against bare decoding in one process.",
        "attention": "Time the ways to compute attention at a preset's shapes.",
        "metrics": "Time the extraction of Inception outputs, and the Fréchet distance.",
    },
)
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


if __name__ == "__main__":
    run(main)
