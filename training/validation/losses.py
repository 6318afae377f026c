"""Measures the loss of each example, always at the same noise levels and with the same noise.

Levels are the medians of R equally probable intervals of the training distribution, so that the
mean loss estimates the training loss without random draws of levels. Noise depends on the row
alone: two runs, or two moments of one run, are compared under the same noise.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from data.images.dataset import Cond
from torch_utils import distributed, rng
from training.validation.examples import Examples

_ORDER_SEED = 0


class Losses(NamedTuple):
    """Losses of R rows, each float64 [R] and equal on every rank."""

    held_out: np.ndarray
    trained: np.ndarray
    reduced: dict[str, np.ndarray]  # Held-out losses without a condition, by what is left out.


class LossMeter:
    """Measures the losses of examples, whose batches the ranks share.

    Args:
        objective: The :class:`training.objective.Objective` of the averaged weights.
        examples: What the loss is measured on.
        batch: Most rows of a pass.
        device: Device of the weights.
    """

    def __init__(
        self, objective: Any, examples: Examples, batch: int, device: torch.device
    ) -> None:
        self._objective, self._examples, self._device = objective, examples, device
        self._batches = list(examples.batches(batch))
        num = len(examples.rows)
        # In random order, so that no image or class gets the lower levels just by coming first.
        places = np.random.default_rng(_ORDER_SEED).permutation(num)
        levels = objective.training_levels(((places + 0.5) / num).tolist())
        self._sigma = torch.tensor(levels, dtype=torch.float32)
        self.level_names: list[str] = objective.level_names
        self.level = objective.level_of(self._sigma).numpy()  # [R], index into level_names.

    @torch.no_grad()
    def measure(self, cur_nimg: int) -> Losses:
        """Return the losses of all rows after ``cur_nimg`` training images. Collective."""
        names = ("held_out", "trained", *self._objective.reduced(self._draws(range(1), 0)))
        found = torch.zeros(len(names), len(self._examples.rows), dtype=torch.float64)
        mine = self._batches[distributed.rank() :: distributed.world_size()]
        self._prefetch(mine)
        for rows in mine:
            for place, losses in enumerate(self._losses(rows, cur_nimg)):
                found[place, rows.start : rows.stop] = losses.double().cpu()
        # Every element is a sum of one number and zeros, which is exact.
        found = distributed.all_reduce_sum(found.to(self._device)).cpu().numpy()
        held_out, trained, *reduced = found
        return Losses(held_out, trained, dict(zip(names[2:], reduced, strict=True)))

    def _prefetch(self, batches: Sequence[range]) -> None:
        """Fetch this rank's remote data in the background, all at once instead of by batch."""
        own = [self._examples.rows[row] for rows in batches for row in rows]
        if own:
            self._examples.held_out.prefetch([row.held_out for row in own])
            self._examples.trained.prefetch([row.trained for row in own])

    def _losses(self, rows: range, cur_nimg: int) -> Iterator[torch.Tensor]:
        """Yield losses [N] of a batch: held-out, training, and held-out without each condition."""
        draws, own = self._draws(rows, cur_nimg), self._examples
        chosen = own.rows[rows.start : rows.stop]
        held_out = self._read(own.held_out, [row.held_out for row in chosen], draws)
        yield self._loss(held_out, draws)
        trained = self._read(own.trained, [row.trained for row in chosen], draws)
        yield self._loss(trained, draws)
        for fewer in self._objective.reduced(draws).values():
            yield self._loss(held_out, fewer)

    def _draws(self, rows: range, cur_nimg: int) -> Any:
        seeds = [rng.mix(rng.STREAM_VALIDATION, row) for row in rows]
        shape = self._objective.row_shape(self._examples.rows[rows.start].shape)
        noise = rng.SeededNoise(seeds, self._device).randn(shape)
        sigma = self._sigma[rows.start : rows.stop].to(self._device)
        return self._objective.fixed_draws(sigma, noise, cur_nimg)

    def _read(self, data: Any, keys: list[Any], draws: Any) -> tuple[torch.Tensor, Cond]:
        return self._objective.prepare(*data.__getitems__(keys), draws, self._device)

    def _loss(self, batch: tuple[torch.Tensor, Cond], draws: Any) -> torch.Tensor:
        return self._objective(*batch, draws).reshape(len(draws.sigma), -1).mean(1)
