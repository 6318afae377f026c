"""Images to be scored, read as they are."""

import os

from data.images.dataset import ImageDataset


def open_images(path: str | os.PathLike, *, use_labels: bool | None = None) -> ImageDataset:
    """Return the images of a folder, a zip or an ``.npz`` sample archive with unchanged pixels.

    A score must not rest on silent conversions, so that images with transparency, of more than 8
    bits, or in colours other than grayscale, RGB and palettes are refused, beyond what
    :class:`ImageDataset` refuses. Class labels are delivered if there are any, or as
    ``use_labels`` says.

    Raises ValueError, one sentence that names the file and the remedy; ImageError (a ValueError)
    for an image that is read later.
    """
    return ImageDataset(path, use_labels=use_labels, exact=True)
