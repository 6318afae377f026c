"""Grids of samples made by all ranks together."""

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
    """Write a grid of samples with fixed seeds, made by all ranks together. Collective.

    ``class_counts`` are the shares of a conditional model's classes, whose names are the titles.
    Returns the samples, uint8 [N, C, H, W], on rank 0.
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
    """Write the supports above samples of each, ``num_images`` in all. Collective.

    Returns the samples, uint8 [N, C, H, W], on rank 0.
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
    """Return the images of ``seeds`` in order, on the CPU; None but on rank 0. Collective."""
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
