"""Aspect-ratio buckets: a few sizes to one of which each image is resized and cropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Self

from dnnlib.errors import refusal
from encoders.visual import num_patches

if TYPE_CHECKING:
    from PIL import Image

_MULTIPLE = 16  # Of all sides: latents are 8 times smaller and are divided into patches of 2x2.
_MAX_SIDE = 16_384
_MAX_SCALE = 2  # More enlargement would make an image more interpolation than picture.


@dataclasses.dataclass(frozen=True)
class Bucket:
    """An image size, width and height in pixels, to which images are resized and cropped."""

    width: int
    height: int

    @classmethod
    def of(cls, name: str) -> Self:
        """Return the bucket with a name such as ``1216x832``; raises ValueError for other texts."""
        width, _, height = name.partition("x")
        return cls(int(width), int(height))

    @property
    def name(self) -> str:
        """Width and height as text: ``1216x832``."""
        return f"{self.width}x{self.height}"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height

    def latent_size(self, downsampling: int) -> tuple[int, int]:
        """Return height and width of a latent, for an autoencoder's factor of ``downsampling``."""
        assert self.width % downsampling == 0
        assert self.height % downsampling == 0
        return self.height // downsampling, self.width // downsampling

    def grid(self, patch_size: int) -> tuple[int, int]:
        """Return the rows and columns of patches of a visual encoder with this patch size."""
        return num_patches(self.height, patch_size), num_patches(self.width, patch_size)


_WIDE = (Bucket(1216, 832), Bucket(1280, 768), Bucket(1344, 704))
DEFAULT_BUCKETS = (Bucket(1024, 1024), *_WIDE, *(Bucket(b.height, b.width) for b in _WIDE))


@dataclasses.dataclass(frozen=True)
class Crop:
    """How an image is brought to a bucket: resized as a whole, then cropped.

    Attributes:
        source: Width and height of the upright image.
        resized: Width and height to which it is resized.
        left, top: Position of the crop in the resized image, in pixels.
        bucket: Width and height of the crop.
    """

    source: tuple[int, int]
    resized: tuple[int, int]
    left: int
    top: int
    bucket: tuple[int, int]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the crop, in pixels of the upright image."""
        x, y = (old / new for old, new in zip(self.source, self.resized, strict=True))
        width, height = self.bucket
        right, bottom = self.left + width, self.top + height
        return self.left * x, self.top * y, right * x, bottom * y

    def to_dict(self) -> dict[str, Any]:
        """Return the resized size, the offset of the crop and its box as plain values."""
        return dict(resized=list(self.resized), offset=[self.left, self.top], box=list(self.box))


def parse_buckets(text: str) -> tuple[Bucket, ...]:
    """Return the buckets of a list such as ``1024x1024,1216x832``; raises ValueError otherwise."""
    sides = f"sides multiples of {_MULTIPLE} up to {_MAX_SIDE}, as 1024x1024,1216x832,832x1216"
    accepted = f"different sizes WxH separated by commas, {sides}"
    buckets: list[Bucket] = []
    for part in text.split(","):
        width, _, height = part.strip().lower().partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise refusal("--buckets", repr(part.strip()), accepted=accepted)
        bucket = Bucket(int(width), int(height))
        if any(side % _MULTIPLE or not 0 < side <= _MAX_SIDE for side in bucket.size):
            raise refusal("--buckets", bucket.name, accepted=accepted)
        if bucket in buckets:
            raise refusal("--buckets", but=f"names {bucket.name} twice", accepted=accepted)
        buckets.append(bucket)
    return tuple(buckets)


def nearest_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """Return the bucket W x H whose aspect ratio is nearest: argmin |ln(w/h) - ln(W/H)|.

    Ratios are exact fractions, so that a transposed image gets the transposed bucket. Of two
    buckets that are equally near, the squarer one is chosen; of two of the same shape, the larger
    one that needs no enlargement, or else the smaller one; of a bucket and its transpose, the wide
    one.
    """
    assert width > 0
    assert height > 0

    def key(bucket: Bucket) -> tuple[Any, ...]:
        ratio = Fraction(width * bucket.height, height * bucket.width)
        shape, area = Fraction(bucket.width, bucket.height), bucket.width * bucket.height
        enlarges = bucket.width > width or bucket.height > height
        nearness = max(ratio, 1 / ratio), max(shape, 1 / shape)
        return *nearness, enlarges, area if enlarges else -area, -bucket.width

    return min(buckets, key=key)


def plan_crop(width: int, height: int, bucket: Bucket) -> Crop:
    """Return how an upright image w x h is brought to a bucket W x H.

    It is scaled by max(W/w, H/h), with sides rounded up to whole pixels, and centre-cropped. Raises
    ValueError with the reason if that would enlarge it by a factor above two.
    """
    new_width, new_height = bucket.size
    if new_width > _MAX_SCALE * width or new_height > _MAX_SCALE * height:
        enlarged = f"would be enlarged more than {_MAX_SCALE} times for the bucket {bucket.name}"
        remedy = "use a larger image, or smaller --buckets"
        raise ValueError(f"is {width}x{height}, which {enlarged}; {remedy}")
    if new_width * height >= new_height * width:
        resized = (new_width, -(-height * new_width // width))
    else:
        resized = (-(-width * new_height // height), new_height)
    left, top = (resized[0] - new_width) // 2, (resized[1] - new_height) // 2
    return Crop((width, height), resized, left, top, bucket.size)


def fit_image(image: Image.Image, bucket: Bucket) -> tuple[Image.Image, Crop]:
    """Return an upright image brought to a bucket's size, in mode ``RGB``, and its crop.

    It is resized (bicubic, antialiased) and centre-cropped as :func:`plan_crop` says. Grayscale
    becomes three equal channels.
    """
    from PIL import Image

    crop = plan_crop(*image.size, bucket)
    image = image.convert("RGB")
    if crop.resized != image.size:
        image = image.resize(crop.resized, Image.Resampling.BICUBIC)
    if crop.resized != bucket.size:
        right, bottom = crop.left + bucket.width, crop.top + bucket.height
        image = image.crop((crop.left, crop.top, right, bottom))
    return image, crop
