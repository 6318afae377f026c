"""What loading images costs, beside bare decoding."""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.measure import (
    bare_decode,
    interleave,
    median_ratio,
    seconds_of,
    table,
)
from training.dataset import ImageDataset
from training.sampler import PositionSampler, make_loader

# Batches that a loader process makes ahead, and more.
_NUM_AHEAD = 5


def benchmark_data(
    dataset: ImageDataset,
    *,
    batch: int,
    workers: tuple[int, ...],
    num_batches: int,
    num_rounds: int,
) -> str:
    """Return the rates of loading and of decoding the files, already in memory, with Pillow."""
    num_images = batch * num_batches
    files = [dataset.archive.read(index % len(dataset)) for index in range(num_images)]

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

    turns = {"Pillow alone": lambda: seconds_of(lambda: bare_decode(files), torch.device("cpu"))}
    for num in workers:
        turns[f"loader, {num or 'no'} worker{'s' if num != 1 else ''}"] = make_turn(num)
    for turn in turns.values():
        turn()
    times = interleave(turns, num_rounds)
    rows = [["", "images/s", "of Pillow alone"]]
    for name, seconds in times.items():
        share = median_ratio(times["Pillow alone"], seconds)
        rate = num_images / statistics.median(seconds)
        rows.append([name, f"{rate:.0f}", f"{100 * share:.0f}%"])
    return table(rows)
