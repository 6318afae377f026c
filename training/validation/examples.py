"""The examples of the validation loss: held-out images, each paired with a training image."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from data.preview import evenly_spaced

NUM_IMAGES = 256  # Most held-out images that are evaluated, repetitions included.
_MAX_REPEATS = 4  # Most evaluations of one image, at different noise levels, if images are few.
_MAX_CLASSES = 32  # With more classes, each would have too few images to be informative.


class Row(NamedTuple):
    """A held-out item and a training item that get the same noise."""

    shape: tuple[int, int, int]  # [C, h, w] of what the network denoises.
    held_out: Any  # Keys of the two items in their datasets.
    trained: Any
    group: str | None = None  # Class of the held-out item.


@dataclasses.dataclass(frozen=True)
class Examples:
    """The items that are compared: images, or sets of images for a set-conditioned model.

    Attributes:
        held_out, trained: Datasets of the two sides; reading them involves no randomness.
        rows: R pairs of items; rows of one shape are adjacent.
    """

    held_out: Any
    trained: Any
    rows: tuple[Row, ...]

    @property
    def groups(self) -> dict[str, np.ndarray]:
        """Masks of each class's rows, bool [R] each; empty without classes or for more than 32."""
        names = sorted({row.group for row in self.rows} - {None})
        if len(names) > _MAX_CLASSES:
            return {}
        return {name: np.array([row.group == name for row in self.rows]) for name in names}

    @property
    def num_items(self) -> int:
        """Number of different held-out items."""
        return len({row.held_out for row in self.rows})

    def by_item(self, losses: np.ndarray) -> np.ndarray:
        """Return the mean loss of each held-out item, [I], from the losses of the rows [R].

        Items are statistically independent, as repeated rows of one image are not.
        """
        _, item = np.unique([row.held_out for row in self.rows], return_inverse=True)
        return np.bincount(item, losses) / np.bincount(item)

    def batches(self, size: int) -> Iterator[range]:
        """Yield successive batches of rows, each of one shape and of at most ``size`` rows."""
        first = 0
        for row in range(1, len(self.rows) + 1):
            is_end = row == len(self.rows) or self.rows[row].shape != self.rows[first].shape
            if is_end or row - first == size:
                yield range(first, row)
                first = row


def num_repeats(num_held_out: int) -> int:
    """Return how often each held-out image is evaluated: up to 4 times if there are few."""
    return min(max(NUM_IMAGES // num_held_out, 1), _MAX_REPEATS)


def spread(num: int, length: int) -> list[int]:
    """Return ``num`` positions spread evenly over ``range(length)``, repeated if it is shorter.

    Every position comes once before any comes again.
    """
    return np.resize(evenly_spaced(num, length), num).tolist()


def examples_of_images(
    held_out: Any, trained: Any, shape: tuple[int, int, int], num_trained: int
) -> Examples:
    """Return examples of two datasets whose images have one ``shape``, [C, h, w] once encoded.

    Training images are among the first ``num_trained``. Classes are those of ``held_out.labels``
    [N], if it has any.
    """
    num_held_out = held_out.num_images
    num = min(num_held_out, NUM_IMAGES) * num_repeats(num_held_out)
    own, other = spread(num, num_held_out), spread(num, num_trained)
    names: Sequence[str | None] = [None] * num
    if held_out.labels is not None:
        names = [held_out.class_names[label] for label in held_out.labels[own]]
    keys = zip(own, other, names, strict=True)
    return Examples(held_out, trained, tuple(Row(shape, *key) for key in keys))
