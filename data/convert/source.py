"""The source of a conversion: images in order, with labels if there are any."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from data.images.decode import decode_image
from data.images.members import Member

_NUM_SHOWN = 8


class Drawing(Protocol):
    """An image that is computed by the process that converts it."""

    def pixels(self) -> np.ndarray:
        """Return the image, uint8 [H, W] or [H, W, 3]."""


Item = Member | np.ndarray | Drawing  # A file, uint8 [H, W] or [H, W, 3], or what draws that.


def image_of(item: Item) -> Image.Image:
    """Return an item, decoded or drawn; raises ValueError with the reason for a damaged file."""
    if isinstance(item, Member):
        return decode_image(item.read())
    return Image.fromarray(item if isinstance(item, np.ndarray) else item.pixels())


def broken_images(name: str, broken: Sequence[str], num_seen: int) -> ValueError:
    """Return the error that lists the unusable images ``broken`` of a source, one per line."""
    problem = f"{len(broken)} of {num_seen} images cannot be used"
    listed = "\n  ".join([f"{name}: {problem}:", *broken])
    return ValueError(
        f"{listed}\nNothing was written. Repair or remove them, or give --skip-broken."
    )


@dataclasses.dataclass(frozen=True)
class Source:
    """Images to convert, in order."""

    name: str  # What the user called them.
    num_images: int
    item: Callable[[int], Item]  # Image by index.
    image_name: Callable[[int], str]  # Name of an image by index, for messages.
    labels: Sequence[int] | None = None  # Class index of each image.
    class_names: Sequence[str] | None = None
    class_splits: Mapping[str, Sequence[int]] | None = None  # Class indices by split.
    notes: tuple[str, ...] = ()  # Sentences that the user should read.
    origin: str = "the source"  # Where the labels come from, or why there are none.
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)  # Counts by reason.
    by_area: bool = False  # Whether published results use images reduced by area averaging.

    @property
    def label_line(self) -> str:
        """A sentence that says which labels were found."""
        if self.labels is None:
            return f"No labels: {self.origin}."
        num = len(self.class_names)
        shown = ", ".join(self.class_names[:_NUM_SHOWN]) + (", ..." if num > _NUM_SHOWN else "")
        kinds = "1 class" if num == 1 else f"{num} classes"
        return f"Labels: {kinds} from {self.origin}: {shown}."


def array_source(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    class_splits: Mapping[str, Sequence[int]] | None = None,
) -> Source:
    """Return a source of images, uint8 [N, H, W] or [N, H, W, 3], with class indices [N].

    Raises ValueError unless each image has a label, and each label a name in ``class_names``.
    """
    labels = np.asarray(labels, np.int64)
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{name}: holds {len(images)} images but {labels.size} labels.")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
        bad = int(np.flatnonzero((labels < 0) | (labels >= len(class_names)))[0])
        problem = f"has label {labels[bad]}, beyond the {len(class_names)} classes"
        raise ValueError(f"{name}: image {bad} {problem}.")
    described = (name, len(images), images.__getitem__, lambda index: f"{name}, image {index}")
    return Source(*described, labels, list(class_names), class_splits)
