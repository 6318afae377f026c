"""Pictures and scores of a run's averaged weights while it trains."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from dnnlib.text import format_kimg
from metrics.score import GenerateFn
from sampling.grids import GRID_SEEDS, save_fakes
from sampling.images import ImageGenerator, generate_for_rank, passport, seed_range
from torch_utils import distributed
from torch_utils.stop_signal import StopSignal
from training.checkpoint import pictures_path, snapshot_path
from training.config import RunConfig
from training.family import Outputs
from training.telemetry import metric_is_recorded

EvaluateFn = Callable[[tuple[str, ...], GenerateFn], list[dict[str, Any]]]


class ImageEvaluator:
    """Pictures and scores of models that generate images from at most a class.

    It is a :class:`training.family.Evaluator`. ``class_counts`` holds the number of training images
    of each class, ``class_names`` their names in pictures; both may be empty. ``evaluate(
    metric_names, generate)`` returns score rows; None without metrics.
    """

    def __init__(
        self,
        config: RunConfig,
        class_counts: Sequence[int],
        evaluate: EvaluateFn | None,
        class_names: Sequence[str] = (),
    ) -> None:
        self._config, self._counts, self._evaluate = config, tuple(class_counts), evaluate
        self._class_names = class_names

    def save_pictures(
        self, generator: ImageGenerator, outputs: Outputs, cur_nimg: int
    ) -> torch.Tensor | None:
        return save_fakes(
            generator,
            self._counts,
            pictures_path(outputs.run_dir, cur_nimg),
            self._config.logging.sample_batch,
            GRID_SEEDS * self._config.logging.num_sample_batches,
            self._class_names,
        )

    def score(self, generator: ImageGenerator, outputs: Outputs, cur_nimg: int) -> None:
        names = self._config.logging.metrics
        missing = tuple(name for name in names if not is_recorded(outputs, name, cur_nimg))
        if not missing or self._evaluate is None:
            return
        rows = self._evaluate(missing, self._make_generate(generator, outputs.stop_signal))
        protocol = passport(generator, self._config.training, self._counts)
        for row in rows:
            row.update(seeds=seed_range(0, row["num_images"]), **protocol)
        record(rows, outputs, cur_nimg)

    def _make_generate(self, generator: ImageGenerator, stop: StopSignal) -> GenerateFn:
        batch = self._config.logging.sample_batch

        def generate(indices: range) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
            options = dict(batch=batch, class_counts=self._counts, label="Metrics", transient=True)
            for made in generate_for_rank(generator, indices, **options):
                stop.check()
                yield made

        return generate


def is_recorded(outputs: Outputs, name: str, cur_nimg: int) -> bool:
    """Return, on every rank, whether a metric was recorded at ``cur_nimg`` images. Collective."""
    return distributed.broadcast_object(metric_is_recorded(outputs.run_dir, name, cur_nimg))


def record(rows: list[dict[str, Any]], outputs: Outputs, cur_nimg: int) -> None:
    """Add kimg and snapshot to score rows, and record them. Does nothing except on rank 0."""
    if outputs.telemetry is None:
        return
    snapshot = snapshot_path(outputs.run_dir, cur_nimg).name
    with outputs.stop_signal.deferred():  # A stop leaves all rows in all files, or none.
        # Rows of requested metrics come first in the list and are written last. If a kill prevents
        # that, all rows are computed again.
        for row in reversed(rows):
            row.update(kimg=cur_nimg / 1000, snapshot=snapshot)
            if not metric_is_recorded(outputs.run_dir, row["metric"], cur_nimg):
                outputs.telemetry.record_metric(row, cur_nimg)
        for row in rows:
            values = ", ".join(f"{name} {value:.4f}" for name, value in row["values"].items())
            outputs.telemetry.message(
                f"{row['metric']}: {values} at kimg {format_kimg(row['kimg'])}"
            )
