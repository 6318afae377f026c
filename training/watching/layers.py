"""Whether every block of the network learns, and none of them explodes or saturates."""

from training.watching.finding import Finding
from training.watching.tick import Tick

_FIRST_STEP = 20  # In the first steps, zero-initialised layers keep gradients from other layers.
_DEAD = 1e-7  # Relative to the median gradient of all matrices.
_NUM_TICKS = 2  # Consecutive ticks in which a block has to be dead.
_LARGEST_GAIN = 12.0
_LARGEST_LOGIT = 200.0
_MOST_NAMED = 3


class LayerWatcher:
    """Reports blocks that get no gradient, amplify their input too much, or saturate softmax."""

    def __init__(self) -> None:
        self._num_dead: dict[str, int] = {}

    def look(self, tick: Tick) -> list[Finding] | None:
        if not tick.is_probed:
            return None
        return [*self._dead(tick), *_exploding(tick), *_saturated(tick)]

    def _dead(self, tick: Tick) -> list[Finding]:
        gradients = tick.by_block("gradient")
        dead = [name for name, size in gradients.items() if size < _DEAD]
        if tick.step >= _FIRST_STEP:
            self._num_dead = {name: self._num_dead.get(name, 0) + 1 for name in dead}
        found = [name for name, num in self._num_dead.items() if num >= _NUM_TICKS]
        if not found:
            return []
        return [
            Finding(
                name="layer_dead",
                message=f"layers of {_listed(found)} get no gradient and do not learn",
                remedy="look for what makes their output constant or cuts them off; a lower "
                "learning rate (--lr) or a longer warm-up (--lr-rampup) helps where they died in "
                "training",
            )
        ]


def _exploding(tick: Tick) -> list[Finding]:
    gains = {n: gain for n, gain in tick.by_block("gain").items() if gain > _LARGEST_GAIN}
    if not gains:
        return []
    worst = max(gains, key=gains.get)
    return [
        Finding(
            name="layer_exploding",
            message=f"the activations of {_listed(gains)} explode, up to {gains[worst]:.3g} times "
            f"what the block gets, where at most {_LARGEST_GAIN:g} times is usual",
            remedy="look at how the block is scaled and initialised, lower the learning rate "
            "(--lr), or clip gradients (--clip-grad=1)",
        )
    ]


def _saturated(tick: Tick) -> list[Finding]:
    logits = {n: size for n, size in tick.by_block("logit").items() if size > _LARGEST_LOGIT}
    if not logits:
        return []
    return [
        Finding(
            name="attention_saturated",
            message=f"attention scores in {_listed(logits)} reach {max(logits.values()):.3g}, "
            f"where at most {_LARGEST_LOGIT:g} is usual, so that softmax picks single tokens and "
            "hardly learns",
            remedy="normalise queries and keys in a new run (--qk-norm), or lower the learning "
            "rate (--lr)",
        )
    ]


def _listed(names: object) -> str:
    first, rest = list(names)[:_MOST_NAMED], list(names)[_MOST_NAMED:]
    more = f" and {len(rest)} more" if rest else ""
    return ", ".join(first) + more
