"""The states of a sampler on its way from noise to images."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from data.preview import evenly_spaced
from diffusion.samplers import Denoise


class Frame(NamedTuple):
    """Images as they are before a step, or, with level 0, as they become."""

    level: float  # The noise level, or the time of flow matching.
    images: list[Tensor]  # uint8 [C, H, W] each, on the CPU.


class Trajectory:
    """The first state of steps that lie evenly, ``num`` of them or all, kept on the device.

    Hand the sampler :meth:`through` of its estimate and :meth:`end_step` as its callback.
    """

    def __init__(self, num: int) -> None:
        self._num, self._stride, self._step = num, 1, 0
        self._states: list[tuple[float, Tensor]] = []
        self._has_begun = False

    def through(self, estimate: Denoise) -> Denoise:
        """Return ``estimate``, which then notes what it is asked for."""

        def noted(x: Tensor, level: float) -> Tensor:
            if not self._has_begun and self._step % self._stride == 0:
                self._states.append((level, x))
            self._has_begun = True  # A step of second order asks twice.
            return estimate(x, level)

        return noted

    def end_step(self) -> None:
        """Note that the next state belongs to another step."""
        self._has_begun = False
        self._step += 1
        if len(self._states) == 2 * self._num:
            self._states, self._stride = self._states[::2], 2 * self._stride

    def frames(self, decode: Callable[[Tensor, float], Tensor]) -> list[Frame]:
        """Return up to ``num`` frames of states as ``decode(x, level)`` shows them."""
        chosen = evenly_spaced(self._num, len(self._states)).tolist()
        return [
            Frame(level, list(decode(x, level).cpu()))
            for level, x in (self._states[index] for index in chosen)
        ]
