"""benchmark.py metrics: what scoring costs."""

import dataclasses
import functools

import click
import torch

from benchmarks.distances import benchmark_distances
from benchmarks.kinds import (
    BATCH_HELP,
    DataOptions,
    dataset_of,
    describe_items,
    listed,
    run_on_pixels,
)
from benchmarks.measure import (
    TIME_COLUMNS,
    describe_device,
    interleave,
    median_wall,
    spent_by,
    table,
    time_cells,
)
from data.images.dataset import ImageDataset
from data.loader import iterate_images
from dnnlib.click_options import param, takes
from metrics.detectors import DetectorOutput
from metrics.inception import Inception, InceptionDetector
from metrics.statistics import collect_outputs
from torch_utils import distributed

_PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsOptions(DataOptions):
    precision: str = param(
        default="fp32,bf16", help="Arithmetic of the detector, separated by commas."
    )
    batch: int = param(default=64, min=1, max=1_000_000, help=BATCH_HELP)
    images: int = param(default=512, min=1, max=10_000_000, help="Number of images in a turn.")
    features: int = param(
        default=2048, min=2, max=16_384, help="Dimensions of the vectors that distances are of."
    )
    vectors: int = param(
        default=4000, min=10, max=1_000_000, help="Number of vectors of KID, precision and recall."
    )


@click.command()
@takes(MetricsOptions)
def command(options: MetricsOptions) -> None:
    """Time the extraction of Inception outputs, and distances against other ways to them.

    "Detector alone" sees images that are in memory already; "from files" decodes them as well, and
    should be as fast as the slower of the two. Weights are random.
    """
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
    """Return the rates at which Inception outputs are computed."""
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
