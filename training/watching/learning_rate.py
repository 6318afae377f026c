"""Whether the learning rate is far too high or far too low, judged by the size of updates."""

from training.config import RunConfig
from training.distillation.stages import stages_of
from training.optimizer import learning_rate
from training.watching.finding import Finding
from training.watching.tick import Tick

# A larger update in one step, as a share of the weights; or one half as large, with which the
# activations of half the blocks have grown as far.
_LARGEST_UPDATE, _LARGEST_ACTIVATION = 0.03, 100.0
_SHORTEST_PATH = 1.0  # Lengths of the weights that they can move in the whole run.
_ALIGNED = 0.7  # Cosine of gradients: they point the same way, with hardly any noise.
_NUM_TICKS = 2  # In which this has to be so.
_NUM_POINTS = 200  # Of a schedule, over which it is averaged.


class LearningRateWatcher:
    """Says when updates are too large for the weights, or too small for the steps there are.

    Too high: a single update is a considerable share of the weights. Too low: with this update in
    every step, and the schedule of the run, weights would move less than their own length, while
    gradients still point the same way from step to step. Fine-tuning has small updates, too, but
    gradients that vary.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._num_low = self._num_high = 0

    def look(self, tick: Tick) -> list[Finding] | None:
        update, alignment = tick.mean("Watch/update_ratio"), tick.mean("Watch/gradient_alignment")
        if update is None or alignment is None:
            return None
        activations = tick.by_block("activation").values()
        num_large = sum(size > _LARGEST_ACTIVATION for size in activations)
        largest = _LARGEST_UPDATE / (2 if 2 * num_large >= max(len(activations), 1) else 1)
        self._num_high = self._num_high + 1 if update > largest else 0
        path = self._path(tick, update)
        is_low = path is not None and path < _SHORTEST_PATH and alignment > _ALIGNED
        self._num_low = self._num_low + 1 if is_low else 0
        if self._num_high >= _NUM_TICKS:
            return [
                Finding(
                    name="learning_rate_high",
                    message=f"one step changes the weights by {update:.1%} of their length, where "
                    f"at most {largest:.1%} is usual, so that the learning rate is far too "
                    "high",
                    remedy="lower it (--lr), or raise it more slowly (--lr-rampup)",
                )
            ]
        if self._num_low >= _NUM_TICKS:
            return [
                Finding(
                    name="learning_rate_low",
                    message=f"by such steps the weights can move by {path:.1%} of their length in "
                    f"the whole run, while gradients still agree (cosine {alignment:.2f}), so that "
                    "the learning rate is far too low",
                    remedy="raise it (--lr), or train longer (--kimg)",
                )
            ]
        return []

    def _path(self, tick: Tick, update: float) -> float | None:
        """Return how far the weights can move in a stage, in their own lengths; None for no rate.

        ``update`` is what the last step moved them.
        """
        training, step_nimg = self._config.training, self._config.step_nimg
        stage = stages_of(self._config)[tick.phase[0]]

        def rate(step: int) -> float:
            return learning_rate(training, step * step_nimg, step_nimg, stage.num_images)

        last = rate(tick.step - 1 - stage.start_nimg // step_nimg)
        num_steps = -(-stage.num_images // step_nimg)
        rates = [rate(step) for step in range(0, num_steps, -(-num_steps // _NUM_POINTS))]
        return update / last * num_steps * sum(rates) / len(rates) if last > 0 else None
