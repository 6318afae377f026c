"""Held-out images with their conditions, and ways to vary the conditions."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from data.images.dataset import Cond
from training.family import Codec


@dataclasses.dataclass(frozen=True)
class Condition:
    """One condition of a model, such as its text."""

    name: str
    entries: tuple[str, ...]  # Its entries in ``cond``.
    drop: tuple[int, ...] | None = None  # Columns of a mask [N, K] that drop it; None: mask is [N].
    reason: str | None = None  # Why it cannot be dropped; None if it can.
    note: str | None = None  # A note on the results of dropping it.


@dataclasses.dataclass(frozen=True)
class Group:
    """Images of one size, as the network denoises them, with their conditions."""

    inputs: torch.Tensor  # [N, C, H, W], float32
    cond: Cond
    kinds: np.ndarray  # [N]; a condition is exchanged only for one of another kind.
    # Lengths of the parts of the context that layers attend to, by name; empty without any.
    segments: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Panel:
    """Images with their conditions, from held-out data if there are any."""

    name: str
    conditions: tuple[Condition, ...]
    groups: tuple[Group, ...]

    @property
    def num_images(self) -> int:
        """Number of images in all groups."""
        return sum(len(group.inputs) for group in self.groups)


def prepared(
    codec: Codec, batch: torch.Tensor, cond: Cond, device: torch.device
) -> tuple[torch.Tensor, Cond]:
    """Return a stored batch and its conditions as the network takes them, on ``device``.

    Of latents, the mean of the posterior is taken, because a draw would be another source of
    variation.
    """
    cond = {name: value.to(device) for name, value in cond.items() if name != "size"}
    return codec.encode(batch.to(device), cond, None)


def in_turn(labels: np.ndarray, num: int) -> np.ndarray:
    """Return up to ``num`` indices that cycle through the classes of ``labels`` [N], int64."""
    places = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        places[rows] = np.arange(len(rows))
    return np.lexsort((labels, places))[:num]


def derangement(kinds: Sequence[int] | np.ndarray, change: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the row whose condition each of N rows gets, and which get one of another kind, bool.

    ``shuffled`` shifts the rows, sorted by kind, cyclically; ``swapped`` exchanges pairs of rows.
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
