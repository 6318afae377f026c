"""benchmark.py data: what loading costs, beside bare decoding and bare reading of latents."""

import time
from collections.abc import Callable

import click
import torch

import families
from benchmarks.kinds import bare_reading, dataset_of, describe_items
from benchmarks.measure import (
    TIME_COLUMNS,
    Spent,
    describe_device,
    interleave,
    median_ratio,
    median_wall,
    spent_by,
    table,
    time_cells,
    walls,
)
from benchmarks.options import LoadingOptions, measured_preset
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
        turns = {bare: lambda: spent_by(read_alone, _CPU)}
        for num, name in enumerate(("no workers", "1 worker", "2 workers")):
            turns[f"loader, {name}"] = _loading_turn(config, dataset, num, options.batches)
        times = interleave(turns, options.rounds, warm_up=True)
    rows = [["", *TIME_COLUMNS, "images/s", f"of {bare}"]]
    for name, turns in times.items():
        share = median_ratio(walls(times[bare]), walls(turns))
        rate = num_images / median_wall(turns)
        rows.append([name, *time_cells(turns), f"{rate:.0f}", f"{share:.0%}"])
    click.echo(table(rows))


def _loading_turn(
    config: RunConfig, dataset: TrainingData, num_workers: int, num_batches: int
) -> Callable[[], Spent]:
    part = Part(rank=0, world_size=1, batch_gpu=config.training.batch)
    sampler = families.of(config).steps(config, dataset, 0, part).sampler
    batches = iter(make_loader(dataset, sampler, num_workers=num_workers, device=_CPU))

    def load(num_batches: int) -> None:
        for _ in range(num_batches):
            next(batches)

    def turn() -> Spent:
        load(_NUM_AHEAD * num_workers)  # Made ahead before this turn.
        spent = spent_by(lambda: load(num_batches), _CPU)
        if num_workers:
            # Let the workers come to rest before the others have their turns.
            time.sleep(_NUM_AHEAD / num_batches * spent.wall)
        return spent

    return turn
