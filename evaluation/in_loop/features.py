"""What a run on features shows of itself with its averaged weights: pictures, and validation."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from data.features.dataset import FeatureDataset
from sampling.features import FeatureGenerator
from torch_utils import distributed
from torch_utils.fingerprints import weights_hash
from torch_utils.pictures import mixed_grid, save_image
from torch_utils.rng import mix
from training.checkpoint import snapshot_path
from training.config import RunConfig, TrainingConfig
from training.ema import describe_average
from training.telemetry import Telemetry, metric_is_recorded

# Returns rows and pictures by name of the tests of that name; see evaluation/.
ValidateFn = Callable[
    [tuple[str, ...], FeatureGenerator], tuple[list[dict[str, Any]], dict[str, Image]]
]
_NUM_SHOWN = 8
_MAX_RISE = 1.25
# What two rows must agree in, so that a rise of one over the other means a worse model.
_SAME_FOR_ALARM = ("metric", "data_hash", "items_hash", "lpips_hash", "sampling", "guidance")


class FeatureScores:
    """Pictures and validation of a run's averaged weights. Every method is collective.

    Args:
        config: The run.
        run_dir: Where files go; rank 0 writes.
        generator: Makes images with the averaged weights.
        dataset: The training data; pictures are of its validation images, if there are any.
        evaluate: Does the tests of the run's metrics; None without any.
        telemetry: Where rows go, on rank 0.
        stop_signal: Tests that have not begun are left for later when it asks for that.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        generator: FeatureGenerator,
        dataset: FeatureDataset,
        *,
        evaluate: ValidateFn | None,
        telemetry: Telemetry | None,
        stop_signal: distributed.StopSignal,
    ) -> None:
        self._config, self._run_dir, self._generator = config, run_dir, generator
        self._evaluate, self._telemetry, self._stop_signal = evaluate, telemetry, stop_signal
        held_out = dataset.of_split("validation")
        self._shown = held_out if len(held_out) else dataset

    def _generator_at(self, cur_nimg: int) -> FeatureGenerator:
        return dataclasses.replace(self._generator, trained_nimg=cur_nimg)

    def save_pictures(self, cur_nimg: int) -> None:
        """Write ``fakes-KIMG.png``: a row each of image, reconstruction, and text alone."""
        num = min(_NUM_SHOWN * self._config.logging.num_sample_batches, len(self._shown))
        chosen = np.linspace(0, len(self._shown) - 1, num).round().astype(int).tolist()
        generator = self._generator_at(cur_nimg)
        rows = {}
        for index in chosen[distributed.rank() :: distributed.world_size()]:
            rows[index] = show_item(generator, self._shown, index)
        gathered = distributed.gather_objects(rows)
        if distributed.is_main():
            found = {index: row for part in gathered for index, row in part.items()}
            path = self._run_dir / f"fakes-{cur_nimg // 1000:06d}.png"
            save_image(mixed_grid([found[index] for index in chosen]), path)

    def run(self, cur_nimg: int) -> bool:
        """Record the scores and return True; return False if a signal cut that short."""
        for name in self._config.logging.metrics:
            recorded = metric_is_recorded(self._run_dir, name, cur_nimg)
            if distributed.broadcast_object(recorded) or self._evaluate is None:
                continue
            if self._stop_signal.agreed():
                return False
            generator = self._generator_at(cur_nimg)
            rows, pictures = self._evaluate((name,), generator)
            if self._telemetry is not None:
                facts = weights_facts(generator, self._config.training)
                self._record([dict(row, **facts) for row in rows], pictures, cur_nimg)
        return True

    def _record(
        self, rows: list[dict[str, Any]], pictures: dict[str, Image], cur_nimg: int
    ) -> None:
        # A row says that its test is done with: it comes last.
        for name, picture in pictures.items():
            save_image(picture, self._run_dir / f"{name}-{cur_nimg // 1000:06d}.png")
        for row in rows:
            alarm = compare(row, last_row(self._run_dir, row["metric"]))
            row = dict(
                row, kimg=cur_nimg / 1000, snapshot=snapshot_path(self._run_dir, cur_nimg).name
            )
            if alarm is not None:
                row["warnings"] = [*row["warnings"], alarm]
            self._telemetry.record_metric(row, cur_nimg)
            self._telemetry.message(f"{describe_row(row)} at kimg {row['kimg']:.1f}")
            for text in row["warnings"]:
                self._telemetry.message(f"{row['metric']}: warning: {text}")


def weights_facts(
    generator: FeatureGenerator,
    training: TrainingConfig,
    progress: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what a row says of the weights: their hash, and which average they are.

    ``training`` and the ``progress`` of a snapshot tell the latter.
    """
    return dict(
        snapshot_hash=weights_hash(generator.network.state_dict()),
        ema=describe_average(training, progress or {}),
    )


def describe_row(row: Mapping[str, Any]) -> str:
    """Return a test's values, and why others are absent, in one line."""
    parts = [", ".join(f"{k} {v:.4f}" for k, v in row["values"].items() if v is not None)]
    parts += [f"absent: {reason}" for reason in dict.fromkeys(row.get("missing", {}).values())]
    return f"{row['metric']}: {'; '.join(filter(None, parts))}"


def compare(row: Mapping[str, Any], previous: Mapping[str, Any] | None) -> str | None:
    """Return a warning if the median LPIPS of a test has risen by more than 25%; None otherwise.

    ``previous`` is an earlier row of the same test. Rows of other images, or of images that were
    made or measured otherwise, tell nothing.
    """
    if previous is None:
        return None
    alike = [json.dumps([found.get(key) for key in _SAME_FOR_ALARM]) for found in (row, previous)]
    if alike[0] != alike[1]:
        return None
    medians = [found["values"].get("lpips_p50") for found in (previous, row)]
    if None in medians or medians[1] <= _MAX_RISE * medians[0]:
        return None
    rise = f"by {medians[1] / medians[0] - 1:.0%} " if medians[0] else ""
    return f"the median LPIPS has risen {rise}from {medians[0]:.3f} to {medians[1]:.3f}"


def last_row(run_dir: Path, metric: str) -> dict[str, Any] | None:
    """Return the last row of a metric's file; None without any that can be read."""
    path = run_dir / f"metric-{metric}.jsonl"
    if not path.is_file():
        return None
    for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("values"), dict):
            return row
    return None


def show_item(
    generator: FeatureGenerator, dataset: FeatureDataset, index: int
) -> list[torch.Tensor]:
    """Return an image [3, H, W] uint8, what its features give, and what its text alone gives.

    The noise is the item's own, the same whenever it is shown.
    """
    latents, cond = dataset.__getitems__([index])
    bucket = dataset.buckets[dataset.bucket_index(index)]
    text_alone = {name: value for name, value in cond.items() if name in ("text", "text_mask")}
    seed = [seed_of_item(dataset.ids[index])]
    images = [
        generator.decode(latents),
        generator.generate(seed, cond, bucket),
        generator.generate(seed, text_alone, bucket),
    ]
    return [image[0].cpu() for image in images]


def seed_of_item(name: str) -> int:
    """Return the seed of the noise with which an item of that name is shown."""
    return mix(*name.encode()) % 2**32
