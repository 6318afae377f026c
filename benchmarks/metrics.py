"""benchmark.py metrics: what scoring costs."""

import dataclasses
import functools
import statistics

import click
import numpy as np
import torch

from benchmarks.kinds import BATCH_HELP, DataOptions, dataset_of, describe_items, run_on_pixels
from benchmarks.measure import describe_device, interleave, median_ratio, seconds_of, table
from data.images.dataset import ImageDataset
from data.loader import iterate_images
from dnnlib.click_options import param, takes
from metrics.detectors import DetectorOutput
from metrics.frechet import frechet_distance
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
        default=2048, min=2, max=16_384, help="Dimensions of the Fréchet distance."
    )


@click.command()
@takes(MetricsOptions)
def command(options: MetricsOptions) -> None:
    """Time the extraction of Inception outputs, and the Fréchet distance against sqrtm.

    "Detector alone" sees images that are in memory already; "from files" decodes them as well, and
    should be as fast as the slower of the two. Weights are random.
    """
    unknown = set(options.precision.split(",")) - set(_PRECISIONS)
    if unknown:
        accepted = ", ".join(_PRECISIONS)
        raise click.UsageError(f"--precision: got {unknown.pop()!r}; accepted: {accepted}.")
    device = distributed.init()
    click.echo(describe_device(device))
    config = run_on_pixels(options.preset)
    with dataset_of(config, options.data) as dataset:
        click.echo(f"{options.images} of {describe_items(config, dataset)}, batch {options.batch}")
        click.echo(benchmark_extraction(dataset, device, options))
    click.echo(benchmark_frechet(options.features, min(options.rounds, 3)))


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
    for name in options.precision.split(","):
        precision = _PRECISIONS[name]
        detector = InceptionDetector(Inception(), device, precision=precision)
        calls[f"detector alone, {precision}"] = functools.partial(alone, detector)
        calls[f"from files, {precision}"] = functools.partial(from_files, detector)
    turns = {name: functools.partial(seconds_of, call, device) for name, call in calls.items()}
    rows = [["", "images/s"]]
    for name, seconds in interleave(turns, options.rounds, warm_up=True).items():
        rows.append([name, f"{num_images / statistics.median(seconds):.1f}"])
    return table(rows)


def benchmark_frechet(num_features: int, num_rounds: int) -> str:
    """Return the time of the Fréchet distance beside that with ``scipy.linalg.sqrtm``.

    The covariances are those of twice as many random vectors as they have dimensions, with a
    decaying spectrum, as a detector's have.
    """
    try:
        from scipy.linalg import sqrtm
    except ModuleNotFoundError:
        needed = "This comparison needs SciPy, which is not installed: pip install scipy."
        raise ValueError(needed) from None
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((num_features, num_features)))[0]
    scales = np.arange(1, num_features + 1) ** -0.5

    def moments(shift: float, stretch: float) -> tuple[np.ndarray, np.ndarray]:
        samples = rng.standard_normal((2 * num_features, num_features)) * scales**stretch
        samples = samples @ basis.T + shift * rng.standard_normal(num_features)
        return samples.mean(0), np.cov(samples, rowvar=False)

    (mu1, sigma1), (mu2, sigma2) = moments(0.0, 1.0), moments(0.02, 1.1)

    def general() -> float:
        trace = np.trace(sigma1 + sigma2 - 2 * np.real(sqrtm(sigma1 @ sigma2)))
        return float(np.sum((mu1 - mu2) ** 2) + trace)

    functions = {
        "this code": lambda: frechet_distance(mu1, sigma1, mu2, sigma2),
        "scipy.linalg.sqrtm": general,
    }
    values: dict[str, float] = {}

    def turn(name: str) -> float:
        return seconds_of(lambda: values.update({name: functions[name]()}), torch.device("cpu"))

    times = interleave({name: functools.partial(turn, name) for name in functions}, num_rounds)
    rows = [["", "s", "distance"]]
    for name, seconds in times.items():
        rows.append([name, f"{statistics.median(seconds):.2f}", f"{values[name]:.6f}"])
    own, other = functions
    return (
        f"{table(rows)}\nThe Fréchet distance at {num_features} dimensions is "
        f"{median_ratio(times[other], times[own]):.1f} times as fast as with sqrtm; the two differ "
        f"by {abs(values[own] - values[other]):.1e}."
    )
