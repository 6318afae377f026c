"""dataset_tool.py convert: makes a dataset from images in many formats."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data.convert.choices import CIFAR_SPLITS, SPLITS, TRANSFORMS
from dnnlib.click_options import param, takes
from dnnlib.errors import refusal
from dnnlib.files import check_target

if TYPE_CHECKING:
    from data.convert.convert import Summary


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    source: str = param(
        required=True,
        metavar="PATH|digits|glyphs",
        help="Folder or zip of images, .npz of samples in ADM's layout, CIFAR-10/100 python "
        "archive, MNIST idx file or folder, pickles of FC100, CIFAR-FS or miniImageNet, folder of "
        "Omniglot's train_small.npz and test_small.npz; or digits: the handwritten digits of "
        "scikit-learn; or glyphs: letters in the fonts of matplotlib.",
    )
    dest: str = param(
        required=True,
        metavar="ZIP|DIR|NPZ",
        help="New .zip file or folder, or .npz of samples for ADM's evaluator (always RGB).",
    )
    resolution: str | None = param(
        metavar="N|WxH",
        help="Size of the images to write.  WxH is for center-crop-wide, where N alone means 4:3.  "
        "[default: that of the images, which must be square and of one size; 28 for glyphs]",
    )
    transform: str | None = param(
        choices=TRANSFORMS,
        help="How to make images square.  [default: only square ones are accepted]",
    )
    crops: int | None = param(
        min=1,
        max=1_000_000,
        help="Cut this many squares out of each image of a folder or zip, at random positions and "
        "with sides of 15% to 22% of its short side, and resize them to --resolution.",
    )
    max_images: int | None = param(min=1, max=1_000_000_000, help="Use only the first N images.")
    skip_broken: bool = param(help="Leave out broken images instead of failing.")
    overwrite: bool = param(
        help="Replace an existing file. A folder that is not empty is never replaced."
    )
    labels: str | None = param(
        metavar="folders|none|FILE",
        help="Labels of a folder or zip of images: from its folders, none, or from a file, which "
        "is a .json in the layout of dataset.json or a .csv of name,class.  [default: "
        "dataset.json, or else folders]",
    )
    label_level: int | None = param(
        min=1,
        max=100,
        help="Which folder in a file's path is its class, counted from --source.  [default: the "
        "first that does not hold all images]",
    )
    split: str | None = param(
        choices=SPLITS,
        help="Part to take: of a CIFAR archive or MNIST folder, of the fonts of glyphs or, with "
        "--crops, of each image, a third of which is test.  [default: train]",
    )
    class_split: str | None = param(
        choices=CIFAR_SPLITS,
        help="Split the classes of CIFAR-100 for few-shot learning, and convert all of its images.",
    )
    workers: int | None = param(
        min=1, max=1_024, help="Number of processes that decode images.  [default: one per core]"
    )


@click.command(no_args_is_help=True)
@takes(ConvertOptions)
def command(options: ConvertOptions) -> None:
    """Write a dataset for training or scoring from a source of images.

    Labels come from the source's dataset.json or, for folders and zips, from the first folder
    level. Grayscale images keep one channel, but if any image is RGB, all become RGB. Transparent
    images are composited on white. In an .npz all images are RGB: grayscale is repeated in all
    three channels. The output is either complete or absent, even if the conversion is interrupted.

    \b
    Examples:
      # CIFAR-10: 50,000 labelled 32x32 images
      python dataset_tool.py convert --source=cifar-10-python.tar.gz --dest=datasets/cifar10.zip
      # FFHQ at 64x64, from a folder of larger images
      python dataset_tool.py convert --source=ffhq/ --dest=datasets/ffhq-64x64.zip --resolution=64
      # ImageNet at 256x256, cropped as in ADM; labels from the class folders
      python dataset_tool.py convert --source=ILSVRC/train --dest=datasets/imagenet-256.zip \\
          --resolution=256 --transform=center-crop-dhariwal
      # MNIST; the labels are found beside the images
      python dataset_tool.py convert --source=train-images-idx3-ubyte.gz --dest=datasets/mnist.zip
      # CIFAR-100 with FC100's split into training, validation and unseen classes
      python dataset_tool.py convert --source=cifar-100-python.tar.gz --class-split=fc100 \\
          --dest=datasets/fc100.zip
      # miniImageNet from a folder of its three pickles, at 32x32
      python dataset_tool.py convert --source=mini-imagenet --dest=datasets/mini.zip --resolution=32
      # Letters of every script in matplotlib's fonts, in 16 faces, at 16x16
      python dataset_tool.py convert --source=glyphs --dest=datasets/glyphs.zip --resolution=16
      # 2,000 squares out of each photograph, and 1,000 out of the third that is held out as test
      python dataset_tool.py convert --source=photos/ --dest=datasets/photos.zip --resolution=64 \\
          --crops=2000
      python dataset_tool.py convert --source=photos/ --dest=datasets/photos-test.zip \\
          --resolution=64 --crops=1000 --split=test
      # Generated images as a sample archive for ADM's evaluator, and such an archive as a zip
      python dataset_tool.py convert --source=out/ --dest=samples.npz
      python dataset_tool.py convert --source=samples.npz --dest=samples.zip
    """
    from data.convert import convert as conversion
    from data.convert.labelling import LabelChoice
    from data.convert.sources import Selection, open_source
    from data.images.transforms import parse_resolution

    # An interruption cleans up after itself; SIGKILL leaves a hidden .NAME.*.tmp beside --dest.
    choice = LabelChoice(options.labels, options.label_level)
    inputs = dict(source=options.source, labels=options.labels or "")
    check_target("--dest", options.dest, is_folder=Path(options.dest).is_dir(), inputs=inputs)
    size = parse_resolution(options.resolution, options.transform)
    if options.crops is not None:
        _check_crops(options)
    same = ("split", "class_split", "skip_broken", "crops", "max_images")
    selected = {name: getattr(options, name) for name in same}
    selected |= dict(choice=choice, size=size, num_workers=options.workers)
    source = open_source(options.source, Selection(**selected))
    click.echo(source.label_line)
    same = ("transform", "skip_broken", "overwrite")
    settings = {name: getattr(options, name) for name in same}
    settings |= dict(size=size, num_workers=options.workers)
    settings |= dict(max_images=options.max_images if options.crops is None else None)
    summary = conversion.convert_images(source, options.dest, **settings)
    _tell(summary, options.dest)


def _tell(summary: "Summary", dest: str) -> None:
    """Print what was converted, and which images were left out."""
    for note in summary.notes:
        click.echo(note)
    if summary.skipped:
        click.echo("Broken:\n  " + "\n  ".join(summary.skipped), err=True)
        click.echo(f"Skipped {len(summary.skipped)} broken image(s).")
    size = f"{summary.resolution}x{summary.resolution}x{summary.img_channels}"
    classes = f"{summary.num_classes} classes" if summary.num_classes else "no labels"
    click.echo(f"{dest}: {summary.num_images} images of {size}, {classes}.")
    click.echo(summary.count_line)


def _check_crops(options: ConvertOptions) -> None:
    if options.resolution is None:
        raise ValueError(f"--crops={options.crops} needs a size; give --resolution=N too.")
    if options.transform is not None:
        problem = "--crops cuts squares by itself"
        raise refusal("--transform", options.transform, but=problem, remedy="leave it out")
