"""What loading costs, beside bare decoding of images and bare reading of latents."""

import statistics
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.kinds import bare_reading
from benchmarks.measure import interleave, median_ratio, seconds_of, table
from benchmarks.options import LoadingOptions
from data.loader import make_loader
from data.samplers import PositionSampler
from training.inputs import TrainingData

# Batches that a loader process makes ahead, and more.
_NUM_AHEAD = 5
_CPU = torch.device("cpu")


def endless_batches(
    dataset: TrainingData,
    num_indices: int | None,
    *,
    batch: int,
    num_workers: int,
    device: torch.device = _CPU,
    seed: int = 0,
    start: int = 0,
) -> Iterator:
    """Return the batches that a loader yields to a single rank, in the order of training."""
    sampler = PositionSampler(
        num_indices,
        seed=seed,
        start_nimg=start,
        batch_size=batch,
        batch_gpu=batch,
        rank=0,
        world_size=1,
    )
    return iter(make_loader(dataset, sampler, num_workers=num_workers, device=device))


def benchmark_data(
    dataset: TrainingData, options: LoadingOptions, *, workers: tuple[int, ...]
) -> str:
    """Return the rates of loading, and of the least that it takes."""
    batch, num_batches = options.batch, options.batches
    bare, read_alone = bare_reading(dataset, batch * num_batches)
    turns = {bare: lambda: seconds_of(read_alone, _CPU)}
    for num in workers:
        name = f"loader, {num or 'no'} worker{'s' if num != 1 else ''}"
        turns[name] = _loading_turn(dataset, batch, num, num_batches)
    times = interleave(turns, options.rounds, warm_up=True)
    rows = [["", "images/s", f"of {bare}"]]
    for name, seconds in times.items():
        share = median_ratio(times[bare], seconds)
        rate = batch * num_batches / statistics.median(seconds)
        rows.append([name, f"{rate:.0f}", f"{100 * share:.0f}%"])
    return table(rows)


def _loading_turn(
    dataset: TrainingData, batch: int, num_workers: int, num_batches: int
) -> Callable[[], float]:
    batches = endless_batches(dataset, len(dataset), batch=batch, num_workers=num_workers)

    def load(num_batches: int) -> None:
        for _ in range(num_batches):
            next(batches)

    def turn() -> float:
        load(_NUM_AHEAD * num_workers)  # Made ahead before this turn.
        seconds = seconds_of(lambda: load(num_batches), _CPU)
        if num_workers:
            # Let the workers come to rest before the others have their turns.
            time.sleep(_NUM_AHEAD / num_batches * seconds)
        return seconds

    return turn
