"""What scoring costs: extraction of outputs, and the Fréchet distance beside ``sqrtm``."""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.measure import interleave, median_ratio, seconds_of, table
from benchmarks.options import MetricsOptions
from data.images.dataset import ImageDataset
from data.loader import iterate_images
from metrics.detectors import DetectorOutput
from metrics.frechet import frechet_distance
from metrics.inception import Inception, InceptionDetector
from metrics.statistics import collect_outputs

_PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}


def benchmark_extraction(
    dataset: ImageDataset, device: torch.device, options: MetricsOptions
) -> str:
    """Return the rates at which Inception outputs are computed, with random weights.

    "Detector alone" sees images that are in memory already; "from files" decodes them as well, and
    should be as fast as the slower of the two.
    """
    torch.manual_seed(0)
    batch, num_images = options.batch, options.images
    indices = [index % len(dataset) for index in range(num_images)]
    ready, _ = dataset.__getitems__(indices[:batch])
    ready = ready.to(device)
    turns: dict[str, Callable[[], float]] = {}

    def decode() -> None:
        for _ in iterate_images(dataset, batch_size=batch, indices=indices, label="Decoding"):
            pass

    turns["decoding alone"] = lambda: seconds_of(decode, device)
    output = DetectorOutput("inception")
    for name in options.precision.split(","):
        precision = _PRECISIONS[name]
        detector = InceptionDetector(Inception(), device, precision=precision)

        def alone(detector: InceptionDetector = detector) -> None:
            for start in range(0, num_images, batch):
                detector(ready[: min(batch, num_images - start)])

        def from_files(detector: InceptionDetector = detector) -> None:
            batches = iterate_images(dataset, batch_size=batch, indices=indices, label="Extracting")
            collect_outputs({"inception": detector}, {output: ("moments",)}, batches, device)

        turns[f"detector alone, {precision}"] = lambda alone=alone: seconds_of(alone, device)
        turns[f"from files, {precision}"] = lambda files=from_files: seconds_of(files, device)
    rows = [["", "images/s"]]
    for name, seconds in interleave(turns, options.rounds, warm_up=True).items():
        rows.append([name, f"{num_images / statistics.median(seconds):.1f}"])
    return table(rows)


def benchmark_frechet(*, num_features: int, num_samples: int, num_rounds: int) -> str:
    """Return the time of the Fréchet distance beside that with ``scipy.linalg.sqrtm``.

    The covariances are those of ``num_samples`` random features with a decaying spectrum, as a
    detector's have.
    """
    try:
        from scipy.linalg import sqrtm
    except ModuleNotFoundError:
        raise ValueError(
            "This comparison needs SciPy, which is not installed: pip install scipy."
        ) from None
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((num_features, num_features)))[0]
    scales = np.arange(1, num_features + 1) ** -0.5

    def moments(shift: float, stretch: float) -> tuple[np.ndarray, np.ndarray]:
        samples = rng.standard_normal((num_samples, num_features)) * scales**stretch
        samples = samples @ basis.T + shift * rng.standard_normal(num_features)
        return samples.mean(0), np.cov(samples, rowvar=False)

    first, second = moments(0.0, 1.0), moments(0.02, 1.1)
    values: dict[str, float] = {}

    def symmetric() -> float:
        start = time.perf_counter()
        values["symmetric"] = frechet_distance(*first, *second)
        return time.perf_counter() - start

    def general() -> float:
        start = time.perf_counter()
        (mu1, sigma1), (mu2, sigma2) = first, second
        root = sqrtm(sigma1 @ sigma2)
        squared = np.sum((mu1 - mu2) ** 2)
        values["general"] = float(squared + np.trace(sigma1 + sigma2 - 2 * np.real(root)))
        return time.perf_counter() - start

    times = interleave({"symmetric": symmetric, "general": general}, num_rounds)
    rows = [["", "s", "distance"]]
    names = {"symmetric": "this code", "general": "scipy.linalg.sqrtm"}
    for key, seconds in times.items():
        rows.append([names[key], f"{statistics.median(seconds):.2f}", f"{values[key]:.6f}"])
    ratio = median_ratio(times["general"], times["symmetric"])
    difference = abs(values["symmetric"] - values["general"])
    return (
        f"{table(rows)}\nThe Fréchet distance at {num_features} dimensions is {ratio:.1f} times as "
        f"fast as with sqrtm; the two differ by {difference:.1e}."
    )
