"""Whether the learning rate is far too high or too low, judged by the size of updates."""

from training.config import RunConfig
from training.distillation.stages import stages_of
from training.optimizer import learning_rate
from training.watching.finding import Finding
from training.watching.tick import Tick

# Largest update in one step, as a share of the norm of the weights. The limit is half of that if
# the activations of at least half the blocks exceed _LARGEST_ACTIVATION.
_LARGEST_UPDATE, _LARGEST_ACTIVATION = 0.03, 100.0
_SHORTEST_PATH = 1.0  # Distance in the whole run, relative to the norm of the weights.
_ALIGNED = 0.7  # Cosine above which gradients have hardly any noise.
_NUM_TICKS = 2  # Consecutive ticks in which this has to hold.
_NUM_POINTS = 200  # Points at which a schedule is averaged.


class LearningRateWatcher:
    """Reports updates that are too large for the weights, or too small for the length of the run.

    The rate is too high if a single update is a considerable share of the weights. It is too low if
    updates like the last one, scaled by the schedule, would move the weights by less than their own
    norm in the whole run, while gradients still point the same way from step to step. Fine-tuning
    has small updates too, but its gradients vary.
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
        """Return how far the weights can move in a stage, relative to their norm.

        ``update`` is how far the last step moved them. None if its learning rate was 0.
        """
        training, step_nimg = self._config.training, self._config.step_nimg
        stage = stages_of(self._config)[tick.phase[0]]

        def rate(step: int) -> float:
            return learning_rate(training, step * step_nimg, step_nimg, stage.num_images)

        last = rate(tick.step - 1 - stage.start_nimg // step_nimg)
        num_steps = -(-stage.num_images // step_nimg)
        rates = [rate(step) for step in range(0, num_steps, -(-num_steps // _NUM_POINTS))]
        return update / last * num_steps * sum(rates) / len(rates) if last > 0 else None
