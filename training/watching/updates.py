"""What an optimizer step does to the weights and to their average, measured on a sample of them.

The sample is up to 2,048 elements of each parameter, evenly spaced in its memory and the same at
every tick. Only :meth:`UpdateMeter.measure`, at the end of a tick, waits for the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_utils import distributed
from training.ema import EMA
from training.optimizer import GuardedAdam

_NUM_SAMPLED = 2048  # Most elements of each parameter.


class UpdateMeter:
    """Compares weights, average and momentum before and after the last step of a tick.

    Args:
        parameters: Parameters of the network that is trained, a
            :class:`torch_utils.parameters.Parameters`.
        ema: Their moving average.
        optimizer: The optimizer that updates them.
        blocks: Names of the blocks of the network.
    """

    def __init__(
        self, parameters: Any, ema: EMA, optimizer: GuardedAdam, blocks: Sequence[str]
    ) -> None:
        self._own, self._average, self._optimizer = parameters.own, ema.own, optimizer
        shapes = dict(parameters.network.named_parameters())
        is_matrix = [shapes[name].ndim > 1 for name in parameters.names]
        self._is_matrix = torch.tensor(is_matrix)
        self._branches = _branches(parameters.names, is_matrix, blocks)
        self._before: dict[str, Tensor] | None = None

    def begin(self) -> None:
        """Keep a sample of what the step will change."""
        momentum = [self._optimizer.momentum(param) for param in self._own]
        self._before = dict(weight=_sample(self._own), average=_sample(self._average))
        if all(own is not None for own in momentum):
            self._before["momentum"] = _sample(momentum)

    def measure(self, beta: float) -> dict[str, float]:
        """Return statistics of the step that just ended, equal on all ranks. Collective.

        ``beta`` is the decay of the average in that step. Statistics that cannot be determined are
        missing: all of them after a step that the optimizer skipped, those of changes after one
        with a learning rate of 0.
        """
        before, self._before = self._before, None
        assert before is not None, "a step was measured whose begin was not"
        if float(self._optimizer.skipped):
            return {}
        sums = self._sums(before)
        columns = {name: sums[:, place] for place, name in enumerate(_SUMS)}
        found = {**_statistics(columns, beta), **self._gradients(columns)}
        if self._optimizer.lr > 0:
            found["lost_updates"] = _ratio(columns["lost"].sum(), columns["due"].sum())
            change, weight = (columns[name][self._is_matrix].sum() for name in ("change", "weight"))
            found["update_ratio"] = _ratio(change, weight) ** 0.5
        return found

    def _gradients(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Return the gradient of the branch of each block whose gradient is the smallest.

        The gradient of a branch is the largest root mean square among its matrices, relative to the
        median over all matrices.
        """
        sizes = (sums["gradient"] / sums["num"].clamp(min=1)).sqrt()
        usual = float(sizes[self._is_matrix].median())
        if not usual:
            return {}
        return {
            f"gradient/{block}": min(float(sizes[own].max()) for own in branches) / usual
            for block, branches in self._branches.items()
        }

    def _sums(self, before: dict[str, Tensor]) -> Tensor:
        """Return the sums [P, S] named by :data:`_SUMS`, float64 on the CPU.

        The sums over the samples of the P parameters are extrapolated to whole parameters.
        """
        own = self._own
        weight, average = _sample(own), _sample(self._average)
        gradient = _sample([_like(param.grad, param) for param in own])
        momentum = before.get("momentum", torch.zeros_like(gradient))
        change = weight - before["weight"]
        moves, is_due = change != 0, gradient != 0
        columns = [
            torch.ones_like(weight),
            before["weight"].square(),
            change.square(),
            is_due,
            is_due & ~moves,
            moves,
            moves & (weight == weight.bfloat16().float()),
            moves & (weight == weight.half().float()),
            gradient.square(),
            momentum.square(),
            gradient * momentum,
            (average - before["average"]).square(),
            (weight - before["average"]).square(),
            (weight - average).square(),
        ]
        counts = torch.tensor([_count(param) for param in own], device=weight.device)
        member = torch.repeat_interleave(
            torch.arange(len(own), device=weight.device), counts, output_size=len(weight)
        )
        values = torch.stack([column.to(torch.float64) for column in columns], dim=1)
        sums = torch.zeros(len(own), len(columns), dtype=torch.float64, device=weight.device)
        sums.index_add_(0, member, values)
        sizes = torch.tensor([param.numel() for param in own], device=weight.device)
        sums *= (sizes / counts.clamp(min=1))[:, None]
        return distributed.all_reduce_sum(sums).cpu()


def _branches(
    names: Sequence[str], is_matrix: Sequence[bool], blocks: Sequence[str]
) -> dict[str, list[list[int]]]:
    """Return the places of the matrices of each branch of a block, such as attention or MLP."""
    found: dict[str, dict[str, list[int]]] = {block: {} for block in blocks}
    for place, name in enumerate(names):
        block = next((own for own in blocks if name.startswith(f"backbone.{own}.")), None)
        if block is not None and is_matrix[place]:
            *path, layer, _ = name.removeprefix(f"backbone.{block}.").split(".")
            found[block].setdefault(".".join(path) or layer, []).append(place)
    return {block: list(branches.values()) for block, branches in found.items() if branches}


_SUMS = (
    *("num", "weight", "change", "due", "lost", "moved", "bf16", "fp16"),
    *("gradient", "momentum", "product", "average_step", "average_gap", "distance"),
)


def _statistics(sums: dict[str, Tensor], beta: float) -> dict[str, float]:
    total = {name: float(values.sum()) for name, values in sums.items()}
    found = {"average_distance": _ratio(total["distance"], total["weight"]) ** 0.5}
    if total["gradient"] * total["momentum"] > 0:
        norms = (total["gradient"] * total["momentum"]) ** 0.5
        found["gradient_alignment"] = total["product"] / norms
    if total["moved"]:
        found["rounded_weights"] = max(total["bf16"], total["fp16"]) / total["moved"]
    # A smaller step of the average would be lost in the rounding of float32.
    expected = (1 - beta) * total["average_gap"] ** 0.5
    if expected > 1e-6 * total["weight"] ** 0.5:
        found["average_step"] = total["average_step"] ** 0.5 / expected
    return found


def _ratio(part: float | Tensor, whole: float | Tensor) -> float:
    return float(part / whole) if whole else 0.0


def _count(tensor: Tensor) -> int:
    return min(tensor.numel(), _NUM_SAMPLED)


@torch.no_grad()
def _sample(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sampled elements of all tensors, float32, each tensor's in memory order."""
    parts = []
    for tensor in tensors:
        num = _count(tensor)
        step = tensor.numel() // max(num, 1)
        flat = tensor.detach().as_strided((num,), (max(step, 1),), tensor.storage_offset())
        parts.append(flat.to(torch.float32))
    return torch.cat(parts)


def _like(grad: Tensor | None, param: Tensor) -> Tensor:
    """Return a gradient in the memory layout of its parameter; zeros if there is none."""
    if grad is None:
        return torch.zeros_like(param)
    return grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)
