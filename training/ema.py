"""Moving averages of the weights: with a half-life in images, and with power-function profiles."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from torch_utils.parameters import Parameters
from training.config import TrainingConfig
from training.power_ema import power_beta, power_gamma


def ema_beta(cur_nimg: int, batch: int, half_life_kimg: float, rampup: float | None) -> float:
    """Return the decay of one step: ``0.5 ** (batch / half_life)``.

    The half-life is ``half_life_kimg * 1000`` images, limited to ``rampup * cur_nimg`` while the
    run is young (``cur_nimg`` counts the images before this step), so that the first step copies
    the weights. Source: EDM (arXiv 2206.00364), Appendix F.
    """
    half_life = half_life_kimg * 1000
    if rampup is not None:
        half_life = min(half_life, rampup * cur_nimg)
    return 0.5 ** (batch / max(half_life, 1e-8))


class WeightCopy:
    """A second set of a network's weights, which begins as a copy; buffers are constants.

    ``network`` is a copy of the network that has these weights as its parameters within
    :meth:`filled`. ``own`` is what this process holds of each weight.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self.network, self.own = parameters.averaged_network()

    def filled(self) -> AbstractContextManager:
        """Return a context in which :attr:`network` can be used. Collective."""
        return self._parameters.filled(self.network, self.own)

    def state_dict(self) -> dict[str, Any]:
        """Return what a training state keeps."""
        return self._parameters.state_dict(self.own)

    def whole_tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """Yield the state with these weights by name; sharded: None but on rank 0. Collective."""
        return self._parameters.whole_tensors(self.own)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. Collective."""
        for name, own in zip(self._parameters.names, self.own, strict=True):
            self._parameters.unpack(name, state[name], own)


class EMA(WeightCopy):
    """A moving average of a network's parameters."""

    @torch.no_grad()
    def update(self, beta: float, skip: Tensor) -> None:
        """Move the average towards the weights by 1 - ``beta``, or not at all if ``skip`` is 1.

        ``skip`` is a float32 scalar on the weights' device; the host never reads it.
        """
        average, source = self.own, self._parameters.own
        # A beta of 0 marks the first step: the average becomes the weights, skipped or not.
        if beta == 0.0:
            torch._foreach_copy_(average, source)
            return
        weight = (1.0 - skip) * (1.0 - beta)
        if weight.device.type == "cpu":
            # One pass over memory instead of three; a GPU would launch one kernel per parameter.
            torch._foreach_lerp_(average, source, [weight] * len(average))
            return
        step = torch._foreach_sub(source, average)
        torch._foreach_mul_(step, weight)
        torch._foreach_add_(average, step)


class PowerEMA:
    """Moving averages of a network's parameters with power-function profiles, one for each std.

    Source: EDM2 (arXiv 2312.02696), Section 3.1; see :mod:`training.power_ema`.
    """

    def __init__(self, parameters: Parameters, stds: Sequence[float]) -> None:
        self.stds = tuple(stds)
        self._parameters = parameters
        self._names, self._source = parameters.names, parameters.own
        self._gammas = {std: power_gamma(std) for std in self.stds}
        self._averages = {
            std: [param.detach().clone() for param in self._source] for std in self.stds
        }

    @torch.no_grad()
    def update(self, cur_nimg: int, batch: int) -> None:
        """Move every average towards the weights after a step that ended at ``cur_nimg`` images.

        Skipped steps count too: a profile weights by time, whether or not the weights changed.
        """
        for std, average in self._averages.items():
            beta = power_beta(self._gammas[std], cur_nimg, batch)
            torch._foreach_lerp_(average, self._source, 1 - beta)

    def compact(self, std: float) -> Iterator[tuple[str, Tensor | None]]:
        """Yield the network's state by name, with the averages of one profile as its parameters.

        Averages are float16, except that a tensor with a value too large for it stays float32.
        Buffers keep their dtype. Collective where sharded; then averages are None but on rank 0.
        """
        names = set(self._names)
        for name, value in self._parameters.whole_tensors(self._averages[std]):
            yield name, _half(value) if name in names and value is not None else value

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return what a training state keeps of the averages, by std and name."""
        return {
            str(std): {
                name: self._parameters.pack(name, value)
                for name, value in zip(self._names, average, strict=True)
            }
            for std, average in self._averages.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore what :meth:`state_dict` returned, for the same stds. Collective."""
        for std, average in self._averages.items():
            for name, value in zip(self._names, average, strict=True):
                self._parameters.unpack(name, state[str(std)][name], value)


def describe_average(training: TrainingConfig, progress: Mapping[str, Any]) -> dict[str, Any]:
    """Return which average a snapshot of this ``progress`` holds, as facts for a score row."""
    if "ema_std" not in progress:
        return dict(halflife_kimg=training.ema_kimg, rampup=training.ema_rampup)
    made = {"posthoc": progress["posthoc"]} if "posthoc" in progress else {}
    return dict(std=progress["ema_std"], **made)


def _half(tensor: Tensor) -> Tensor:
    half = tensor.half()
    return half.cpu() if half.isfinite().all() else tensor
