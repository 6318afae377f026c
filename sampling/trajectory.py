"""The intermediate states of a sampler, from noise to images."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from data.preview import evenly_spaced
from diffusion.samplers import Denoise


class Frame(NamedTuple):
    """Images as they are before a step of the sampler or, at level 0, finished."""

    level: float  # The noise level, or the time of flow matching.
    images: list[Tensor]  # [C, H, W], uint8, each, on the CPU.


class Trajectory:
    """Records a sampler's states before evenly spaced steps, on the device.

    Pass the sampler ``through(estimate)`` in place of its estimate, and :meth:`end_step` as its
    callback.

    Args:
        num: Number of states to show; fewer than twice as many are kept.
    """

    def __init__(self, num: int) -> None:
        self._num, self._stride, self._step = num, 1, 0
        self._states: list[tuple[float, Tensor]] = []
        self._has_begun = False

    def through(self, estimate: Denoise) -> Denoise:
        """Return ``estimate`` wrapped to record the state at the start of a step."""

        def noted(x: Tensor, level: float) -> Tensor:
            if not self._has_begun and self._step % self._stride == 0:
                self._states.append((level, x))
            self._has_begun = True  # A second-order step evaluates twice.
            return estimate(x, level)

        return noted

    def end_step(self) -> None:
        """Mark the end of a step, so that the next state belongs to another one."""
        self._has_begun = False
        self._step += 1
        if len(self._states) == 2 * self._num:
            self._states, self._stride = self._states[::2], 2 * self._stride

    def frames(self, decode: Callable[[Tensor, float], Tensor]) -> list[Frame]:
        """Return up to ``num`` frames, evenly spaced, with the images ``decode(x, level)``.

        ``decode`` returns images [N, C, H, W], uint8, for a state.
        """
        chosen = evenly_spaced(self._num, len(self._states)).tolist()
        return [
            Frame(level, list(decode(x, level).cpu()))
            for level, x in (self._states[index] for index in chosen)
        ]
