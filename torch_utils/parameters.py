"""The parameters of a network as this process holds them: whole here, in parts when sharded."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from torch_utils.reuse import fixed_weights


class Parameters:
    """What optimizer, averages and states work on.

    A sharded network has a subclass, :class:`torch_utils.sharding.ShardedParameters`. Every method
    is collective there.

    Attributes:
        names: Of the parameters, in the network's order.
        own: What this process holds of each, which is updated in place.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        names, own = zip(*network.named_parameters(), strict=True)
        self.names: tuple[str, ...] = names
        self.own: tuple[nn.Parameter, ...] = own

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for param in self.own:
            param.grad = None

    def take_grads(self) -> list[Tensor]:
        """Put what this process holds of each gradient at ``own``, and return those there are."""
        return [param.grad for param in self.own if param.grad is not None]

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the norm of each of ``tensors`` [P], as far as this process holds it."""
        return torch.stack(torch._foreach_norm(list(tensors)))

    def norm(self, tensors: Sequence[Tensor], norms: Tensor) -> Tensor:
        """Return the norm of whole tensors, of which this process holds ``tensors``.

        ``norms`` are what :meth:`norms` returned.
        """
        return torch.linalg.vector_norm(norms)

    def pack(self, name: str, own: Tensor) -> Any:
        """Return what a state keeps of a tensor that lies as the parameter ``name`` does."""
        return own.detach()

    def unpack(self, name: str, stored: Any, own: Tensor) -> None:
        """Copy what a state kept into ``own``, as far as this process holds it."""
        own.copy_(stored)

    def gather(self, name: str, own: Tensor) -> Tensor | None:
        """Return the whole tensor of which this process holds ``own``; None but on rank 0."""
        return own

    def averaged_network(self) -> tuple[nn.Module, list[Tensor]]:
        """Return a copy of the network for sampling, and what an average of its weights is kept in.

        The average begins with the weights. The copy has it as its parameters within
        :meth:`filled`.
        """
        network = copy.deepcopy(self.network).eval().requires_grad_(False)
        return network, list(network.parameters())

    def filled(self, network: nn.Module, own: Sequence[Tensor]) -> AbstractContextManager:
        """Return a context in which a network of :meth:`averaged_network` can be used."""
        return contextlib.nullcontext()

    def load(self, network_state: Mapping[str, Any]) -> None:
        """Restore the network from what :meth:`state_dict` returned."""
        self.network.load_state_dict(network_state)

    def state_dict(self, own: Sequence[Tensor]) -> dict[str, Any]:
        """Return what a state keeps of the network with ``own`` as its parameters."""
        packed = {name: self.pack(name, t) for name, t in zip(self.names, own, strict=True)}
        return {name: packed.get(name, value) for name, value in self.network.state_dict().items()}

    def whole_tensors(self, own: Sequence[Tensor]) -> Iterator[tuple[str, Tensor | None]]:
        """Yield the same by name, as whole tensors, on rank 0; elsewhere they are None.

        One after another, so that a sharded network is never in memory as a whole.
        """
        held = dict(zip(self.names, own, strict=True))
        for name, value in self.network.state_dict().items():
            yield name, self.gather(name, held[name]) if name in held else value

    def accumulating(self) -> AbstractContextManager:
        """Return a context for the passes of one step, whose weights do not change."""
        return fixed_weights()


def norm_of_grads(grads: Sequence[Tensor]) -> Tensor:
    """Return the norm of gradients, be they whole or sharded. Collective for the latter."""
    if any(hasattr(grad, "to_local") for grad in grads):
        from torch_utils.sharding import norm_of_sharded

        return norm_of_sharded(grads)
    return torch.nn.utils.get_total_norm(grads, foreach=True)
