"""Exponential moving average of the weights, with a half-life in images."""

import copy

import torch


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
    def update(self, beta: float, skip: torch.Tensor) -> None:
        """Move the average towards the weights by 1 - beta, or by nothing where ``skip`` is 1.

        ``skip`` is a float32 scalar on the weights' device; it is never read by the host.
        """
        # A beta of 0 means the first step: the average equals the weights, skipped or not.
        if beta == 0.0:
            torch._foreach_copy_(self._average, self._source)
            return
        weight = (1.0 - skip) * (1.0 - beta)
        if weight.device.type == "cpu":
            # One pass over the memory instead of three; a GPU would launch a kernel a parameter.
            torch._foreach_lerp_(self._average, self._source, [weight] * len(self._average))
            return
        step = torch._foreach_sub(self._source, self._average)
        torch._foreach_mul_(step, weight)
        torch._foreach_add_(self._average, step)
