"""Training statistics: accumulated on the device, summed over ranks once a tick."""

import math
from collections.abc import Sequence

import torch

from torch_utils import distributed


class StatsCollector:
    """Running count, sum and sum of squares of named scalars.

    :meth:`report` never waits for the device. :meth:`collect`, called by every rank at the end of a
    tick, returns ``{name: {num, mean, std}}`` over all ranks and starts over. All ranks must report
    the same names between two of its calls.
    """

    def __init__(self) -> None:
        self._moments: dict[str, torch.Tensor] = {}

    def report(
        self, name: str, value: torch.Tensor | float, rows: torch.Tensor | None = None
    ) -> None:
        """Add the finite elements of ``value``, where ``rows``, bool of the same shape, is True."""
        value = torch.as_tensor(value).detach().flatten().to(torch.float32)
        finite = value.isfinite() if rows is None else value.isfinite() & rows.flatten()
        value = torch.where(finite, value, 0.0)
        self._add(name, torch.stack([finite.sum(), value.sum(), value.square().sum()]))

    def report_groups(self, names: Sequence[str], value: torch.Tensor, group: torch.Tensor) -> None:
        """Add every finite ``value[n]`` to the statistic ``names[group[n]]``.

        Args:
            value: [N], floating point.
            group: [N], integers; elements outside [0, len(names)) are ignored.
        """
        value = value.detach().to(torch.float32)
        numbers = torch.arange(len(names), device=value.device)
        member = value.isfinite() & (group == numbers[:, None])  #      [K, N]
        value = torch.where(member, value, 0.0)
        sums = torch.stack([member.sum(1), value.sum(1), value.square().sum(1)], dim=1)
        for name, moments in zip(names, sums, strict=True):
            self._add(name, moments)

    def _add(self, name: str, moments: torch.Tensor) -> None:
        moments = moments.to(torch.float64)
        if name in self._moments:
            moments += self._moments[name].to(moments.device)
        self._moments[name] = moments

    def collect(self) -> dict[str, dict[str, float]]:
        """Return the statistics of all ranks since the last call. Collective; synchronises."""
        sums = self.state_dict()
        self._moments = {}
        result = {}
        for name, moments in sums.items():
            count, total, squares = moments.tolist()
            mean = total / count if count else math.nan
            variance = max(squares / count - mean**2, 0.0) if count else math.nan
            result[name] = dict(num=int(count), mean=mean, std=variance**0.5)
        return result

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the sums of all ranks since the last :meth:`collect`. Collective; synchronises."""
        names = sorted(self._moments)
        if not names:
            return {}
        device = self._moments[names[0]].device
        stacked = torch.stack([self._moments[name].to(device) for name in names])
        return dict(zip(names, distributed.all_reduce_sum(stacked).cpu(), strict=True))

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from sums that :meth:`state_dict` returned; rank 0 holds them for all ranks."""
        self._moments = dict(state) if distributed.is_main() else {}
