"""Held-out images with their conditions, and ways to vary the conditions."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from data.images.dataset import Cond
from training.family import Codec


@dataclasses.dataclass(frozen=True)
class Condition:
    """One thing that a model is given."""

    name: str
    entries: tuple[str, ...]  # Of ``cond``.
    drop: tuple[int, ...] | None = None  # Columns of ``drop`` that replace it, if that has columns.
    reason: str | None = None  # Why it cannot be dropped; None if it can.
    note: str | None = None  # What to know of its being dropped.


@dataclasses.dataclass(frozen=True)
class Group:
    """Images of one size: what a network denoises, and its conditions."""

    inputs: torch.Tensor  # [N, C, H, W].
    cond: Cond
    kinds: np.ndarray  # [N]; no condition is varied to one of its own kind.
    # Lengths of the parts of a context that layers attend to, by name; empty without any.
    segments: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Panel:
    """Images that a model was not trained on, if there are any, with their conditions."""

    name: str
    conditions: tuple[Condition, ...]
    groups: tuple[Group, ...]

    @property
    def num_images(self) -> int:
        """Number of images, of all groups."""
        return sum(len(group.inputs) for group in self.groups)


def prepared(
    codec: Codec, batch: torch.Tensor, cond: Cond, device: torch.device
) -> tuple[torch.Tensor, Cond]:
    """Return a stored batch and its conditions as the network takes them, on ``device``.

    Latents are their means: a draw would be one more thing that varies.
    """
    cond = {name: value.to(device) for name, value in cond.items() if name != "size"}
    return codec.encode(batch.to(device), cond, None)


def in_turn(labels: np.ndarray, num: int) -> np.ndarray:
    """Return up to ``num`` indices, one of each class after the other."""
    places = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        places[rows] = np.arange(len(rows))
    return np.lexsort((labels, places))[:num]


def derangement(kinds: Sequence[int] | np.ndarray, change: str) -> tuple[np.ndarray, np.ndarray]:
    """Return whose condition each row gets, and which rows get one of another kind, bool.

    ``shuffled`` goes round through all rows; ``swapped`` exchanges pairs.
    """
    kinds = np.asarray(kinds)
    num = len(kinds)
    order = np.argsort(kinds, kind="stable")
    source = np.arange(num)
    if change == "shuffled":
        shift = int(np.unique(kinds, return_counts=True)[1].max())
        source[order] = np.roll(order, -shift)
    else:
        half = num // 2
        first, second = order[:half], order[num - half :]
        source[first], source[second] = second, first
    return source, kinds[source] != kinds
