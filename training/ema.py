"""Moving averages of the weights: with a half-life in images, and with power-function profiles."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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


class EMA:
    """A moving average of a network's parameters; buffers are constants and are left alone."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._source = list(network.parameters())
        self._average = list(self.network.parameters())

    @torch.no_grad()
    def update(self, beta: float, skip: Tensor) -> None:
        """Move the average towards the weights by 1 - beta, or by nothing where ``skip`` is 1.

        ``skip`` is a float32 scalar on the weights' device; it is never read by the host.
        """
        average, source = self._average, self._source
        # A beta of 0 means the first step: the average equals the weights, skipped or not.
        if beta == 0.0:
            torch._foreach_copy_(average, source)
            return
        weight = (1.0 - skip) * (1.0 - beta)
        if weight.device.type == "cpu":
            # One pass over the memory instead of three; a GPU would launch a kernel a parameter.
            torch._foreach_lerp_(average, source, [weight] * len(average))
            return
        step = torch._foreach_sub(source, average)
        torch._foreach_mul_(step, weight)
        torch._foreach_add_(average, step)


class PowerEMA:
    """Moving averages of a network's parameters with power-function profiles, one for each std.

    Source: EDM2 (arXiv 2312.02696), Section 3.1; see :mod:`training.power_ema`.
    """

    def __init__(self, network: torch.nn.Module, stds: Sequence[float]) -> None:
        self.stds = tuple(stds)
        self._network = network
        self._names, self._source = zip(*network.named_parameters(), strict=True)
        self._gammas = {std: power_gamma(std) for std in self.stds}
        self._averages = {
            std: [param.detach().clone() for param in self._source] for std in self.stds
        }

    @torch.no_grad()
    def update(self, cur_nimg: int, batch: int) -> None:
        """Move every average towards the weights after a step that ended at ``cur_nimg`` images.

        A skipped step counts too: a profile weighs the weights by their time, changed or not.
        """
        for std, average in self._averages.items():
            beta = power_beta(self._gammas[std], cur_nimg, batch)
            torch._foreach_lerp_(average, self._source, 1 - beta)

    def compact(self, std: float) -> dict[str, Tensor]:
        """Return the network's state with the averages of one profile in place of its parameters.

        They are float16, but for tensors with a value that is too large for it: those stay
        float32. Buffers are as they are.
        """
        averages = zip(self._names, self._averages[std], strict=True)
        return {**self._network.state_dict(), **{name: _half(value) for name, value in averages}}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the averages by std and name."""
        return {
            str(std): dict(zip(self._names, average, strict=True))
            for std, average in self._averages.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what :meth:`state_dict` returned, for the same stds."""
        for std, average in self._averages.items():
            for name, value in zip(self._names, average, strict=True):
                value.copy_(state[str(std)][name])


def describe_average(training: TrainingConfig, progress: Mapping[str, Any]) -> dict[str, Any]:
    """Return which average a snapshot's weights are, by its ``progress``, for a score row."""
    if "ema_std" not in progress:
        return dict(halflife_kimg=training.ema_kimg, rampup=training.ema_rampup)
    made = {"posthoc": progress["posthoc"]} if "posthoc" in progress else {}
    return dict(std=progress["ema_std"], **made)


def _half(tensor: Tensor) -> Tensor:
    half = tensor.half()
    return half.cpu() if half.isfinite().all() else tensor
