"""What a run shows of itself with its averaged weights: pictures, scores, the validation loss."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from data.fewshot.episodes import Episodes
from dnnlib.progress import progress
from sampling.grids import GRID_SEEDS, save_episodes, save_fakes
from sampling.images import ImageGenerator, generate_for_rank, passport, seed_range
from sampling.supports import SupportGenerator
from torch_utils import distributed
from training.checkpoint import DataSummary, snapshot_path
from training.config import RunConfig
from training.telemetry import Telemetry, metric_is_recorded

GenerateFn = Callable[[range], Iterable[tuple[torch.Tensor, torch.Tensor]]]
EvaluateFn = Callable[[tuple[str, ...], GenerateFn], list[dict[str, Any]]]


class InLoopScores:
    """Pictures and scores of a run's averaged weights. Every method is collective.

    Args:
        config: The run.
        run_dir: Where files go; rank 0 writes.
        generator: Makes images with the averaged weights.
        data: Summary of the training data.
        evaluate: Returns score rows of ``evaluate(metric_names, generate)``; None without metrics.
        validate: Returns the loss on classes not trained on; None to leave it out.
        episodes: Of a model of sets: those of the pictures, and those that are scored.
        telemetry: Where rows go, on rank 0.
        stop_signal: Scores end early when it asks for that.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        generator: ImageGenerator,
        data: DataSummary,
        *,
        evaluate: EvaluateFn | None,
        validate: Callable[[], float] | None,
        episodes: tuple[Episodes, Episodes | None] | None,
        telemetry: Telemetry | None,
        stop_signal: distributed.StopSignal,
    ) -> None:
        self._config, self._run_dir, self._data = config, run_dir, data
        self._generator, self._evaluate, self._validate = generator, evaluate, validate
        self._episodes = episodes
        self._telemetry, self._stop_signal = telemetry, stop_signal

    def save_pictures(self, cur_nimg: int) -> None:
        """Write ``fakes-KIMG.png``."""
        logging = self._config.logging
        path = self._run_dir / f"fakes-{cur_nimg // 1000:06d}.png"
        num_images = GRID_SEEDS * logging.num_sample_batches
        if self._episodes is not None:
            generator = SupportGenerator.of(self._generator, self._episodes[0])
            save_episodes(generator, num_images, path, logging.sample_batch)
        else:
            counts = self._data.class_counts
            save_fakes(self._generator, counts, path, logging.sample_batch, num_images)

    def run(self, cur_nimg: int) -> bool:
        """Record the scores and return True; return False if a signal cut that short."""
        if self._validate is not None and not self._is_recorded("val_loss", cur_nimg):
            loss = self._validate()
            row = dict(metric="val_loss", value=loss, values={"val_loss": loss})
            self._record([row], cur_nimg)
        missing = tuple(
            name for name in self._config.logging.metrics if not self._is_recorded(name, cur_nimg)
        )
        if not missing or self._evaluate is None:
            return True
        generator, counts = self._generator, self._data.class_counts
        if self._episodes is not None and self._episodes[1] is not None:
            generator = SupportGenerator.of(generator, self._episodes[1])
            counts = self._episodes[1].counts
        try:
            rows = self._evaluate(missing, self._make_generate(generator, counts))
        except _InterruptedError:
            return False
        protocol = passport(generator, self._config.training, counts)
        for row in rows:
            row.update(seeds=seed_range(0, row["num_images"]), **protocol)
        self._record(rows, cur_nimg)
        return True

    def _is_recorded(self, name: str, cur_nimg: int) -> bool:
        return distributed.broadcast_object(metric_is_recorded(self._run_dir, name, cur_nimg))

    def _record(self, rows: list[dict[str, Any]], cur_nimg: int) -> None:
        if self._telemetry is None:
            return
        for row in rows:
            row = dict(
                row, kimg=cur_nimg / 1000, snapshot=snapshot_path(self._run_dir, cur_nimg).name
            )
            self._telemetry.record_metric(row, cur_nimg)
            values = ", ".join(f"{name} {value:.4f}" for name, value in row["values"].items())
            self._telemetry.message(f"{row['metric']}: {values} at kimg {row['kimg']:.1f}")

    def _make_generate(self, generator: ImageGenerator, counts: tuple[int, ...]) -> GenerateFn:
        batch = self._config.logging.sample_batch

        def generate(indices: range) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
            with progress(
                total=len(indices),
                label="Metrics",
                disable=not distributed.is_main(),
                transient=True,
            ) as bar:
                images = generate_for_rank(
                    generator, indices, batch=batch, class_counts=counts, on_batch=bar.update
                )
                # Ranks differ by up to one batch, but must ask for signals equally often.
                num_batches = -(-len(indices) // (distributed.world_size() * batch))
                for _, made in itertools.zip_longest(range(num_batches), images):
                    if self._stop_signal.agreed():
                        raise _InterruptedError
                    if made is not None:
                        yield made

        return generate


class _InterruptedError(Exception):
    """A signal came while images were generated for a metric."""
