"""benchmark.py data: the speed of the loader against bare decoding or copying of the same items."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch.utils.data import DataLoader, Dataset

import families
from benchmarks import kinds
from benchmarks.kinds import (
    bare_reading,
    dataset_of,
    describe_items,
    plain_dataset,
)
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

# More batches than a loader process prepares ahead.
_NUM_AHEAD = 5
# Preset, resolution (None: the preset's), number of images, and the goal for the speed relative to
# plain loading.
_BESIDE_PLAIN = (
    ("cifar10", 32, 2048, 2.0),
    ("cifar10", 256, 256, 1.2),
    ("imagenet256", None, 2048, 9.9),
)
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
    if options.data is None:
        click.echo(f"\n{_beside_plain(options)}")


def _beside_plain(options: LoadingOptions) -> str:
    """Return a table that compares loading with a plain Dataset and DataLoader, without workers."""
    rows = [["", "plain, images/s", "this code, images/s", "speed, plain = 1", "goal"]]
    for preset, resolution, num_images, goal in _BESIDE_PLAIN:
        run = measured_preset(preset).run
        if resolution is not None:
            run = dataclasses.replace(
                run, model=dataclasses.replace(run.model, resolution=resolution)
            )
        num_images = min(num_images, kinds.NUM_SYNTHETIC_IMAGES)
        batch = min(options.batch or 64, num_images)
        run = run.changed("data", hflip=False).changed("training", batch=batch)
        with dataset_of(run, None, num_images) as dataset, tempfile.TemporaryDirectory() as folder:
            plain = plain_dataset(run, dataset, Path(folder))
            turns = dict(
                plain=_turn(_endless(plain, batch), 0, options.batches),
                own=_loading_turn(run, dataset, 0, options.batches),
            )
            times = interleave(turns, options.rounds, warm_up=True)
            name = describe_items(run, dataset)
        rates = [f"{batch * options.batches / median_wall(turn):.0f}" for turn in times.values()]
        ratio = median_ratio(walls(times["plain"]), walls(times["own"]))
        rows.append([name, *rates, f"{ratio:.2f}", f"{goal:.1f}"])
    return table(rows)


def _endless(dataset: Dataset, batch: int) -> Iterator[Any]:
    while True:
        yield from DataLoader(dataset, batch_size=batch, shuffle=True, drop_last=True)


def _loading_turn(
    config: RunConfig, dataset: TrainingData, num_workers: int, num_batches: int
) -> Callable[[], Spent]:
    part = Part(rank=0, world_size=1, batch_gpu=config.training.batch)
    sampler = families.of(config).steps(config, dataset, 0, part).sampler
    batches = iter(make_loader(dataset, sampler, num_workers=num_workers, device=_CPU))
    return _turn(batches, num_workers, num_batches)


def _turn(batches: Iterator[Any], num_workers: int, num_batches: int) -> Callable[[], Spent]:
    """Return a function that times ``num_batches`` batches of an endless iterator."""

    def load(num_batches: int) -> None:
        for _ in range(num_batches):
            next(batches)

    def turn() -> Spent:
        load(_NUM_AHEAD * num_workers)  # Discard batches that were prepared before this turn.
        spent = spent_by(lambda: load(num_batches), _CPU)
        if num_workers:
            # Wait until the workers' queues are full, so that they do not disturb the next turn.
            time.sleep(_NUM_AHEAD / num_batches * spent.wall)
        return spent

    return turn
