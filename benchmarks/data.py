"""benchmark.py data: what loading costs, beside bare decoding and bare reading of latents."""

import statistics
import time
from collections.abc import Callable

import click
import torch

import families
from benchmarks.kinds import (
    bare_reading,
    dataset_of,
    describe_items,
    measured_preset,
)
from benchmarks.measure import describe_device, interleave, median_ratio, seconds_of, table
from benchmarks.options import LoadingOptions
from data.loader import make_loader
from training.config import RunConfig
from training.family import Part, TrainingData

# Batches that a loader process makes ahead, and more.
_NUM_AHEAD = 5
_CPU = torch.device("cpu")


def measure(options: LoadingOptions) -> None:
    """Print the table of ``benchmark.py data``."""
    config = measured_preset(options.preset).run
    batch = options.batch or config.training.batch
    config, num_images = config.changed("training", batch=batch), batch * options.batches
    with dataset_of(config, options.data) as dataset:
        click.echo(describe_device(_CPU))
        click.echo(f"{describe_items(config, dataset)}, batch {batch}")
        bare, read_alone = bare_reading(config, dataset, num_images)
        turns = {bare: lambda: seconds_of(read_alone, _CPU)}
        for num, name in enumerate(("no workers", "1 worker", "2 workers")):
            turns[f"loader, {name}"] = _loading_turn(config, dataset, num, options.batches)
        times = interleave(turns, options.rounds, warm_up=True)
    rows = [["", "images/s", f"of {bare}"]]
    for name, seconds in times.items():
        share = median_ratio(times[bare], seconds)
        rows.append([name, f"{num_images / statistics.median(seconds):.0f}", f"{share:.0%}"])
    click.echo(table(rows))


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
