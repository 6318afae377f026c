"""What loading costs, beside bare decoding of images and bare reading of latents."""

import functools
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.measure import (
    bare_decode,
    interleave,
    median_ratio,
    seconds_of,
    table,
)
from data.images.dataset import ImageDataset
from data.latents.dataset import LatentDataset
from data.loader import make_loader
from data.samplers import PositionSampler

# Batches that a loader process makes ahead, and more.
_NUM_AHEAD = 5


def benchmark_data(
    dataset: ImageDataset | LatentDataset,
    *,
    batch: int,
    workers: tuple[int, ...],
    num_batches: int,
    num_rounds: int,
) -> str:
    """Return the rates of loading, and of the least that it takes.

    That is decoding the files, already in memory, with Pillow; or, for latents, copying each out of
    its memory-mapped file.
    """
    num_images = batch * num_batches
    if isinstance(dataset, LatentDataset):
        bare, read_alone = "memory map alone", _bare_reading(dataset, num_images)
    else:
        bare = "Pillow alone"
        files = [dataset.archive.read(index % len(dataset)) for index in range(num_images)]
        read_alone = functools.partial(bare_decode, files)

    def make_turn(num_workers: int) -> Callable[[], float]:
        sampler = PositionSampler(
            len(dataset),
            seed=0,
            start_nimg=0,
            batch_size=batch,
            batch_gpu=batch,
            rank=0,
            world_size=1,
        )
        cpu = torch.device("cpu")
        batches = iter(make_loader(dataset, sampler, num_workers=num_workers, device=cpu))

        def load(num_batches: int) -> None:
            for _ in range(num_batches):
                next(batches)

        def turn() -> float:
            load(_NUM_AHEAD * num_workers)  # Made ahead before this turn.
            seconds = seconds_of(lambda: load(num_batches), cpu)
            if num_workers:
                # Let the workers come to rest before the others have their turns.
                time.sleep(_NUM_AHEAD / num_batches * seconds)
            return seconds

        return turn

    turns = {bare: lambda: seconds_of(read_alone, torch.device("cpu"))}
    for num in workers:
        turns[f"loader, {num or 'no'} worker{'s' if num != 1 else ''}"] = make_turn(num)
    for turn in turns.values():
        turn()
    times = interleave(turns, num_rounds)
    rows = [["", "images/s", f"of {bare}"]]
    for name, seconds in times.items():
        share = median_ratio(times[bare], seconds)
        rate = num_images / statistics.median(seconds)
        rows.append([name, f"{rate:.0f}", f"{100 * share:.0f}%"])
    return table(rows)


def _bare_reading(dataset: LatentDataset, num_images: int) -> Callable[[], None]:
    shards = [
        np.load(dataset.path / shard["file"], mmap_mode="r") for shard in dataset.record.shards
    ]
    places = [(shard, row) for shard, array in enumerate(shards) for row in range(len(array))]

    def read() -> None:
        for index in range(num_images):
            shard, row = places[index % len(places)]
            shards[shard][row, 0].copy()

    return read
