"""Finds the first layer whose values are not finite."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torch_utils import distributed


@contextlib.contextmanager
def _first_not_finite(network: nn.Module) -> Iterator[list[str]]:
    """Yield a list that gets the name of the first module whose output is not finite, if any.

    If the inputs of that module were not finite either, its parent is named: the values come from
    arithmetic between the parent's children.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple, output: Any) -> None:
            if found or _are_finite(output):
                return
            found.append(name if _are_finite(args) else name.rpartition(".")[0] or name)

        return look

    with contextlib.ExitStack() as hooks:
        for name, module in network.named_modules():
            if name:
                hooks.callback(module.register_forward_hook(watch(name)).remove)
        yield found


def _are_finite(values: Any) -> bool:
    if isinstance(values, Tensor):
        return not values.is_floating_point() or bool(values.isfinite().all())
    if isinstance(values, tuple | list):
        return all(map(_are_finite, values))
    return True


@torch.no_grad()
def first_not_finite(
    objective: nn.Module, network: nn.Module, batch: tuple[Any, ...]
) -> str | None:
    """Return where the values of a step first were not finite, None if all are. Collective.

    ``network`` is the part of the objective that is trained; its modules are examined.

    The forward pass is repeated on the last ``batch`` (images, conditions, draws) of each rank. The
    weights are still those of the step, because non-finite gradients update nothing.
    """
    device = batch[0].device
    found = "the data" if not _are_finite(batch[0]) else None
    plain = contextlib.nullcontext()
    if network.is_compiled:  # Compiled code does not call the hooks of modules.
        plain = torch.compiler.set_stance("force_eager")
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        plain,
        _first_not_finite(network) as modules,
    ):
        loss = objective(*batch)
    if found is None and modules:
        found = f"the output of {modules[0]}"
    if found is None and not _are_finite(loss):
        found = "the loss"
    everywhere = distributed.gather_objects(found)
    return next((place for place in everywhere if place is not None), None)
