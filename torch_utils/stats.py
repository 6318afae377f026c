"""Training statistics: accumulated on the device, summed over ranks once a tick."""

import torch

from torch_utils import distributed


class StatsCollector:
    """Running count, sum and sum of squares of named scalars.

    :meth:`report` adds a few device operations and never waits for the device. :meth:`collect`,
    called by every rank at the end of a tick, returns ``{name: {num, mean, std}}`` over all ranks
    and starts anew. Every rank must report the same names between two calls of it.
    """

    def __init__(self) -> None:
        self._moments: dict[str, torch.Tensor] = {}

    def report(self, name: str, value: torch.Tensor | float) -> None:
        """Add every element of ``value`` (any shape) to the statistics of ``name``."""
        value = torch.as_tensor(value).detach().flatten().to(torch.float32)
        moments = torch.stack(
            [
                torch.full([], float(value.numel()), device=value.device),
                value.sum(),
                (value**2).sum(),
            ]
        ).to(torch.float64)
        if name in self._moments:
            self._moments[name] += moments
        else:
            self._moments[name] = moments

    def collect(self) -> dict[str, dict[str, float]]:
        """Return the statistics of all ranks since the last call. Collective; synchronises."""
        names = sorted(self._moments)
        if not names:
            return {}
        device = self._moments[names[0]].device
        stacked = torch.stack([self._moments[name].to(device) for name in names])
        distributed.all_reduce_sum(stacked)
        self._moments = {}
        result = {}
        for name, (count, total, squares) in zip(names, stacked.tolist(), strict=True):
            mean = total / count
            variance = max(squares / count - mean**2, 0.0)
            result[name] = dict(num=int(count), mean=mean, std=variance**0.5)
        return result
