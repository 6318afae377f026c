"""Image grids for viewing: enlarged, with gaps and titles, and written atomically."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dnnlib.errors import NotFiniteError, refusal
from dnnlib.files import atomic_write, check_target

if TYPE_CHECKING:
    import PIL.Image
    import PIL.ImageFont
    import PIL.PngImagePlugin

_GAP = 2
_BLOCK_GAP = 10
_BACKGROUND = 40
_DARK = (_BACKGROUND,) * 3
_INK = 225
_MIN_TILE = 48
_MIN_COLUMNS = 5
_TEXT_SIZE = 11
_LINE = 15  # Height of a line of text, in pixels.
_MAX_MARGIN = 168  # Maximum width of row titles, in pixels.
_MARK = "SetDiffiT"

if TYPE_CHECKING:
    Tile = torch.Tensor | PIL.Image.Image


@dataclasses.dataclass(frozen=True)
class Titles:
    """Texts of a picture. A text too long for its place ends in an ellipsis."""

    heading: str = ""  # At the top of the picture.
    columns: Sequence[str] = ()  # Above the images of the first row; columns are then aligned.
    rows: Sequence[str] = ()  # To the left of each row, in as many lines as needed.
    captions: Sequence[str] = ()  # Below each image, row by row.


def image_grid(
    images: torch.Tensor, columns: int, titles: Titles = Titles(), *, min_tile: int = _MIN_TILE
) -> PIL.Image.Image:
    """Return images [N, C, H, W], uint8, C 1 or 3, as one picture with ``columns`` to a row.

    Small images are enlarged by a whole factor, without smoothing, until their longer side has at
    least ``min_tile`` pixels.
    """
    factor = max(1, -(-min_tile // max(images.shape[2:])))
    tiles = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return _compose([[to_pil(tile) for tile in row] for row in tiles.split(columns)], titles)


def mixed_grid(
    rows: Sequence[Sequence[Tile]], height: int = 256, titles: Titles = Titles()
) -> PIL.Image.Image:
    """Return rows of images of any size ([C, H, W], uint8, C 1 or 3, or pictures) as one picture.

    Every image is scaled to fit ``height`` and a width of twice that; smaller images are enlarged
    only by a whole factor.
    """
    return _compose([[fit_tile(image, height) for image in row] for row in rows], titles)


def fit_tile(image: Tile, height: int = 256) -> PIL.Image.Image:
    """Return a picture scaled as in :func:`mixed_grid`, which leaves such pictures unchanged."""
    import PIL.Image

    image = to_pil(image) if isinstance(image, torch.Tensor) else image
    scale = min(height / image.height, 2 * height / image.width)
    resampling = PIL.Image.Resampling.NEAREST if scale >= 1 else PIL.Image.Resampling.LANCZOS
    scale = int(scale) if scale >= 1 else scale
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.resize(size, resampling)


def class_titles(names: Sequence[str], columns: int, heading: str = "") -> Titles:
    """Return titles that name the class of each image, once for images that share a class.

    ``names`` holds the class name of each image, in order; empty if there are no classes.
    """
    if len(set(names)) == 1:
        return Titles(f"{names[0]} ({heading})" if heading else names[0])
    rows = [names[start : start + columns] for start in range(0, len(names), columns)]
    if len(rows) > 1 and all(len(set(row)) == 1 for row in rows):
        return Titles(heading, rows=[row[0] for row in rows])
    if len(rows) > 1 and all(row == rows[0][: len(row)] for row in rows):
        return Titles(heading, columns=rows[0])
    return Titles(heading, captions=names)


def support_picture(
    supports: torch.Tensor,
    samples: torch.Tensor,
    bands: int = 5,
    *,
    names: Sequence[str] = (),
    heading: str = "",
) -> PIL.Image.Image:
    """Return a picture of supports with the samples generated from each below it.

    Args:
        supports: [S, k, C, H, W], uint8.
        samples: [S, m, C, H, W], uint8. A row holds as many as its support (at least five if there
            are so many).
        bands: Supports side by side, before the next ones follow below.
        names: Class name of each support.
        heading: Title of the picture.
    """
    size = max(supports.shape[1], min(samples.shape[1], _MIN_COLUMNS))
    blocks = []
    for row, (support, made) in enumerate(zip(supports, samples, strict=True)):
        own = f"Support: {names[row]}" if names else "Support"
        parts = [image_grid(support, size, Titles(own)), image_grid(made, size, Titles("Samples"))]
        blocks.append(_paste([[part] for part in parts], gap=0, margin=0))
    bands = min(bands, len(blocks))
    rows = [blocks[start : start + bands] for start in range(0, len(blocks), bands)]
    picture = _paste(rows, gap=_BLOCK_GAP, margin=_BLOCK_GAP)
    return _compose([[picture]], Titles(heading)) if heading else picture


def _paste(rows: Sequence[Sequence[PIL.Image.Image]], *, gap: int, margin: int) -> PIL.Image.Image:
    """Return one picture with rows of pictures on the background, ``gap`` pixels apart."""

    heights = [max(picture.height for picture in row) for row in rows]
    width = max(sum(picture.width + gap for picture in row) - gap for row in rows)
    size = (width + 2 * margin, sum(heights) + gap * (len(rows) - 1) + 2 * margin)
    canvas = _canvas(size, [picture for row in rows for picture in row])
    top = margin
    for row, height in zip(rows, heights, strict=True):
        left = margin
        for picture in row:
            canvas.paste(picture, (left, top))
            left += picture.width + gap
        top += height + gap
    return canvas


def _canvas(size: tuple[int, int], pictures: Sequence[PIL.Image.Image]) -> PIL.Image.Image:
    import PIL.Image

    is_gray = all(picture.mode == "L" for picture in pictures)
    return PIL.Image.new("L" if is_gray else "RGB", size, _BACKGROUND if is_gray else _DARK)


def _compose(rows: Sequence[Sequence[PIL.Image.Image]], titles: Titles) -> PIL.Image.Image:
    """Return one picture of rows of tiles, at their own size, with gaps and titles."""
    writer = _Writer()
    lefts, width = _places(rows, is_aligned=bool(titles.columns))
    shift = writer.margin(titles.rows)
    heights = [max(tile.height for tile in row) for row in rows]
    below = _LINE if any(titles.captions) else 0
    top = _GAP + _LINE * (bool(titles.heading) + bool(titles.columns))
    size = (shift + width, top + sum(height + below + _GAP for height in heights))
    canvas = _canvas(size, [tile for row in rows for tile in row])
    writer.begin(canvas)
    writer.line(titles.heading, (_GAP, 0), size[0] - 2 * _GAP)
    for title, left, tile in zip(titles.columns, lefts[0], rows[0], strict=False):
        writer.line(title, (shift + left, top - _GAP - _LINE), tile.width)
    captions = iter(titles.captions)
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        if number < len(titles.rows):
            writer.block(titles.rows[number], (_GAP, top), shift - 3 * _GAP, height)
        for left, tile in zip(lefts[number], row, strict=True):
            canvas.paste(tile, (shift + left, top))
            writer.line(next(captions, ""), (shift + left, top + height), tile.width)
        top += height + below + _GAP
    return canvas


def _places(
    rows: Sequence[Sequence[PIL.Image.Image]], *, is_aligned: bool
) -> tuple[list[list[int]], int]:
    """Return the left edge of each tile of each row, and the total width, in pixels."""
    widths = [[tile.width for tile in row] for row in rows]
    if is_aligned:
        widest = [max(column) for column in itertools.zip_longest(*widths, fillvalue=0)]
        widths = [widest[: len(row)] for row in widths]
    ends = [list(itertools.accumulate((w + _GAP for w in row), initial=_GAP)) for row in widths]
    return [row[:-1] for row in ends], max(row[-1] for row in ends)


@functools.cache
def _font() -> PIL.ImageFont.FreeTypeFont:
    import PIL.ImageFont

    return PIL.ImageFont.load_default(_TEXT_SIZE)


@functools.cache
def _character(character: str) -> str:
    """Return a character if the font has it, and else its code point, such as ``U+0531``."""
    own, missing = (bytes(_font().getmask(text)) for text in (character, "\uffff"))
    return character if character.isspace() or own != missing else f"U+{ord(character):04X}"


def _shown(text: str) -> str:
    return " ".join("".join(map(_character, text)).split())


class _Writer:
    """Writes texts on a picture, cut to given widths."""

    def __init__(self) -> None:
        self._font = _font()

    def begin(self, canvas: PIL.Image.Image) -> None:
        import PIL.ImageDraw

        self._draw = PIL.ImageDraw.Draw(canvas)
        self._ink = _INK if canvas.mode == "L" else (_INK,) * 3

    def margin(self, titles: Sequence[str]) -> int:
        """Return the width that row titles take, in pixels; 0 if there are none."""
        widest = max((self._width(_shown(title)) for title in titles), default=0)
        return min(math.ceil(widest), _MAX_MARGIN) + 3 * _GAP if widest else 0

    def line(self, text: str, place: tuple[int, int], width: int) -> None:
        text = self._fitted(_shown(text), width)
        self._draw.text(place, text, fill=self._ink, font=self._font)

    def block(self, text: str, place: tuple[int, int], width: int, height: int) -> None:
        """Write a text in lines that fit ``height``; the last one takes the rest and may be cut."""
        words, lines = _shown(text).split(), []
        while words and len(lines) < max(height // _LINE, 1):
            num = len(words)
            is_last = len(lines) + 1 == max(height // _LINE, 1)
            while not is_last and num > 1 and self._width(" ".join(words[:num])) > width:
                num -= 1
            lines.append(" ".join(words[:num]))
            words = words[num:]
        for number, line in enumerate(lines):
            self.line(line, (place[0], place[1] + number * _LINE), width)

    def _width(self, text: str) -> float:
        return self._font.getlength(text)

    def _fitted(self, text: str, width: int) -> str:
        if self._width(text) <= width:
            return text
        kept = bisect.bisect_right(
            range(len(text)), width, key=lambda num: self._width(text[:num].rstrip() + "...")
        )
        return text[: kept - 1].rstrip() + "..." if kept > 1 else text[:1]


def save_image(image: PIL.Image.Image, path: str | Path) -> None:
    """Write ``image`` atomically as a PNG file that :func:`is_our_image` recognises."""
    import PIL.PngImagePlugin

    mark = PIL.PngImagePlugin.PngInfo()
    mark.add_text("Software", _MARK)
    with atomic_write(path) as file:
        # Level 6, the default, takes 1.6 times as long and makes files 0 to 20% smaller.
        image.save(file, format="PNG", pnginfo=mark, compress_level=3)


def save_animation(
    pictures: Sequence[PIL.Image.Image], path: str | Path, durations_ms: Sequence[int]
) -> None:
    """Write pictures of one size atomically as a looping GIF that :func:`is_our_image` recognises.

    ``durations_ms`` holds the milliseconds for which each picture is shown.
    """
    import PIL.Image

    dither = PIL.Image.Dither.NONE
    first, *others = (picture.quantize(dither=dither) for picture in pictures)
    with atomic_write(path) as file:
        first.save(
            file,
            format="GIF",
            save_all=True,
            append_images=others,
            duration=list(durations_ms),
            loop=0,
            comment=_MARK,
        )


def check_picture_target(option: str, path: Path, suffix: str = ".png", **rules: Any) -> None:
    """Raise ValueError if a picture cannot, or should not, be written to the file ``path``.

    ``rules`` are further arguments of :func:`dnnlib.files.check_target`.
    """
    if path.suffix.lower() != suffix:
        what = f"the picture is a {suffix[1:].upper()}"
        raise refusal(option, path, but=what, remedy=f"end the name with {suffix}")
    check_target(option, path, is_ours=is_our_image, **rules)


def is_our_image(path: Path) -> bool:
    """Return whether a file was written by :func:`save_image` or :func:`save_animation`."""
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            info = image.info
            return info.get("Software") == _MARK or info.get("comment") == _MARK.encode()
    except OSError:
        return False


def to_pil(image: torch.Tensor) -> PIL.Image.Image:
    """Return one image [C, H, W], uint8, C 1 or 3, as a picture."""
    import PIL.Image

    array = image.permute(1, 2, 0).cpu().numpy()
    return PIL.Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def read_image(path: str | Path) -> torch.Tensor:
    """Return the image in a file as [C, H, W], uint8 for 8-bit files; ValueError if unreadable."""
    import PIL.Image

    try:
        array = np.asarray(PIL.Image.open(path))
    except OSError as error:
        raise ValueError(f"{path}: not a readable image ({error}).") from error
    return torch.as_tensor(array.copy()).reshape(*array.shape[:2], -1).permute(2, 0, 1)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Return images in [-1, 1] as uint8: clip(127.5 x + 128, 0, 255), truncated as in EDM.

    Raises NotFiniteError if any value is infinite or NaN.
    """
    if not images.isfinite().all():
        raise NotFiniteError(
            "Decoding gave values that are not finite; try --precision=fp32 or another snapshot."
        )
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)
