"""Whether the weight average follows the weights, and has as low a loss as they have."""

from training.config import TrainingConfig
from training.watching.finding import Finding
from training.watching.tick import Tick

# Limits on how far the average moves in a step, relative to the distance its decay implies.
_LEAST_STEP, _MOST_STEP = 0.5, 2.0
_MOST_BEHIND = 0.25  # Largest accepted excess of the average's loss, as a share of the loss.
_NUM_ERRORS = 4.0  # Standard errors by which the excess has to differ from zero.
_HALF_LIVES = 4  # Until the initial weights hardly matter: they then have a share of 1/16.


class AverageWatcher:
    """Reports an average that does not move as it should, or that lags behind the weights.

    Args:
        training: Settings of the run, of which those of the average are used.
        step_nimg: Images per optimizer step.
    """

    def __init__(self, training: TrainingConfig, step_nimg: int) -> None:
        self._training, self._step_nimg = training, step_nimg

    def look(self, tick: Tick) -> list[Finding] | None:
        if not tick.is_probed:
            return None
        step = tick.mean("Watch/average_step")
        if step is not None and not _LEAST_STEP <= step <= _MOST_STEP:
            return [
                Finding(
                    name="average_not_updated",
                    message=f"in one step the averaged weights moved {step:.3g} times as far as "
                    "--ema-kimg and their distance to the weights imply, where 1 is expected",
                    remedy="check the code that updates the average: snapshots and pictures use "
                    "the average, not the weights that are trained",
                )
            ]
        return self._behind(tick)

    def _behind(self, tick: Tick) -> list[Finding]:
        gap, error = tick.mean("Watch/average_gap"), tick.standard_error("Watch/average_gap")
        loss = tick.mean("Watch/loss")
        if gap is None or error is None or not loss or self._will_catch_up(tick):
            return []
        if gap <= max(_MOST_BEHIND * abs(loss), _NUM_ERRORS * error):
            return []
        return [
            Finding(
                name="average_behind",
                message=f"the loss of the averaged weights is {gap / abs(loss):.0%} above that of "
                f"the weights, where at most {_MOST_BEHIND:.0%} is usual",
                remedy="shorten the average (--ema-kimg), or limit it while the run is young "
                "(--ema-rampup=0.05)",
            )
        ]

    def _will_catch_up(self, tick: Tick) -> bool:
        """Return whether a fixed half-life explains the lag, and the run is long enough to end it.

        With ``--ema-rampup`` the average has no such lag.
        """
        training = self._training
        if training.ema_rampup is not None:
            return False
        steps = _HALF_LIVES * training.ema_kimg * 1000 / self._step_nimg
        return tick.step < steps < tick.num_steps
