"""Whether batches come in random order."""

from collections.abc import Sequence

import numpy as np

from training.watching.finding import Finding

_NUM_PERMUTATIONS = 200
_STANDARD_DEVIATIONS = 7.0
_MIN_ROWS = 32  # In all batches together.


def closeness(batches: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return how much closer in the data consecutive rows of batches are than in random order.

    Each batch holds the place in the data of every row, in order of training. The first number is
    that difference, in standard deviations over random permutations of each batch. The second is
    the mean distance of consecutive rows, relative to the mean over the permutations.
    """
    rng = np.random.default_rng(0)
    totals = np.zeros(1 + _NUM_PERMUTATIONS)
    for places in batches:
        ranks = np.unique(places, return_inverse=True)[1].astype(np.float64)
        totals[0] += np.abs(np.diff(ranks)).sum()
        others = rng.permuted(np.tile(ranks, (_NUM_PERMUTATIONS, 1)), axis=1)
        totals[1:] += np.abs(np.diff(others, axis=1)).sum(1)
    spread, mean = totals[1:].std(), totals[1:].mean()
    if spread == 0:
        return 0.0, 1.0
    return (mean - totals[0]) / spread, totals[0] / mean


def find_unshuffled(batches: Sequence[np.ndarray]) -> list[Finding]:
    """Return a finding if consecutive rows of batches lie close to each other in the data."""
    batches = [places for places in batches if len(places) > 2]
    num = sum(map(len, batches))
    if num < _MIN_ROWS:
        return []
    deviations, share = closeness(batches)
    if deviations < _STANDARD_DEVIATIONS:
        return []
    return [
        Finding(
            name="unshuffled",
            message=f"Batches are not shuffled: of {num} images in the order of training, "
            f"neighbours lie {share:.0%} as far apart in the data as in random order "
            f"({deviations:.0f} standard deviations)",
            remedy="see what the batch sampler yields (Family.steps), and shuffle it",
        )
    ]
