"""Whether a network uses what its images are made from: classes, sets, texts, features."""

from training.watching.finding import Finding
from training.watching.tick import Tick

_FIRST_STEP = 40  # Contexts begin without an effect where modulations begin at zero.
_NUM_TICKS = 3
_NONE = 1e-6  # Of the loss: as little as another context changes by rounding.


class ContextWatcher:
    """Says when images made from the contexts of others have the same loss."""

    def __init__(self) -> None:
        self._num_without = 0

    def look(self, tick: Tick) -> list[Finding] | None:
        gap, loss = tick.mean("Watch/context_gap"), tick.mean("Watch/loss")
        error = tick.standard_error("Watch/context_gap")
        if gap is None or error is None or not loss or tick.step < _FIRST_STEP:
            return None
        is_without = max(abs(gap), error) < _NONE * abs(loss)
        self._num_without = self._num_without + 1 if is_without else 0
        if self._num_without < _NUM_TICKS:
            return []
        return [
            Finding(
                name="context_unused",
                message="the loss is the same whether images have their own conditions or those of "
                "others, so that the network does not use them",
                remedy="look at how conditions reach the network; of a set-conditioned model, "
                "raise the learning rate or begin with a context that has an effect "
                "(--warm-start-adaln)",
            )
        ]
