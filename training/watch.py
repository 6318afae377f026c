"""Warnings of a run about itself, drawn from its own diagnostics."""

import itertools

from training.config import RunConfig
from training.telemetry import Stats

# Nothing is said of the first steps: the encoder has no gradient in the first two, since the
# modulation and the output begin at zero, and little in those after.
_FIRST_STEP = 200
_SMALL_NORM = 1e-3  # Of the square root of the width, the length of a vector of unit variance.
_SMALL_ENCODER_GRADIENT = 1e-3  # Of the gradient of the DiT.
_VANISHING = 0.5  # Of the gradient of the next block, for each of at least three.

_REMEDIES = {
    "context": "the context is near zero and is not being used: raise the learning rate (--lr=2e-4 "
    "instead of 1e-4), begin with a context that has an effect (--warm-start-adaln), or pre-train "
    "the encoder (--pretrain-encoder=50)",
    "encoder": "the encoder's gradient is far below the DiT's, so that the encoder hardly learns: "
    "raise the learning rate, or lower the number of blocks of the DiT",
    "layers": "the gradient falls exponentially from block to block and vanishes: use fewer blocks "
    "(--depth=6) of a larger width",
}


class Watch:
    """Warns when the diagnostics of a run say that its context is not learned.

    A warning is given when its reason appears, and again only after that has gone.
    """

    def __init__(self, config: RunConfig) -> None:
        self._model = config.model
        self._known: set[str] = set()

    def warnings(self, fields: Stats, step: int) -> list[str]:
        """Return the new warnings of a tick that ends after ``step`` optimizer steps."""
        if "debug/context_norm" not in fields or step < _FIRST_STEP:
            return []
        mean = {name: value["mean"] for name, value in fields.items()}
        holds = {
            "context": mean["debug/context_norm"] < _SMALL_NORM * self._model.context_dim**0.5,
            "encoder": mean.get("debug/encoder_grad_norm", 0.0)
            < _SMALL_ENCODER_GRADIENT * mean.get("debug/dit_grad_norm", 0.0),
            "layers": self._vanishes(mean),
        }
        found = {name for name, value in holds.items() if value}
        fresh = sorted(found - self._known)
        self._known = found
        return [f"Warning: {_REMEDIES[name]}." for name in fresh]

    def _vanishes(self, mean: dict[str, float]) -> bool:
        names = [f"debug/dit_layer_{i}_grad_norm" for i in range(self._model.num_blocks)]
        norms = [mean[name] for name in names if name in mean]
        if len(norms) < 3 or not any(norms):  # As while the encoder is trained alone.
            return False
        ratios = [low / max(high, 1e-30) for low, high in itertools.pairwise(norms)]
        backward = all(ratio < _VANISHING for ratio in ratios)
        return backward or all(ratio > 1 / _VANISHING for ratio in ratios)
