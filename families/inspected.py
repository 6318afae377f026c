"""The items of a run's data that are inspected before its first step."""

import itertools
from typing import Any

import torch

from data.images.dataset import Cond
from training.config import RunConfig
from training.family import Codec, Family, Part, TrainingData
from training.watching.inspection.sample import (
    NUM_ITEMS,
    Batch,
    num_items,
    random_rows,
    rows_of_few_classes,
)

_NUM_BUCKETS = 3  # Only the largest buckets are inspected.
_NUM_WITHOUT_PATCHES = 96  # Least number of images whose texts and CLS tokens are inspected.


def images_to_inspect(
    family: Family, run: RunConfig, data: TrainingData, number: int
) -> tuple[torch.Tensor, Cond]:
    """Return a few images as stored, uint8 [N, C, H, W] or latents, with their conditions.

    ``number`` is that of the inspection: 0, or 1 for a larger sample.
    """
    num, seed = NUM_ITEMS[number], (run.training.seed, number)
    if data.remote_bytes:
        # The images of the first steps, which have to be fetched anyway.
        whole = Part(rank=0, world_size=1, batch_gpu=run.training.batch)
        keys = itertools.chain.from_iterable(family.steps(run, data, 0, whole).sampler)
        rows = list(itertools.islice(keys, num))
    elif data.labels is None:
        rows = random_rows(num, data.num_images, *seed).tolist()
    else:
        rows = rows_of_few_classes(data.labels, num, *seed).tolist()
    rows = rows[: num_items(data.__getitems__(rows[:1])[0].nbytes, number)]
    if data.remote_bytes:
        data.prefetch(rows)
    return data.__getitems__(rows)


def features_to_inspect(
    run: RunConfig, data: Any, codec: Codec, device: torch.device, number: int
) -> tuple[Batch, ...]:
    """Return a few images from the largest buckets, most of them without patch features.

    ``number`` is that of the inspection: 0, or 1 for a larger sample.
    """
    batches, num = [], num_items(data.__getitems__([0])[1]["patches"].nbytes, number)
    # Texts and CLS tokens are small, so more of them are read if the data are on this machine.
    several = num if data.remote_bytes else max(num, _NUM_WITHOUT_PATCHES)
    order = sorted(range(len(data.counts)), key=lambda bucket: -data.counts[bucket])
    for bucket in order[:_NUM_BUCKETS]:
        count, seed = data.counts[bucket], (run.training.seed, number, bucket)
        chosen = random_rows(max(several * count // len(data), 2), count, *seed)
        rows = (chosen + data.firsts[bucket]).tolist()
        num_whole = max(num * count // len(data), 2)
        if data.remote_bytes:
            data.prefetch(rows)
        for part, with_patches in ((rows[:num_whole], True), (rows[num_whole:], False)):
            if not part:
                continue
            latents, cond = data.__getitems__(part, with_patches=with_patches)
            given = {name: value.to(device) for name, value in cond.items() if name != "size"}
            x, given = codec.encode(latents.to(device), given, None)
            given = {name: value.cpu() for name, value in given.items()}
            is_used = with_patches and run.model.use_dino_patches
            grid = data.patch_grid(bucket) if is_used else None
            batches.append(Batch(stored=latents, x=x.cpu(), cond=given, grid=grid))
    return tuple(batches)
