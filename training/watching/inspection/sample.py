"""The sample of a run's data that is inspected before the first step."""

import dataclasses

import numpy as np
import torch

from data.images.dataset import Cond

# Of the first sample, which shows most relations, and of the second, which confirms that one lacks.
NUM_ITEMS = (200, 512)
_BYTES = 16 << 20  # What a sample may take, decoded; of large images there are fewer.
_NUM_CLASSES = 10
_SEED = 99


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Some items of one size, on the CPU.

    Attributes:
        stored: What their look is taken from, [N, C, H, W]: pixels or latents as they are stored.
        x: What the network is to denoise, float32 [M, c, h, w], of the first M of them.
        cond: Their conditions, encoded.
        groups: The class of each, or the number of its set, int64 [N]; None without.
        grid: Rows and columns of its patch features, if they are there.
    """

    stored: torch.Tensor
    x: torch.Tensor
    cond: Cond
    groups: torch.Tensor | None = None
    grid: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """What a family shows of its data, by a fixed draw.

    Attributes:
        batches: The items, one batch for each size.
        groups_name: What ``groups`` are: ``labels`` or ``sets``.
        std: Standard deviation that the model expects of ``x``; None where any will do.
        std_from: What that comes from: ``sigma_data``, or ``latents`` of unit variance.
        visual: Names of the conditions that are seen in the image, and normalised.
    """

    batches: tuple[Batch, ...]
    groups_name: str = "labels"
    std: float | None = None
    std_from: str = "sigma_data"
    visual: tuple[str, ...] = ()


def num_items(bytes_each: int, number: int) -> int:
    """Return how many items of a size sample 0 or 1 has: some hundreds, or what 16 MB hold."""
    return min(NUM_ITEMS[number], max(_BYTES // max(bytes_each, 1), 2))


def random_rows(num: int, length: int, *seed: int) -> np.ndarray:
    """Return up to ``num`` of ``range(length)``, random by ``seed``, int64."""
    return _generator(seed).permutation(length)[:num]


def rows_of_few_classes(labels: np.ndarray, num: int, *seed: int) -> np.ndarray:
    """Return up to ``num`` rows of up to ten classes, in random order, int64.

    With few classes each has the many images that show what they have in common. Classes of one
    image are left out, unless there are no others.
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
