"""Crops and resizes images of any size to the square size of a training dataset."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from data.convert.choices import TRANSFORMS
from dnnlib.errors import refusal

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]  # Width, height.
_MAX_SIDE = 16_384


def center_crop(image: Image.Image, size: Size) -> Image.Image:
    """Return the largest central part with the proportions of ``size``, resized to it (Lanczos)."""
    from PIL import Image

    width, height = image.size
    crop_w = min(width, max(round(height * size[0] / size[1]), 1))
    crop_h = min(height, max(round(width * size[1] / size[0]), 1))
    x, y = (width - crop_w) // 2, (height - crop_h) // 2
    return image.crop((x, y, x + crop_w, y + crop_h)).resize(size, Image.Resampling.LANCZOS)


def center_crop_wide(image: Image.Image, size: Size) -> Image.Image:
    """Return :func:`center_crop` with black bars above and below: a square as wide as ``size``."""
    from PIL import Image

    width, height = size
    canvas = Image.new(image.mode, (width, width))
    canvas.paste(center_crop(image, size), (0, (width - height) // 2))
    return canvas


def center_crop_dhariwal(image: Image.Image, size: Size) -> Image.Image:
    """Return the central square as ADM prepares ImageNet (Dhariwal & Nichol 2021, 2105.05233).

    The image is halved by averaging while its short side is at least twice the target ``size[0]``,
    then its short side is resized to the target with a bicubic filter, then the centre is cropped.
    """
    from PIL import Image

    target = size[0]
    while min(image.size) >= 2 * target:
        halved = (image.width // 2, image.height // 2)
        image = image.resize(halved, Image.Resampling.BOX)
    scale = target / min(image.size)
    scaled = (round(image.width * scale), round(image.height * scale))
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    x, y = (image.width - target) // 2, (image.height - target) // 2
    return image.crop((x, y, x + target, y + target))


_TRANSFORMS: dict[str, Callable[[Image.Image, Size], Image.Image]] = dict(
    zip(TRANSFORMS, (center_crop, center_crop_wide, center_crop_dhariwal), strict=True)
)


def apply_transform(
    image: Image.Image, size: Size, transform: str | None, by_area: bool = False
) -> Image.Image:
    """Return an image brought to ``size`` by one of TRANSFORMS; None resizes it without cropping.

    That resizing uses a Lanczos filter, or with ``by_area`` the mean over each pixel's area (box)
    if the image becomes smaller.
    """
    from PIL import Image

    if transform is not None:
        return _TRANSFORMS[transform](image, size)
    if image.size == size:
        return image
    reduces = size[0] < image.width
    resampling = Image.Resampling.BOX if by_area and reduces else Image.Resampling.LANCZOS
    return image.resize(size, resampling)


def parse_resolution(text: str | None, transform: str | None) -> Size | None:
    """Return (width, height) from ``--resolution``: N, or WxH for center-crop-wide.

    For center-crop-wide, a single N is a width with the proportions 4:3, as for LSUN Cars. Raises
    ValueError for anything else, and for a transform without a resolution.
    """
    if text is None:
        if transform is not None:
            raise ValueError(f"--transform={transform} needs a size; give --resolution=N too.")
        return None
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text.strip().lower())
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    wide = "--transform=center-crop-wide"
    if not 1 <= min(width, height) <= max(width, height) <= _MAX_SIDE:
        accepted = (
            f"a number of pixels up to {_MAX_SIDE}, or WIDTHxHEIGHT such as 512x384 for {wide}"
        )
        raise refusal("--resolution", repr(text), accepted=accepted)
    if transform == "center-crop-wide":
        height = height if match[2] else max(round(width * 3 / 4), 1)
        if height > width:
            problem = f"it is higher than wide, and {wide} puts black bars above and below"
            remedy = "give WIDTHxHEIGHT with HEIGHT at most WIDTH"
            raise refusal("--resolution", text, but=problem, remedy=remedy)
    elif width != height:
        problem = "training images are square"
        remedy = f"give one number (WIDTHxHEIGHT is for {wide})"
        raise refusal("--resolution", text, but=problem, remedy=remedy)
    return width, height
