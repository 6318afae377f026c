"""The sample of a run's data that is inspected before the first step."""

import dataclasses

import numpy as np
import torch

from data.images.dataset import Cond

# Items of the first sample, which shows most relations, and of the second, which confirms that
# there is none.
NUM_ITEMS = (200, 512)
_BYTES = 16 << 20  # Most bytes of a decoded sample, which has fewer items if they are large.
_NUM_CLASSES = 10
_SEED = 99


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Items of one size, on the CPU.

    Attributes:
        stored: The pixels or latents that are stored, [N, C, H, W], whose look is compared.
        x: What the network is to denoise, float32 [M, c, h, w], for the first M items.
        cond: Conditions of the items, encoded.
        groups: The class of each item, or the number of its set, int64 [N]; None without either.
        grid: Rows and columns of the patch features; None without any.
    """

    stored: torch.Tensor
    x: torch.Tensor
    cond: Cond
    groups: torch.Tensor | None = None
    grid: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Items of a run's data, in a draw that the seed fixes, and what the model expects of them.

    Attributes:
        batches: The items, one batch for each size.
        groups_name: What ``groups`` are: ``labels`` or ``sets``.
        std: Standard deviation that the model expects of ``x``; None if it expects none.
        std_from: Where ``std`` comes from: ``sigma_data``, or ``latents`` of unit variance.
        visual: Names of the conditions that are normalised features of the image.
    """

    batches: tuple[Batch, ...]
    groups_name: str = "labels"
    std: float | None = None
    std_from: str = "sigma_data"
    visual: tuple[str, ...] = ()


def num_items(bytes_each: int, number: int) -> int:
    """Return how many items of ``bytes_each`` sample 0 or 1 has: a few hundred, 16 MB at most."""
    return min(NUM_ITEMS[number], max(_BYTES // max(bytes_each, 1), 2))


def random_rows(num: int, length: int, *seed: int) -> np.ndarray:
    """Return up to ``num`` distinct numbers of ``range(length)``, random by ``seed``, int64."""
    return _generator(seed).permutation(length)[:num]


def rows_of_few_classes(labels: np.ndarray, num: int, *seed: int) -> np.ndarray:
    """Return up to ``num`` rows of up to ten classes, in random order, int64.

    Few classes leave each of them enough images to show what they have in common. Classes with a
    single image are left out, unless there are no others.
    """
    generator = _generator(seed)
    classes, counts = np.unique(labels, return_counts=True)
    several = classes[counts > 1] if (counts > 1).any() else classes
    chosen = generator.permutation(several)[:_NUM_CLASSES]
    each = -(-num // len(chosen))
    rows = [generator.permutation(np.flatnonzero(labels == label))[:each] for label in chosen]
    return generator.permutation(np.concatenate(rows))[:num]


def _generator(seed: tuple[int, ...]) -> np.random.Generator:
    return np.random.default_rng([_SEED, *(value % 2**64 for value in seed)])
