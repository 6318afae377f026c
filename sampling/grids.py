"""Grids of samples that all ranks generate together."""

from collections.abc import Sequence
from pathlib import Path

import torch

from sampling.images import ImageGenerator, describe_sampling, labels_like_data
from sampling.supports import SupportGenerator, episodes_picture
from torch_utils import distributed
from torch_utils.pictures import class_titles, image_grid, save_image

GRID_SEEDS = 64


def save_fakes(
    generator: ImageGenerator,
    class_counts: Sequence[int],
    path: Path,
    batch: int,
    num_images: int = GRID_SEEDS,
    class_names: Sequence[str] = (),
) -> torch.Tensor | None:
    """Write a grid of samples from the seeds 0 to ``num_images`` - 1. Collective.

    Args:
        class_counts: Images per class of the training data, whose proportions the samples follow;
            empty for an unconditional model.
        batch: Images that each rank generates at once.
        class_names: Names of the classes, for the titles.

    Returns the samples [N, C, H, W], uint8, on rank 0, and None elsewhere.
    """
    labels = None
    if class_counts:
        order = labels_like_data(class_counts)
        labels = sorted(int(order[seed % len(order)]) for seed in range(num_images))
    images = generate_together(generator, range(num_images), labels, batch)
    if images is not None:
        shown = [class_names[label] for label in labels or ()] if class_names else []
        heading = describe_sampling(generator.protocol())
        save_image(image_grid(images, 8, class_titles(shown, 8, heading)), path)
    return images


def save_episodes(
    generator: SupportGenerator, num_images: int, path: Path, batch: int
) -> torch.Tensor | None:
    """Write a picture of each support above its samples, about ``num_images`` in all. Collective.

    Returns the samples [N, C, H, W], uint8, in the order of the supports, on rank 0, and None
    elsewhere.
    """
    episodes = generator.episodes
    each = max(num_images // len(episodes), 1)
    labels = [row for row in range(len(episodes)) for _ in range(each)]
    images = generate_together(generator, range(len(labels)), labels, batch)
    if images is not None:
        samples = images.unflatten(0, (len(episodes), each))
        heading = describe_sampling(generator.protocol())
        save_image(episodes_picture(episodes, samples, heading=heading), path)
    return images


def generate_together(
    generator: ImageGenerator, seeds: Sequence[int], labels: Sequence[int] | None, batch: int
) -> torch.Tensor | None:
    """Return the images [N, C, H, W], uint8, of ``seeds`` in order, on rank 0's CPU. Collective.

    ``labels`` has one class index per seed, or is None. Each rank generates ``batch`` images at
    once. Other ranks get None.
    """
    mine = range(distributed.rank(), len(seeds), distributed.world_size())
    made = []
    with distributed.together():
        for start in range(0, len(mine), batch):
            rows = list(mine[start : start + batch])
            own = None if labels is None else [labels[row] for row in rows]
            images = generator.generate([seeds[row] for row in rows], own)
            made.extend(zip(rows, images.cpu(), strict=True))
    gathered = distributed.gather_objects(made)
    if not distributed.is_main():
        return None
    images = dict(pair for part in gathered for pair in part)
    return torch.stack([images[row] for row in range(len(seeds))])
