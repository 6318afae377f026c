"""Whether a network uses what its images are made from: classes, sets, texts, features."""

import collections

from training.watching.finding import Finding
from training.watching.tick import Tick

# Contexts begin without an effect where modulations begin at zero: so many steps are not judged.
_FIRST_STEP = 20
_NUM_TICKS = 2  # In which another context makes no difference at all.
_NONE = 1e-6  # Of the loss: as little as another context changes by rounding.
# Later, the mean of so many ticks has to be above a share of the loss, or above chance.
_NUM_MEAN, _LATER_STEP, _LATER_SHARE = 10, 1000, 0.3
_LITTLE, _NUM_ERRORS = 1e-3, 2.0


class ContextWatcher:
    """Says when images made from the contexts of others have the same loss.

    Early in a run, where there is no difference but rounding; after 1,000 steps and 30% of it, also
    where the difference is below 0.1% of the loss, and no more than chance.
    """

    def __init__(self) -> None:
        self._num_without = 0
        self._last: collections.deque = collections.deque(maxlen=_NUM_MEAN)

    def look(self, tick: Tick) -> list[Finding] | None:
        gap, loss = tick.mean("Watch/context_gap"), tick.mean("Watch/loss")
        error = tick.standard_error("Watch/context_gap")
        if gap is None or error is None or not loss or tick.step < _FIRST_STEP:
            return None
        is_without = max(abs(gap), error) < _NONE * abs(loss)
        self._num_without = self._num_without + 1 if is_without else 0
        self._last.append((gap, error, abs(loss)))
        if self._num_without < _NUM_TICKS and not self._is_little(tick):
            return []
        gaps, _, losses = zip(*self._last, strict=True)
        return [
            Finding(
                name="context_unused",
                message=f"the loss of images is {sum(gaps) / sum(losses):.2%} higher with the "
                "conditions of other images than with their own, so that the network does not use "
                "them",
                remedy="look at how conditions reach the network, and whether they say anything "
                "about their images; of a set-conditioned model, raise the learning rate (--lr) or "
                "begin with a context that has an effect (--warm-start-adaln)",
            )
        ]

    def _is_little(self, tick: Tick) -> bool:
        if tick.step < max(_LATER_STEP, _LATER_SHARE * tick.num_steps):
            return False
        gaps, errors, losses = zip(*self._last, strict=True)
        error = sum(own**2 for own in errors) ** 0.5
        is_full = len(gaps) == _NUM_MEAN
        return is_full and sum(gaps) < min(_LITTLE * sum(losses), _NUM_ERRORS * error)
