"""What a converter reads: images in order, each with its label."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data.images.members import Member


@dataclasses.dataclass(frozen=True)
class Source:
    """Images to convert, in order.

    Attributes:
        name: What the user called it.
        num_images: Number of images.
        item: Maps an index to an image: where its file lies, or uint8 pixels [H, W] or [H, W, 3].
        image_name: Maps an index to the image's name, for messages.
        labels: Class index of every image, or None.
        class_names: One name per class, or None without labels.
        class_splits: Class indices of each split of the classes, or None.
        notes: Sentences that the user should read.
    """

    name: str
    num_images: int
    item: Callable[[int], Member | np.ndarray]
    image_name: Callable[[int], str]
    labels: Sequence[int] | None = None
    class_names: Sequence[str] | None = None
    class_splits: Mapping[str, Sequence[int]] | None = None
    notes: tuple[str, ...] = ()


def array_source(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    class_splits: Mapping[str, Sequence[int]] | None = None,
) -> Source:
    """Return images uint8 [N, H, W] or [N, H, W, 3] with a label each as a source.

    Raises ValueError unless every image has a label of a class.
    """
    labels = np.asarray(labels, np.int64)
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{name}: holds {len(images)} images but {labels.size} labels.")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
        bad = int(np.flatnonzero((labels < 0) | (labels >= len(class_names)))[0])
        raise ValueError(
            f"{name}: image {bad} has label {labels[bad]}, beyond the {len(class_names)} classes."
        )
    return Source(
        name=name,
        num_images=len(images),
        item=images.__getitem__,
        image_name=lambda index: f"{name}, image {index}",
        labels=labels,
        class_names=list(class_names),
        class_splits=class_splits,
    )
