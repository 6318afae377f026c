"""benchmark.py metrics: the time that detectors and distances take."""

import functools

import click
import torch

from benchmarks.distances import benchmark_distances
from benchmarks.kinds import dataset_of, describe_items, run_on_pixels
from benchmarks.measure import (
    TIME_COLUMNS,
    describe_device,
    interleave,
    median_wall,
    spent_by,
    table,
    time_cells,
)
from benchmarks.options import MetricsOptions, listed
from data.images.dataset import ImageDataset
from data.loader import iterate_images
from metrics.detectors import DetectorOutput
from metrics.inception import Inception, InceptionDetector
from metrics.statistics import collect_outputs
from torch_utils import distributed

_PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}


def measure(options: MetricsOptions) -> None:
    """Print the tables of ``benchmark.py metrics``."""
    listed("--precision", options.precision, _PRECISIONS)
    device = distributed.init()
    click.echo(describe_device(device))
    config = run_on_pixels(options.preset)
    with dataset_of(config, options.data) as dataset:
        click.echo(f"{options.images} of {describe_items(config, dataset)}, batch {options.batch}")
        click.echo(benchmark_extraction(dataset, device, options))
    rounds = min(options.rounds, 3)
    click.echo(benchmark_distances(options.features, options.vectors, rounds))


def benchmark_extraction(
    dataset: ImageDataset, device: torch.device, options: MetricsOptions
) -> str:
    """Return a table of the images/s of decoding, of Inception, and of both together."""
    torch.manual_seed(0)
    batch, num_images = options.batch, options.images
    indices = [index % len(dataset) for index in range(num_images)]
    ready = dataset.__getitems__(indices[:batch])[0].to(device)
    batches = functools.partial(iterate_images, dataset, batch_size=batch, indices=indices)
    output = DetectorOutput("inception")

    def decode() -> None:
        for _ in batches(label="Decoding"):
            pass

    def alone(detector: InceptionDetector) -> None:
        for start in range(0, num_images, batch):
            detector(ready[: min(batch, num_images - start)])

    def from_files(detector: InceptionDetector) -> None:
        found = {"inception": detector}
        collect_outputs(found, {output: ("moments",)}, batches(label="Extracting"), device)

    calls = {"decoding alone": decode}
    for name in listed("--precision", options.precision, _PRECISIONS):
        precision = _PRECISIONS[name]
        detector = InceptionDetector(Inception(), device, precision=precision)
        calls[f"detector alone, {precision}"] = functools.partial(alone, detector)
        calls[f"from files, {precision}"] = functools.partial(from_files, detector)
    turns = {name: functools.partial(spent_by, call, device) for name, call in calls.items()}
    rows = [["", *TIME_COLUMNS, "images/s"]]
    for name, spent in interleave(turns, options.rounds, warm_up=True).items():
        rows.append([name, *time_cells(spent), f"{num_images / median_wall(spent):.1f}"])
    return table(rows)
