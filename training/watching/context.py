"""Whether a network uses its conditioning: classes, sets, texts or features."""

import collections

from training.watching.finding import Finding
from training.watching.tick import Tick

# The first steps are not judged: contexts have no effect while zero-initialised modulations are 0.
_FIRST_STEP = 20
_NUM_TICKS = 2  # Consecutive ticks in which another context makes no difference at all.
_NONE = 1e-6  # Share of the loss that rounding explains.
# From step 1,000 and 30% of the run on, the mean difference over 10 ticks is judged too. It is too
# small below both 0.1% of the loss and 2 standard errors.
_NUM_MEAN, _LATER_STEP, _LATER_SHARE = 10, 1000, 0.3
_LITTLE, _NUM_ERRORS = 1e-3, 2.0


class ContextWatcher:
    """Reports when images have the same loss under the contexts of other images.

    Early in a run, that is a difference which rounding explains. After 1,000 steps and 30% of the
    run, it is also one below 0.1% of the loss that chance explains.
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
