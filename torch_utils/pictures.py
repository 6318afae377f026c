"""Grids of images as people look at them: enlarged, with gaps, written atomically."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dnnlib.errors import NotFiniteError, refusal
from dnnlib.files import atomic_write, check_target

if TYPE_CHECKING:
    import PIL.Image
    import PIL.PngImagePlugin

_GAP = 2
_BACKGROUND = 40
_MIN_TILE = 48
_BLOCK_GAP = 6
_MIN_COLUMNS = 5

_SOFTWARE = "SetDiffiT"


def image_grid(images: torch.Tensor, columns: int) -> PIL.Image.Image:
    """Return uint8 images [N, C, H, W] (C 1 or 3) as one picture, ``columns`` to a row.

    Small images are enlarged by a whole factor without smoothing, to at least 48 pixels a side.
    """
    import PIL.Image

    num, channels, height, width = images.shape
    rows = -(-num // columns)
    factor = max(1, -(-_MIN_TILE // max(height, width)))
    tiles = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    tile_h, tile_w = height * factor + _GAP, width * factor + _GAP
    shape = (rows * tile_h + _GAP, columns * tile_w + _GAP, channels)
    canvas = np.full(shape, _BACKGROUND, np.uint8)
    for index, tile in enumerate(tiles.permute(0, 2, 3, 1).cpu().numpy()):
        y, x = index // columns * tile_h + _GAP, index % columns * tile_w + _GAP
        canvas[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
    return PIL.Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas)


def mixed_grid(
    rows: Sequence[Sequence[torch.Tensor | PIL.Image.Image]], height: int = 256
) -> PIL.Image.Image:
    """Return rows of images of any sizes, uint8 [3, H, W] or pictures, as one picture.

    Every image is scaled to ``height``, or to be as wide as twice that, but never enlarged beyond a
    whole factor.
    """
    import PIL.Image

    rows = [[fit_tile(image, height) for image in row] for row in rows]
    tall = [max(tile.height for tile in row) + _GAP for row in rows]
    wide = [sum(tile.width + _GAP for tile in row) + _GAP for row in rows]
    canvas = PIL.Image.new("RGB", (max(wide), sum(tall) + _GAP), (_BACKGROUND,) * 3)
    top = _GAP
    for row, band in zip(rows, tall, strict=True):
        left = _GAP
        for tile in row:
            canvas.paste(tile, (left, top))
            left += tile.width + _GAP
        top += band
    return canvas


def fit_tile(image: torch.Tensor | PIL.Image.Image, height: int = 256) -> PIL.Image.Image:
    """Return a picture scaled as :func:`mixed_grid` does, which leaves the result as it is."""
    import PIL.Image

    image = to_pil(image) if isinstance(image, torch.Tensor) else image
    scale = min(height / image.height, 2 * height / image.width)
    resampling = PIL.Image.Resampling.NEAREST if scale >= 1 else PIL.Image.Resampling.LANCZOS
    scale = int(scale) if scale >= 1 else scale
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.resize(size, resampling)


def support_picture(
    supports: torch.Tensor, samples: torch.Tensor, bands: int = 5
) -> PIL.Image.Image:
    """Return supports uint8 [S, k, C, H, W] above samples [S, m, C, H, W] made from them.

    Every support is a block: its images in the first row, then a gap, then the samples, as many to
    a row (at least five). ``bands`` blocks stand side by side, then the next ones below.
    """
    import PIL.Image

    num, size = len(supports), max(supports.shape[1], min(samples.shape[1], _MIN_COLUMNS))
    blocks = []
    for support, made in zip(supports, samples, strict=True):
        top, below = np.array(image_grid(support, size)), np.array(image_grid(made, size))
        gap = np.full((_BLOCK_GAP, *top.shape[1:]), 255, np.uint8)
        block = np.concatenate([top, gap, below])
        margins = [(_BLOCK_GAP, _BLOCK_GAP), (_BLOCK_GAP, _BLOCK_GAP), (0, 0)][: block.ndim]
        blocks.append(np.pad(block, margins, constant_values=255))
    blocks += [np.full_like(blocks[0], 255)] * (-num % bands if num > bands else 0)
    rows = [np.concatenate(blocks[i : i + bands], axis=1) for i in range(0, len(blocks), bands)]
    return PIL.Image.fromarray(np.concatenate(rows))


def save_image(image: PIL.Image.Image, path: str | Path) -> None:
    """Write ``image`` as a PNG file, whole or not at all, that :func:`is_our_image` knows again."""
    import PIL.PngImagePlugin

    mark = PIL.PngImagePlugin.PngInfo()
    mark.add_text("Software", _SOFTWARE)
    with atomic_write(path) as file:
        image.save(file, format="PNG", pnginfo=mark)


def check_picture_target(option: str, path: Path, **rules: Any) -> None:
    """Raise ValueError if :func:`save_image` could not, or should not, write the file ``path``.

    ``rules`` are further arguments of :func:`dnnlib.files.check_target`.
    """
    if path.suffix.lower() != ".png":
        raise refusal(option, path, but="the picture is a PNG", remedy="end the name with .png")
    check_target(option, path, is_ours=is_our_image, **rules)


def is_our_image(path: Path) -> bool:
    """Return whether a file was written by :func:`save_image`."""
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            return image.info.get("Software") == _SOFTWARE
    except OSError:
        return False


def to_pil(image: torch.Tensor) -> PIL.Image.Image:
    """Return one uint8 image [C, H, W] (C 1 or 3) as a picture."""
    import PIL.Image

    array = image.permute(1, 2, 0).cpu().numpy()
    return PIL.Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def read_image(path: str | Path) -> torch.Tensor:
    """Return the picture in a file as a uint8 image [C, H, W]; raises ValueError if it has none."""
    import PIL.Image

    try:
        array = np.asarray(PIL.Image.open(path))
    except OSError as error:
        raise ValueError(f"{path}: not a readable image ({error}).") from error
    return torch.as_tensor(array.copy()).reshape(*array.shape[:2], -1).permute(2, 0, 1)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Return images in [-1, 1] as uint8: clip(127.5 x + 128), as EDM rounds.

    Raises NotFiniteError for values that are not finite, of which no image can be made.
    """
    if not images.isfinite().all():
        raise NotFiniteError(
            "Decoding gave values that are not finite; try --precision=fp32 or another snapshot."
        )
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)
