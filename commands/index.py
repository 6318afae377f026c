"""dataset_tool.py index: writes the index of a tar of images, to read them in place."""

from pathlib import Path

import click

from dnnlib.click_options import TextType


@click.command(no_args_is_help=True)
@click.argument("tar", metavar="TAR", type=TextType())
def command(tar: str) -> None:
    """Write the index of a tar of images beside it, so that images can be read in place.

    The tar is read once. Put both files into a folder or an object store, and pass the path or URL
    of the tar as --data. Labels are read from a dataset.json in the tar. A zip needs no index.

    \b
    Examples:
      python dataset_tool.py index datasets/photos.tar
      python train.py --preset=cifar10 --outdir=runs --data=https://HOST/photos.tar
    """
    from data.images.tars import write_index

    path, num_images = write_index(Path(tar))
    click.echo(f"{path}: {num_images} images.")
