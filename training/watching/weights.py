"""Whether the weights have enough precision for their updates."""

from training.watching.finding import Finding
from training.watching.tick import Tick

_MOST_ROUNDED = 0.9  # By chance, only one float32 weight in 65,536 is representable in bfloat16.
_MOST_LOST = 0.5


class PrecisionWatcher:
    """Reports weights that are rounded to bfloat16 or float16, and updates that change nothing."""

    def look(self, tick: Tick) -> list[Finding] | None:
        if not tick.is_probed:
            return None
        rounded, lost = tick.mean("Watch/rounded_weights"), tick.mean("Watch/lost_updates")
        if rounded is not None and rounded > _MOST_ROUNDED:
            return [
                Finding(
                    name="weights_rounded",
                    message=f"{rounded:.0%} of the weights that a step changed have no more digits "
                    "than 16-bit numbers, where next to none should, so that small updates are "
                    "lost",
                    remedy="keep the weights in float32 and compute in 16 bits by --precision=bf16",
                )
            ]
        if lost is not None and lost > _MOST_LOST:
            return [
                Finding(
                    name="updates_lost",
                    message=f"a step leaves {lost:.0%} of the weights that have a gradient as they "
                    "were, because their updates are smaller than their last digit",
                    remedy="raise the learning rate (--lr), and keep the weights in float32",
                )
            ]
        return []
