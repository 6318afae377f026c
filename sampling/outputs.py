"""Where generated images are written, and the class of each."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from data.resumable import claim, progress_of_ranks, share
from dnnlib.errors import refusal
from dnnlib.text import parse_ranges
from torch_utils import distributed
from torch_utils.pictures import class_titles, image_grid, save_image, to_pil
from training.family import Generator, Requests

if TYPE_CHECKING:
    from PIL.Image import Image


def parse_classes(text: str | Sequence[str] | None, class_names: Sequence[str]) -> tuple[int, ...]:
    """Return the class indices that a list such as ``cat,3,5-7``, or its elements, names.

    Returns an empty tuple for None, which lets each seed draw its class. Raises ValueError for a
    class that the model does not have.
    """
    if text is None:
        return ()
    if not class_names:
        raise ValueError(f"--class: got {text!r}, but the model is unconditional.")
    return tuple(parse_ranges("--class", text, class_names))


def stacked(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return images [C, H, W] for a grid as [N, C, H, W]; raises ValueError if shapes differ."""
    shapes = collections.Counter(tuple(image.shape) for image in images)
    usual = shapes.most_common(1)[0][0]
    for index, image in enumerate(images):
        if image.shape != usual:
            own, other = ("x".join(map(str, shape)) for shape in (tuple(image.shape), usual))
            but = f"image {index} of {len(images)}, counted from 0, is {own}, and most are {other}"
            raise refusal("--grid", but=but, remedy="remove its file and start again")
    return torch.stack(list(images))


@dataclasses.dataclass(frozen=True)
class ClassRequests:
    """Classes assigned to seeds in rotation; see :class:`training.family.Requests`.

    If ``classes`` is empty, each seed draws its class.
    """

    classes: tuple[int, ...] = ()
    class_names: Sequence[str] = ()
    num_parts: ClassVar[int] = 1
    has_folders: ClassVar[bool] = False

    @property
    def facts(self) -> dict[str, Any]:
        return dict(classes=self.classes)

    def label(self, part: int, seed: int) -> int | None:
        return self.classes[seed % len(self.classes)] if self.classes else None

    def bind(self, generator: Generator, device: torch.device) -> Generator:
        return generator

    def picture(
        self,
        images: Sequence[torch.Tensor],
        labels: Sequence[int | None],
        columns: int,
        heading: str,
    ) -> Image:
        names = [] if None in labels else [self.class_names[label] for label in labels]
        titles = class_titles(names, columns, heading)
        return image_grid(stacked(images), columns, titles)


@dataclasses.dataclass(frozen=True)
class Place:
    """One image to generate: its file, its seed, and the label of its class, support or prompt."""

    path: Path
    seed: int
    label: int | None


def places(outdir: Path, requests: Requests, seeds: Sequence[int], subdirs: bool) -> list[Place]:
    """Return the places of all images of ``requests``: every seed of one part after the other.

    The file of seed 123 is ``000123.png``, in a subfolder ``000000`` for each thousand seeds if
    ``subdirs``, and in a folder ``0000`` for each part if the requests have folders.
    """
    found = []
    for part, seed in itertools.product(range(requests.num_parts), seeds):
        folder = outdir / f"{part:04d}" if requests.has_folders else outdir
        folder = folder / f"{seed - seed % 1000:06d}" if subdirs else folder
        found.append(Place(folder / f"{seed:06d}.png", seed, requests.label(part, seed)))
    return found


def check_layout(other: Sequence[Place], subdirs: bool) -> None:
    """Raise ValueError if an image exists where the other choice of ``subdirs`` would put it.

    ``other`` holds the places of the images under that choice.
    """
    found = next((place.path for place in other if place.path.is_file()), None)
    if found is not None:
        remedy = f"{'leave out' if subdirs else 'add'} --subdirs, or name another folder"
        raise refusal("--outdir", but=f"{found} is one of these images already", remedy=remedy)


def claim_outdir(outdir: Path, protocol: Mapping[str, Any], wanted: Sequence[Place]) -> None:
    """Record in ``outdir`` how its images are made.

    Raises ValueError if the record there differs, or if one of the ``wanted`` images exists without
    a record: as the record is written first, another program made that image.
    """
    file = outdir / "generation.json"
    found = next((place.path for place in wanted if place.path.is_file()), None)
    if found is not None and not file.is_file():
        but = f"{found} is there, and no {file.name} records how it was made"
        raise refusal("--outdir", but=but, remedy="choose another folder, or remove the image")
    claim(file, protocol, "--outdir", "images")


def make_images(generator: Generator, wanted: Sequence[Place], batch: int) -> None:
    """Generate and write the images of ``wanted`` that do not exist yet. Collective.

    Each rank generates ``batch`` images at once.
    """
    todo = [place for place in wanted if not place.path.is_file()]
    todo = distributed.broadcast_object(todo)
    if len(todo) < len(wanted):
        distributed.print0(f"{len(wanted) - len(todo)} of {len(wanted)} images exist already.")
    mine = share(todo)
    bar = progress_of_ranks(len(todo), len(mine), "Generating")
    with distributed.together(), bar as on_done:
        for start in range(0, len(mine), batch):
            part = mine[start : start + batch]
            seeds, labels = [place.seed for place in part], [place.label for place in part]
            images = generator.generate(seeds, None if None in labels else labels)
            for place, image in zip(part, images, strict=True):
                save_image(to_pil(image), place.path)
            on_done(len(part))
    distributed.barrier()
