"""Pictures and validation of a feature-conditioned run, with its averaged weights."""

import collections
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from data.features.dataset import FeatureDataset
from dnnlib.text import format_kimg
from dnnlib.typed import parse_json
from evaluation.in_loop.images import is_recorded
from sampling.features import FeatureGenerator
from sampling.images import describe_sampling
from torch_utils import distributed
from torch_utils.fingerprints import weights_hash
from torch_utils.pictures import Titles, mixed_grid, save_image
from torch_utils.rng import mix
from training.checkpoint import count_name, pictures_path, snapshot_path
from training.config import RunConfig, TrainingConfig
from training.ema import describe_average
from training.family import Outputs

# Runs the validation tests of the given metric names; returns score rows, and pictures by name.
ValidateFn = Callable[
    [tuple[str, ...], FeatureGenerator], tuple[list[dict[str, Any]], dict[str, Image]]
]
_NUM_SHOWN = 8
_MAX_RISE = 1.25
# Keys in which two rows must agree for a rise to mean that the model has become worse.
_SAME_FOR_ALARM = ("metric", "data_hash", "items_hash", "lpips_hash", "sampling", "guidance")


class FeatureEvaluator:
    """Pictures and validation of a run's averaged weights; a :class:`training.family.Evaluator`.

    Pictures show the validation images of ``data``, or training images if there are none.
    ``evaluate`` runs the tests of the run's metrics; None without metrics.
    """

    def __init__(
        self, config: RunConfig, data: FeatureDataset, evaluate: ValidateFn | None
    ) -> None:
        self._config, self._evaluate = config, evaluate
        held_out = data.of_split("validation")
        self._shown = held_out if len(held_out) else data

    def save_pictures(
        self, generator: FeatureGenerator, outputs: Outputs, cur_nimg: int
    ) -> list[torch.Tensor] | None:
        """Write ``fakes-KIMG.png`` with a row per item: image, reconstruction, and from text alone.

        Returns the reconstructions, uint8 [C, H, W] each, on rank 0, None elsewhere. Collective.
        """
        num = min(_NUM_SHOWN * self._config.logging.num_sample_batches, len(self._shown))
        chosen = np.linspace(0, len(self._shown) - 1, num).round().astype(int).tolist()
        generator = dataclasses.replace(generator, trained_nimg=cur_nimg)
        mine = chosen[distributed.rank() :: distributed.world_size()]
        with distributed.together():
            rows = {index: show_item(generator, self._shown, index) for index in mine}
        found = collections.ChainMap(*distributed.gather_objects(rows))
        if not distributed.is_main():
            return None
        heading = describe_sampling(generator.protocol())
        columns = ("validation image", "of its features", "of its text alone")
        names = [self._shown.caption(index) for index in chosen]
        picture = mixed_grid(
            [found[index] for index in chosen], titles=Titles(heading, columns, names)
        )
        save_image(picture, pictures_path(outputs.run_dir, cur_nimg))
        return [found[index][1] for index in chosen]

    def score(self, generator: FeatureGenerator, outputs: Outputs, cur_nimg: int) -> None:
        for name in self._config.logging.metrics:
            if is_recorded(outputs, name, cur_nimg) or self._evaluate is None:
                continue
            outputs.stop_signal.check()
            generator = dataclasses.replace(generator, trained_nimg=cur_nimg)
            rows, pictures = self._evaluate((name,), generator)
            if outputs.telemetry is not None:
                facts = weights_facts(generator, self._config.training)
                rows = [dict(row, **facts) for row in rows]
                with outputs.stop_signal.deferred():
                    _record(rows, pictures, outputs, cur_nimg)


def _record(
    rows: list[dict[str, Any]], pictures: dict[str, Image], outputs: Outputs, cur_nimg: int
) -> None:
    # A row marks its test as done, so that it is written after the pictures.
    run_dir, telemetry = outputs.run_dir, outputs.telemetry
    for name, picture in pictures.items():
        save_image(picture, run_dir / f"{name}-{count_name(cur_nimg)}.png")
    for row in rows:
        alarm = compare(row, last_row(run_dir, row["metric"]))
        row = dict(row, kimg=cur_nimg / 1000, snapshot=snapshot_path(run_dir, cur_nimg).name)
        if alarm is not None:
            row["warnings"] = [*row["warnings"], alarm]
        telemetry.record_metric(row, cur_nimg)
        telemetry.message(f"{describe_row(row)} at kimg {format_kimg(row['kimg'])}")
        for text in row["warnings"]:
            telemetry.message(f"{row['metric']}: warning: {text}")


def weights_facts(
    generator: FeatureGenerator, training: TrainingConfig, progress: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what a row states about the weights: their hash, and which average they are."""
    return dict(
        snapshot_hash=weights_hash(generator.network.state_dict()),
        ema=describe_average(training, progress or {}),
    )


def describe_row(row: Mapping[str, Any]) -> str:
    """Return a test's values, and the reasons why others are absent, as one line."""
    parts = [", ".join(f"{k} {v:.4f}" for k, v in row["values"].items() if v is not None)]
    parts += [f"absent: {reason}" for reason in dict.fromkeys(row.get("missing", {}).values())]
    return f"{row['metric']}: {'; '.join(filter(None, parts))}"


def compare(row: Mapping[str, Any], previous: Mapping[str, Any] | None) -> str | None:
    """Return a warning if the median LPIPS of a test has risen by more than 25%, else None.

    ``previous`` is an earlier row of the same test. Rows of other images, or of images that were
    generated or measured differently, are not compared.
    """
    if previous is None or any(
        json.dumps(row.get(key)) != json.dumps(previous.get(key)) for key in _SAME_FOR_ALARM
    ):
        return None
    medians = [found["values"].get("lpips_p50") for found in (previous, row)]
    if None in medians or medians[1] <= _MAX_RISE * medians[0]:
        return None
    rise = f"by {medians[1] / medians[0] - 1:.0%} " if medians[0] else ""
    return f"the median LPIPS has risen {rise}from {medians[0]:.3f} to {medians[1]:.3f}"


def last_row(run_dir: Path, metric: str) -> dict[str, Any] | None:
    """Return the last readable row in a metric's file of a run folder; None if there is none."""
    path = run_dir / f"metric-{metric}.jsonl"
    if not path.is_file():
        return None
    for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("values"), dict):
            return row
    return None


def show_item(
    generator: FeatureGenerator, dataset: FeatureDataset, index: int
) -> list[torch.Tensor]:
    """Return an image, its reconstruction from all features, and one from its text alone.

    Each is uint8 [3, H, W] on the CPU. The noise depends on the item's name alone, so that it is
    the same in every picture.
    """
    latents, cond = dataset.__getitems__([index])
    bucket = dataset.buckets[dataset.bucket_index(index)]
    text_alone = {name: value for name, value in cond.items() if name in ("text", "text_mask")}
    seed = [seed_of_item(dataset.ids[index])]
    made = [generator.generate(seed, own, bucket) for own in (cond, text_alone)]
    return [image[0].cpu() for image in (generator.codec.pictures(latents), *made)]


def seed_of_item(name: str) -> int:
    """Return the seed of the noise for the item called ``name``, in [0, 2^32)."""
    return mix(*name.encode()) % 2**32
