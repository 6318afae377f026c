"""Turns images into a dataset for training or scoring, describes one and checks one."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
import numpy as np

from dnnlib.text import format_count
from training import conversion, verification
from training.labels import read_labels
from training.sources import SPLITS, open_source
from training.transforms import TRANSFORMS, parse_resolution


@contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise click.ClickException(f"{where}{error.strerror or error}.") from None


@click.group(context_settings=dict(help_option_names=["-h", "--help"]))
def main() -> None:
    """Turn images into a dataset for training or scoring, describe one and check one.

    \b
    Examples:
      python dataset_tool.py convert --source=digits --dest=data/digits.zip
      python dataset_tool.py convert --source=cifar-10-python.tar.gz --dest=data/cifar10-32x32.zip
      python dataset_tool.py info data/cifar10-32x32.zip
      python dataset_tool.py verify data/cifar10-32x32.zip
    """


@main.command(no_args_is_help=True)
@click.option(
    "--source",
    required=True,
    metavar="PATH|digits",
    help="Folder or zip of images, .npz of samples in ADM's layout, CIFAR-10/100 python archive, "
    "MNIST idx file or folder; or digits: the handwritten digits of scikit-learn.",
)
@click.option(
    "--dest",
    required=True,
    metavar="ZIP|DIR|NPZ",
    help="New .zip file or folder, or .npz of samples for ADM's evaluator (always RGB).",
)
@click.option(
    "--resolution",
    metavar="N|WxH",
    help="Size of the result; without it all images must have one square size already. WxH is for "
    "center-crop-wide, where N alone means 4:3.",
)
@click.option(
    "--transform",
    type=click.Choice(TRANSFORMS),
    help="How images that are not square become so; without it only square ones are accepted.",
)
@click.option("--max-images", type=click.IntRange(min=1), help="Use only the first N images.")
@click.option("--skip-broken", is_flag=True, help="Leave out broken images instead of failing.")
@click.option(
    "--split",
    type=click.Choice(SPLITS),
    help="Part of a CIFAR archive or MNIST folder to take.  [default: train]",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Number of processes that decode.  [default: one per core]",
)
def convert(
    source: str,
    dest: str,
    resolution: str | None,
    transform: str | None,
    max_images: int | None,
    skip_broken: bool,
    split: str | None,
    workers: int | None,
) -> None:
    """Write a dataset for training or scoring from a source of images.

    Labels come from the source's dataset.json or, for folders and zips, from the first folder
    level. Grayscale stays one channel; if any image is RGB, all become RGB; transparency is put on
    white. In an .npz all images are RGB: grayscale is repeated to three equal channels. The target
    is complete or absent, whatever happens on the way.

    \b
    Examples:
      # CIFAR-10: 50,000 labelled 32x32 images
      python dataset_tool.py convert --source=cifar-10-python.tar.gz --dest=data/cifar10-32x32.zip
      # FFHQ at 64x64, from a folder of larger images
      python dataset_tool.py convert --source=ffhq/ --dest=data/ffhq-64x64.zip --resolution=64
      # ImageNet at 256x256, cropped as by ADM; labels from the class folders
      python dataset_tool.py convert --source=ILSVRC/train --dest=data/imagenet-256.zip \\
          --resolution=256 --transform=center-crop-dhariwal
      # MNIST; its labels are found beside it
      python dataset_tool.py convert --source=train-images-idx3-ubyte.gz --dest=data/mnist.zip
      # Generated images as a sample archive for ADM's evaluator, and one made into a zip
      python dataset_tool.py convert --source=out/ --dest=samples.npz
      python dataset_tool.py convert --source=samples.npz --dest=samples.zip
    """
    # A request to stop cleans up; what SIGKILL leaves is a hidden .NAME.*.tmp beside --dest.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with _user_errors():
        summary = conversion.convert(
            open_source(source, split),
            dest,
            size=parse_resolution(resolution, transform),
            transform=transform,
            max_images=max_images,
            skip_broken=skip_broken,
            num_workers=workers,
        )
    for note in summary.notes:
        click.echo(note)
    if summary.skipped:
        click.echo("Broken:\n  " + "\n  ".join(summary.skipped), err=True)
        click.echo(f"Skipped {len(summary.skipped)} broken image(s).")
    size = f"{summary.resolution}x{summary.resolution}x{summary.img_channels}"
    classes = f"{summary.num_classes} classes" if summary.num_classes else "no labels"
    click.echo(f"{dest}: {summary.num_images} images of {size}, {classes}.")


@main.command(no_args_is_help=True)
@click.argument("data", metavar="ZIP|DIR|NPZ")
def info(data: str) -> None:
    """Print size, classes and content hash of a dataset."""
    from training.dataset import ImageDataset  # Needs PyTorch, which starts slowly.

    with _user_errors():
        dataset = ImageDataset(data)
        labels, class_names = read_labels(dataset.archive) or (None, [])
    click.echo(f"images        {len(dataset)}")
    click.echo(f"resolution    {dataset.resolution}x{dataset.resolution}")
    click.echo(f"channels      {dataset.img_channels}")
    click.echo(f"size          {format_count(dataset.archive.num_bytes, 'B')}")
    click.echo(f"content hash  {dataset.content_hash}")
    click.echo(f"classes       {len(class_names) if class_names else 'none (no labels)'}")
    if class_names:
        click.echo("\nindex   images  name")
        counts = np.bincount(labels, minlength=len(class_names))
        for index, (name, count) in enumerate(zip(class_names, counts, strict=True)):
            click.echo(f"{index:5d} {count:8d}  {name}")


@main.command(no_args_is_help=True)
@click.argument("data", metavar="ZIP|DIR|NPZ")
@click.option("--workers", type=click.IntRange(min=1), help="Number of processes that decode.")
def verify(data: str, workers: int | None) -> None:
    """Decode every image of a dataset, check sizes, labels and checksums, and list all problems."""
    with _user_errors():
        problems = verification.verify(data, num_workers=workers)
    for problem in problems:
        click.echo(problem)
    if problems:
        raise click.ClickException(f"{data}: {len(problems)} problem(s) found.")
    click.echo(f"{data}: no problems found.")


if __name__ == "__main__":
    main()
