"""Checks of a step's random draws and inputs: noise, dropped conditions, constant conditions."""

import math
from typing import Any

from torch import Tensor

from data.images.dataset import Cond
from torch_utils import distributed
from training.config import RunConfig
from training.family import TrainingData
from training.watching.finding import Finding

_LOG_CHANCE = math.log(1e9)  # A draw is reported if its probability is below 1e-9.
_MIN_ROWS = 16
_NUM_VALUES = 8  # Leading values of a tensor by which two draws are told apart.
_CONDITIONS = ("label", "text", "cls", "patches")
_SAME = 1e-6  # Relative difference up to which contexts count as equal.


class DrawsWatcher:
    """Checks the last pass of each tick.

    Every rank has a watcher, because ranks compare what they draw; only rank 0's findings are
    reported.
    """

    def __init__(self, config: RunConfig, data: TrainingData) -> None:
        counts = list(data.class_counts) if data.num_classes else []
        # Share of the most common class: an upper bound on the chance that two labels are equal.
        self._most_common = max(counts) / max(sum(counts), 1) if counts else 0.0
        self._dropped: dict[str, list[int]] = {}
        self._same: dict[str, tuple[tuple[float, ...], int]] = {}
        self._last_noise: list[tuple[float, ...]] = []

    def findings(self, objective: Any, images: Tensor, cond: Cond, draws: Any) -> list[Finding]:
        """Return what is wrong with the draws and conditions of a tick's last pass. Collective.

        Args:
            objective: A :class:`training.family.Objective`.
            images, cond: The batch of the pass, as ``objective.prepare`` returns it.
            draws: The draws of the step for the rows of this batch.
        """
        found = self._of_noise(draws)
        found += self._of_drops(objective.dropped(draws))
        found += self._of_conditions(cond)
        contexts = objective.contexts(images, cond, draws)
        inputs = [images, *(cond[name] for name in _CONDITIONS if name in cond)]
        if all(_differs(values) for values in inputs):
            found += _of_contexts(contexts)
        return found

    def _of_noise(self, draws: Any) -> list[Finding]:
        # If ranks do not share a batch evenly, a pass may have no rows.
        own = _fingerprint(draws.noise[0]) if len(draws.noise) else None
        noise = [values for values in distributed.gather_objects(own) if values is not None]
        before, self._last_noise = self._last_noise, noise
        if len(set(noise)) < len(noise):
            name, who = "noise_equal", f"ranks, of which there are {len(noise)}, have"
        elif noise and noise == before:
            name, who = "noise_repeats", "the last steps of two ticks have"
        else:
            return []
        first = ", ".join(f"{value:.4f}" for value in noise[0][:3])
        return [
            Finding(
                name=name,
                message=f"Noise is drawn again: {who} the same ({first}, ...)",
                remedy="draw noise from the generator of rng.Step, for the global batch, and keep "
                "the rows of the rank",
            )
        ]

    def _of_drops(self, dropped: dict[str, tuple[Tensor, float]]) -> list[Finding]:
        wrong: dict[str, list[str]] = {}
        for name, (rows, expected) in dropped.items():
            counts = self._dropped.setdefault(name, [0, 0])
            counts[0] += int(rows.sum())
            counts[1] += len(rows)
            if is_unlikely(*counts, expected):
                share = counts[0] / counts[1]
                kind = "condition_dropped" if share > expected else "condition_kept"
                text = f"{share:.1%} without {name} (expected {expected:.1%})"
                wrong.setdefault(kind, []).append(text)
        return [
            Finding(
                name=kind,
                message="Conditions are not dropped as often as they should be: of "
                f"{max(num for _, num in self._dropped.values())} rows, {', '.join(texts)}",
                remedy="see how the drop of conditions is drawn (Objective.draw): by it the model "
                "learns both with and without its condition",
            )
            for kind, texts in wrong.items()
        ]

    def _of_conditions(self, cond: Cond) -> list[Finding]:
        """Return a finding on conditions that have been equal for too many rows in succession."""
        constant, most = [], 0
        for name in _CONDITIONS:
            values = cond.get(name)
            if values is None or not len(values) or (name == "label" and not self._most_common):
                continue
            first, num = _fingerprint(values[0]), 0
            if not _differs(values):
                before, num = self._same.get(name, (first, 0))
                num = len(values) + num * (first == before)
            self._same[name] = first, num
            # Many consecutive rows of a common class can be chance.
            surprise = -(num - 1) * math.log(self._most_common) if name == "label" else math.inf
            if num >= _MIN_ROWS and surprise >= _LOG_CHANCE:
                constant.append(f"{name} is {'the same' if values.any() else 'zero'}")
                most = max(most, num)
        if not constant:
            return []
        return [
            Finding(
                name="condition_constant",
                message="Conditions are constant where rows should differ: in all of "
                f"{most} rows that the network got, {' and '.join(constant)}",
                remedy="see what the data hold and deliver (TrainingData.__getitems__), and what "
                "the codec makes of it",
            )
        ]


def is_unlikely(num_hits: int, num: int, expected: float) -> bool:
    """Return whether ``num_hits`` in ``num`` trials have a probability below 1e-9.

    The Chernoff bound decides: exp(-num * KL(num_hits / num || expected)).
    """
    if num == 0:
        return False
    share, divergence = num_hits / num, 0.0
    for part, likely in ((share, expected), (1 - share, 1 - expected)):
        if part > 0:
            divergence += math.inf if likely <= 0 else part * math.log(part / likely)
    return num * divergence > _LOG_CHANCE


def _differs(values: Tensor) -> bool:
    return bool((values != values[:1]).any())


def _fingerprint(values: Tensor) -> tuple[float, ...]:
    return tuple(values.flatten()[:_NUM_VALUES].tolist())


def _of_contexts(contexts: dict[str, Tensor]) -> list[Finding]:
    lost = [
        name
        for name, value in contexts.items()
        if len(value) > 1 and (value - value[:1]).abs().max() <= _SAME * value.abs().max()
    ]
    if not lost:
        return []
    num = len(contexts[lost[0]])
    return [
        Finding(
            name="condition_dropped",
            message=f"Nothing of {' and '.join(lost)} reaches the network: with nothing dropped, "
            f"its context is the same for all {num} rows of a batch, whose conditions differ",
            remedy="see what the conditioner makes of its conditions (Network.context)",
        )
    ]
