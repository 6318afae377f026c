"""Whether a set-conditioned model learns its context, from the diagnostics of its objective."""

import itertools

from models.config import ModelConfig
from training.watching.finding import Finding
from training.watching.tick import Tick

# The first steps are not judged: the encoder has no gradient in the first two, as modulation and
# output layers are zero-initialised, and little in those that follow.
_FIRST_STEP = 200
_SMALL_NORM = 1e-3  # Relative to sqrt(width), the norm of a vector of unit variance.
_SMALL_ENCODER_GRADIENT = 1e-3  # Relative to the gradient of the DiT.
_VANISHING = 0.5  # Gradients vanish if each of 3 or more blocks has less of its neighbour's.

CONTEXT = Finding(
    name="context_near_zero",
    message="the context is near zero and is not being used",
    remedy="raise the learning rate (--lr=2e-4 instead of 1e-4), begin with a context that has an "
    "effect (--warm-start-adaln), or pre-train the encoder (--pretrain-encoder=50)",
)
ENCODER = Finding(
    name="encoder_not_learning",
    message="the encoder's gradient is far below the DiT's, so that the encoder hardly learns",
    remedy="raise the learning rate, or lower the number of blocks of the DiT",
)
LAYERS = Finding(
    name="gradient_vanishes",
    message="the gradient falls exponentially from block to block and vanishes",
    remedy="use fewer blocks (--depth=6) of a larger width",
)


class SetContextWatcher:
    """Reports a context near zero, an encoder with hardly any gradient, or vanishing gradients.

    Args:
        model: Settings of the network. Only set-conditioned models have these diagnostics; no other
            model is judged.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._model = model

    def look(self, tick: Tick) -> list[Finding] | None:
        norm = tick.mean("debug/context_norm")
        if norm is None:
            return None
        if tick.step < _FIRST_STEP:
            return []
        encoder, dit = (tick.mean(f"debug/{part}_grad_norm") or 0.0 for part in ("encoder", "dit"))
        holds = {
            CONTEXT: norm < _SMALL_NORM * self._model.context_dim**0.5,
            ENCODER: encoder < _SMALL_ENCODER_GRADIENT * dit,
            LAYERS: self._vanishes(tick),
        }
        return [finding for finding, is_so in holds.items() if is_so]

    def _vanishes(self, tick: Tick) -> bool:
        means = [tick.mean(f"debug/dit_layer_{i}_grad_norm") for i in range(self._model.num_blocks)]
        norms = [norm for norm in means if norm is not None]
        if len(norms) < 3 or not any(norms):  # All are zero while the encoder is pre-trained.
            return False
        ratios = [low / max(high, 1e-30) for low, high in itertools.pairwise(norms)]
        backward = all(ratio < _VANISHING for ratio in ratios)
        return backward or all(ratio > 1 / _VANISHING for ratio in ratios)
