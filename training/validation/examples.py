"""The examples of the validation loss: held-out images, each paired with a training image."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from data.preview import evenly_spaced

NUM_IMAGES = 256  # Held-out images at which the network is evaluated at most, repeated ones too.
_MAX_REPEATS = 4  # Of each, at other noise levels, where there are fewer.
_MAX_CLASSES = 32  # Of more, each would have too few images to tell anything.


class Row(NamedTuple):
    """Two items, a held-out one and one trained on, that get the same noise."""

    shape: tuple[int, int, int]  # Of what the network denoises: C, h, w.
    held_out: Any  # The key of each in its dataset.
    trained: Any
    group: str | None = None  # The class of the held-out item.


@dataclasses.dataclass(frozen=True)
class Examples:
    """Which items are compared; a row of a set-conditioned model is a set.

    Attributes:
        held_out, trained: Datasets of the two sides, as they are: nothing about them is random.
        rows: R of them; rows of one shape lie together.
    """

    held_out: Any
    trained: Any
    rows: tuple[Row, ...]

    @property
    def groups(self) -> dict[str, np.ndarray]:
        """Which rows are of each class, bool [R]; empty for more than 32 classes, or without."""
        names = sorted({row.group for row in self.rows} - {None})
        if len(names) > _MAX_CLASSES:
            return {}
        return {name: np.array([row.group == name for row in self.rows]) for name in names}

    @property
    def num_items(self) -> int:
        """Number of different held-out items."""
        return len({row.held_out for row in self.rows})

    def by_item(self, losses: np.ndarray) -> np.ndarray:
        """Return the mean loss of each held-out item, [I], of those of the rows [R].

        Unlike repeated rows of one image, items vary independently.
        """
        _, item = np.unique([row.held_out for row in self.rows], return_inverse=True)
        return np.bincount(item, losses) / np.bincount(item)

    def batches(self, size: int) -> Iterator[range]:
        """Yield the rows of one batch after another, each of one shape and at most ``size``."""
        first = 0
        for row in range(1, len(self.rows) + 1):
            is_end = row == len(self.rows) or self.rows[row].shape != self.rows[first].shape
            if is_end or row - first == size:
                yield range(first, row)
                first = row


def num_repeats(num_held_out: int) -> int:
    """Return how often each of so many held-out images is evaluated, where there are few."""
    return min(max(NUM_IMAGES // num_held_out, 1), _MAX_REPEATS)


def spread(num: int, length: int) -> list[int]:
    """Return ``num`` positions, spread evenly over ``range(length)``; repeated if there are fewer.

    A repeated one comes again after all others.
    """
    return np.resize(evenly_spaced(num, length), num).tolist()


def examples_of_images(
    held_out: Any, trained: Any, shape: tuple[int, int, int], num_trained: int
) -> Examples:
    """Return the examples of two datasets of images of one shape, the first ``num_trained`` of one.

    Classes are those of ``held_out.labels`` [N], if there are any.
    """
    num_held_out = held_out.num_images
    num = min(num_held_out, NUM_IMAGES) * num_repeats(num_held_out)
    own, other = spread(num, num_held_out), spread(num, num_trained)
    names: Sequence[str | None] = [None] * num
    if held_out.labels is not None:
        names = [held_out.class_names[label] for label in held_out.labels[own]]
    keys = zip(own, other, names, strict=True)
    return Examples(held_out, trained, tuple(Row(shape, *key) for key in keys))
