"""Measures the validation loss of a run, compares it with training images, and acts upon it."""

import math
import time
from typing import Any

import numpy as np

from dnnlib.text import format_kimg
from torch_utils import distributed
from torch_utils.misc import returning_freed_memory
from training.config import RunConfig
from training.division import accumulation_rounds
from training.telemetry import Stats, scalar
from training.validation.losses import Losses, LossMeter
from training.validation.trend import Trend, standard_error

_OVERFITS = (
    "Warning: the validation loss has risen above its best by more than chance, while the loss on "
    "training images has fallen, so the model is overfitting: use an earlier snapshot, train on "
    "more images, with more dropout or augmentation or with a smaller model, or end such runs with "
    "--early-stop."
)


class Validator:
    """Measures the loss on held-out images at ticks of a run; without such images does nothing.

    Args:
        job: What is trained, a :class:`training.loop.Job`, with its ``examples``.
        family: The family of the model.
        ema: The averaged weights, a :class:`training.ema.EMA`.
        data_hash: Identity of the training data.
    """

    def __init__(self, job: Any, family: Any, ema: Any, data_hash: str) -> None:
        self._config: RunConfig = job.config
        self._ema, self._meter, self._examples = ema, None, job.examples
        self._trend, self.messages = Trend(""), ()
        self._told = False  # Whether overfitting has been reported since it began.
        if job.examples is None:
            return
        objective = family.objective(job.config, ema.network, job.codec)
        batch, _ = accumulation_rounds(job.config.training, distributed.world_size())
        self._meter = LossMeter(objective, job.examples, batch, job.device)
        share, num = job.config.data.validation_share, len(job.examples.rows)
        self._trend = Trend(f"{data_hash} {share!r} {num}")

    @property
    def is_over(self) -> bool:
        """Whether the run is to end: ``--early-stop`` validations brought no improvement."""
        limit = self._config.logging.early_stop
        return limit > 0 and self._trend.num_since >= limit

    def at_tick(self, tick: int, tick_start_nimg: int, cur_nimg: int, is_last: bool) -> Stats:
        """Return the statistics of a validation if one is due at the end of a tick. Collective.

        Sets ``messages`` to the lines to print about it; there are none if it is not due.
        """
        self.messages = ()
        if self._meter is None or not (is_last or self._is_due(tick, tick_start_nimg, cur_nimg)):
            return {}
        start_sec = time.monotonic()
        with self._ema.filled(), returning_freed_memory():
            losses = self._meter.measure(cur_nimg)
        items = self._examples.by_item(losses.held_out)
        trained = float(losses.trained.mean())
        self._trend.add(cur_nimg, items, trained)
        overfits = self._trend.overfits(items, trained)
        self.messages = tuple(self._describe(losses, cur_nimg, overfits))
        self._told = overfits
        seconds = scalar(time.monotonic() - start_sec)
        return dict(self._statistics(losses), **{"Timing/validation_sec": seconds})

    def _is_due(self, tick: int, tick_start_nimg: int, cur_nimg: int) -> bool:
        interval = self._config.logging.validation_ticks
        if interval is not None:
            return tick % interval == 0
        return self._config.snapshot_is_due(tick, tick_start_nimg, cur_nimg)

    def state_dict(self) -> dict[str, Any]:
        """Return what a training state keeps, by name; nothing without held-out images."""
        if self._meter is None:
            return {}
        return dict(validation=dict(self._trend.state_dict(), told=self._told))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a training state, which may hold no validation."""
        if self._meter is not None and "validation" in state:
            self._trend.load_state_dict(state["validation"])
            self._told = bool(state["validation"].get("told", False))

    def _statistics(self, losses: Losses) -> Stats:
        by_item = self._examples.by_item
        found = {
            "Validation/loss": by_item(losses.held_out),
            "Validation/loss_trained": by_item(losses.trained),
            "Validation/gap": by_item(losses.held_out - losses.trained),
        }
        for place, name in enumerate(self._meter.level_names):
            found[f"Validation/{name}"] = losses.held_out[self._meter.level == place]
        for name, rows in self._examples.groups.items():
            found[f"Validation/class_{name}"] = losses.held_out[rows]
        for name, values in losses.reduced.items():
            found[f"Validation/{name}"] = by_item(values)
        stats = {name: _statistic(values) for name, values in found.items() if len(values)}
        stats["Validation/best"] = scalar(self._trend.best_loss)
        slope = self._trend.slope()
        if slope is not None:
            stats["Validation/slope"] = scalar(slope[0])
        return stats

    def _describe(self, losses: Losses, cur_nimg: int, overfits: bool) -> list[str]:
        trend, gap = self._trend, self._examples.by_item(losses.held_out - losses.trained)
        parts = [
            f"validation loss {losses.held_out.mean():.5f}",
            f"training images {losses.trained.mean():.5f}",
            f"gap {gap.mean():+.5f} ± {standard_error(gap):.5f}",
        ]
        slope = trend.slope()
        if slope is not None:
            parts.append(f"{slope[0]:+.1%} ± {slope[1]:.1%} per doubling of the images")
        if trend.num_since:
            best = f"best {trend.best_loss:.5f} at kimg {format_kimg(trend.best_nimg / 1000)}"
            parts.append(f"{best}, {trend.num_since} validation(s) ago")
        lines = [", ".join(parts)]
        if overfits and not self._told:
            lines.append(_OVERFITS)
        if self.is_over:
            lines.append(self.verdict(cur_nimg))
        return lines

    def verdict(self, cur_nimg: int) -> str:
        """Return why the run ended before its duration."""
        trend, limit = self._trend, self._config.logging.early_stop
        return (
            f"Stopped early at kimg {format_kimg(cur_nimg / 1000)} (--early-stop={limit}): the "
            f"validation loss has not fallen by more than chance in {trend.num_since} validations; "
            f"its best was {trend.best_loss:.5f} at kimg {format_kimg(trend.best_nimg / 1000)}. A "
            "larger --early-stop, or 0, would go on."
        )


def _statistic(values: np.ndarray) -> dict[str, float]:
    finite = values[np.isfinite(values)]
    if len(finite) < len(values):
        return dict(num=len(values), mean=math.nan, std=math.nan)
    return dict(num=len(values), mean=float(values.mean()), std=float(values.std()))
