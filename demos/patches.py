"""Checks on training images whether a feature-conditioned model uses its conditions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

import families
from data.features.dataset import FeatureDataset
from sampling.features import FeatureGenerator
from torch_utils import rng
from training.checkpoint import Snapshot

_NUM_DRAWS = 16


class PatchCheck(NamedTuple):
    """Mean squared errors [N] of pixels in [-1, 1], with own and with swapped patch features."""

    own: np.ndarray
    swapped: np.ndarray

    @property
    def share(self) -> float:
        """The share of images whose own patches give the smaller error."""
        return float((self.own < self.swapped).mean())


def other_of_bucket(dataset: FeatureDataset) -> list[int]:
    """Return for every item the index of the next one in its bucket, cyclically.

    Raises ValueError for a bucket with a single image.
    """
    others = []
    for first, count in zip(dataset.firsts[:-1].tolist(), dataset.counts, strict=True):
        if count < 2:
            raise ValueError(f"{dataset.path}: a bucket holds one image, which has no other.")
        others += [first + (row + 1) % count for row in range(count)]
    return others


def check_patches(
    generator: FeatureGenerator, dataset: FeatureDataset, num_repeats: int = 1
) -> PatchCheck:
    """Generate every image with its own patches and with another image's, all else being equal.

    Errors are measured against the image as the autoencoder decodes it, and averaged over
    ``num_repeats`` noise draws. Both versions of an image start from the same noise.
    """
    others = other_of_bucket(dataset)
    own, swapped = np.zeros(len(dataset)), np.zeros(len(dataset))
    for first, count in zip(dataset.firsts[:-1].tolist(), dataset.counts, strict=True):
        rows = range(first, first + count)
        latents, cond = dataset.__getitems__(rows)
        _, other = dataset.__getitems__([others[row] for row in rows])
        bucket = dataset.buckets[dataset.bucket_index(first)]
        wanted = generator.codec.pictures(latents)
        for repeat in range(num_repeats):
            seeds = [row + repeat * len(dataset) for row in rows]
            for errors, patches in ((own, cond["patches"]), (swapped, other["patches"])):
                made = generator.generate(seeds, {**cond, "patches": patches}, bucket)
                difference = (made.to(torch.float32) - wanted.to(torch.float32)) / 127.5
                error = difference.square().mean((1, 2, 3)).cpu().numpy()
                errors[first : first + count] += error / num_repeats
    return PatchCheck(own, swapped)


@torch.no_grad()
def mean_loss(
    snapshot: Snapshot,
    dataset: FeatureDataset,
    *,
    swapped: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> float:
    """Return the mean loss of a snapshot on a dataset, without dropping conditions.

    ``swapped`` names the conditions (text, cls, patches) that each image takes from another one in
    its bucket. Times and noise are the same in every call.
    """
    device = torch.device(device)
    all_given = dict(drop_all=0.0, text_only=0.0, visual_only=0.0)
    config = snapshot.config.changed("features", **all_given)
    family = families.of(config)
    codec = family.encoder_codec(config, dataset, device)
    objective = family.objective(config, snapshot.build(device), codec)
    others = other_of_bucket(dataset)
    total = 0.0
    for first, count in zip(dataset.firsts[:-1].tolist(), dataset.counts, strict=True):
        rows = range(first, first + count)
        # Read own and swapped conditions in one batch, so that texts are padded alike.
        latents, cond = dataset.__getitems__([*rows, *(others[row] for row in rows)])
        parts = {name: value[:count] for name, value in cond.items() if name != "size"}
        for name in (*swapped, *(["text_mask"] if "text" in swapped else [])):
            parts[name] = cond[name][count:]
        for index in range(_NUM_DRAWS):
            shape = tuple(latents.shape[1:])
            draws = objective.draw(rng.Step(rng.mix(0, first), index, count, shape, device))
            given = {**parts, "size": cond["size"]}
            batch = objective.prepare(latents[:count], given, draws, device)
            total += objective(*batch, draws).mean(dim=(1, 2, 3)).sum().item() / _NUM_DRAWS
    return total / len(dataset)
