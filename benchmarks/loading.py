"""What loading costs, beside bare decoding of images and bare reading of latents."""

import statistics
import time
from collections.abc import Callable

import torch

import families
from benchmarks.kinds import bare_reading
from benchmarks.measure import interleave, median_ratio, seconds_of, table
from benchmarks.options import LoadingOptions
from data.loader import make_loader
from training.config import RunConfig
from training.family import Part, TrainingData

# Batches that a loader process makes ahead, and more.
_NUM_AHEAD = 5
_CPU = torch.device("cpu")


def benchmark_data(
    config: RunConfig, dataset: TrainingData, options: LoadingOptions, workers: tuple[int, ...]
) -> str:
    """Return the rates of loading, and of the least that it takes."""
    batch, num_batches = options.batch, options.batches
    bare, read_alone = bare_reading(config, dataset, batch * num_batches)
    turns = {bare: lambda: seconds_of(read_alone, _CPU)}
    for num in workers:
        name = f"loader, {num or 'no'} worker{'s' if num != 1 else ''}"
        turns[name] = _loading_turn(config, dataset, num, num_batches)
    times = interleave(turns, options.rounds, warm_up=True)
    rows = [["", "images/s", f"of {bare}"]]
    for name, seconds in times.items():
        share = median_ratio(times[bare], seconds)
        rate = batch * num_batches / statistics.median(seconds)
        rows.append([name, f"{rate:.0f}", f"{100 * share:.0f}%"])
    return table(rows)


def _loading_turn(
    config: RunConfig, dataset: TrainingData, num_workers: int, num_batches: int
) -> Callable[[], float]:
    part = Part(rank=0, world_size=1, batch_gpu=config.training.batch)
    sampler = families.of(config).steps(config, dataset, 0, part).sampler
    batches = iter(make_loader(dataset, sampler, num_workers=num_workers, device=_CPU))

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
