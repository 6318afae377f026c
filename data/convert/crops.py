"""Squares cut out of photographs; about a third of each photograph is held out for ``test``.

A photograph is divided into cells, four along its short side. Every third cell of a row is held
out, shifted by one cell to the right from each row to the next, so that both parts include some of
every row and column. No pixel of ``test`` is in ``train``.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
from PIL import Image

from data.convert.choices import SPLITS
from data.convert.source import Source, broken_images, image_of
from data.images.members import Member
from data.images.transforms import Size
from dnnlib.parallel import process_map
from dnnlib.progress import progress

_CELLS = 4  # Along the short side.
_PERIOD = 3  # One in this many cells is held out.
_MARGIN = 1 / 16  # Margin inside a held-out cell from which nothing is cut, as a share of its side.
# The longest and the shortest edge of a square, as shares of the short side. The longest is a cell
# without its margins.
_LONGEST, _SHORTEST = (1 - 2 * _MARGIN) / _CELLS, 0.15

Box = tuple[int, int, int, int]  # Left, top, right, bottom.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cropping:
    """How many squares to cut out of each photograph, at which resolution, and from which part."""

    num: int
    resolution: int
    split: str = "train"  # One of SPLITS.


@dataclasses.dataclass(frozen=True)
class Crop:
    """A square to cut out of a photograph: a small object that other processes can work on."""

    photograph: Member
    box: Box
    resolution: int

    def pixels(self) -> np.ndarray:
        """Return the square, resized (Lanczos): uint8 [R, R] or [R, R, 3]."""
        size = (self.resolution, self.resolution)
        # Crop before resizing, so that no pixel outside the box contributes.
        return np.asarray(
            _decoded(self.photograph).crop(self.box).resize(size, Image.Resampling.LANCZOS)
        )


def crop_images(
    photographs: Source, cropping: Cropping, *, skip_broken: bool = False, num_workers: int | None
) -> Source:
    """Return a source of squares cut out of each photograph in turn, with the photograph's label.

    Their positions are a function of the photograph's size and index in the source, and of the
    split. Raises ValueError, listing all of them, if photographs cannot be read or are so small
    that squares would have to be enlarged; ``skip_broken`` leaves these photographs out instead.
    """
    sizes: list[Size | None] = []
    broken: list[str] = []
    items = map(photographs.item, range(photographs.num_images))
    measured = process_map(functools.partial(_measure, cropping), items, num_workers=num_workers)
    with progress(total=photographs.num_images, label=f"Measuring {photographs.name}") as bar:
        for index, found in enumerate(measured):
            if isinstance(found, str):
                broken.append(f"{photographs.image_name(index)}: {found}")
            sizes.append(None if isinstance(found, str) else found)
            bar.update()
    if broken and (len(broken) == len(sizes) or not skip_broken):
        raise broken_images(photographs.name, broken, len(sizes))
    used = [index for index, size in enumerate(sizes) if size is not None]
    crops = [
        Crop(photographs.item(index), box, cropping.resolution)
        for index in used
        for box in _boxes(sizes[index], cropping, index)
    ]
    labels = None
    if photographs.labels is not None:
        labels = np.repeat(np.asarray(photographs.labels)[used], cropping.num)
    left_out = dict(photographs.left_out)
    if broken:
        left_out["broken or too small"] = len(broken)
    return dataclasses.replace(
        photographs,
        num_images=len(crops),
        item=crops.__getitem__,
        image_name=lambda index: photographs.image_name(used[index // cropping.num]),
        labels=labels,
        notes=(*photographs.notes, *broken),
        left_out=left_out,
    )


def held_out_cells(size: Size) -> list[Box]:
    """Return the cells of a photograph, given its size, that no square of ``train`` overlaps."""
    width, height = size
    columns, rows = (side * _CELLS // min(size) for side in size)
    return [
        (
            *(width * column // columns, height * row // rows),
            *(width * (column + 1) // columns, height * (row + 1) // rows),
        )
        for row in range(rows)
        for column in range(columns)
        if (column - row) % _PERIOD == 0
    ]


def _measure(cropping: Cropping, photograph: Member) -> Size | str:
    """Return width and height, or the reason why no squares can be cut. Runs in another process."""
    try:
        width, height = _decoded(photograph).size
    except ValueError as error:
        return str(error)
    if int(min(width, height) * _LONGEST) < cropping.resolution:
        least = -int(-cropping.resolution // _LONGEST)
        return f"is {width}x{height}; squares of {cropping.resolution} need {least} pixels a side"
    return width, height


# One entry is enough: a process cuts all squares of a photograph before those of the next one.
@functools.lru_cache(maxsize=1)
def _decoded(photograph: Member) -> Image.Image:
    return image_of(photograph)


def _boxes(size: Size, cropping: Cropping, index: int) -> Iterator[Box]:
    """Yield the squares of a photograph: uniform positions, log-uniform edge lengths."""
    rng = np.random.default_rng([index, SPLITS.index(cropping.split)])
    longest = int(min(size) * _LONGEST)
    shortest = min(max(round(min(size) * _SHORTEST), cropping.resolution), longest)
    cells = held_out_cells(size)
    for _ in range(cropping.num):
        edge = round(np.exp(rng.uniform(np.log(shortest), np.log(longest))))
        if cropping.split == "test":
            yield _square_in(_without_margin(cells[rng.integers(len(cells))]), edge, rng)
            continue
        box = _square_in((0, 0, *size), edge, rng)
        while cropping.split == "train" and any(_overlap(box, cell) for cell in cells):
            box = _square_in((0, 0, *size), edge, rng)
        yield box


def _without_margin(cell: Box) -> Box:
    left, top, right, bottom = cell
    beside, above = int((right - left) * _MARGIN), int((bottom - top) * _MARGIN)
    return left + beside, top + above, right - beside, bottom - above


def _square_in(area: Box, edge: int, rng: np.random.Generator) -> Box:
    left = int(rng.integers(area[0], area[2] - edge + 1))
    top = int(rng.integers(area[1], area[3] - edge + 1))
    return left, top, left + edge, top + edge


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
