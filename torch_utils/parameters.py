"""The parameters of a network as this process holds them: whole here, only some rows if sharded."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from torch_utils.reuse import fixed_weights


class Parameters:
    """The parameters that the optimizer, weight averages and training states work on.

    A sharded network uses the subclass :class:`torch_utils.sharding.ShardedParameters`, where every
    method is collective.

    Attributes:
        names: Names of the parameters, in the network's order.
        own: What this process holds of each parameter; updated in place.
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
        """Set the gradients of ``own`` to what this process holds, and return those that exist."""
        return [param.grad for param in self.own if param.grad is not None]

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the L2 norm of what this process holds of each tensor: [P] for P tensors."""
        return torch.stack(torch._foreach_norm(list(tensors)))

    def norm(self, tensors: Sequence[Tensor], norms: Tensor) -> Tensor:
        """Return the L2 norm [] of all whole tensors together.

        ``tensors`` is what this process holds of them, ``norms`` what :meth:`norms` returned.
        """
        return torch.linalg.vector_norm(norms)

    def pack(self, name: str, own: Tensor) -> Any:
        """Return what a training state stores of a tensor laid out like the parameter ``name``."""
        return own.detach()

    def unpack(self, name: str, stored: Any, own: Tensor) -> None:
        """Copy what a training state stored into ``own``, the part that this process holds."""
        own.copy_(stored)

    def gather(self, name: str, own: Tensor) -> Tensor | None:
        """Return the whole tensor of which this process holds ``own``.

        For a sharded network only rank 0 gets it, on the CPU; the other ranks get None.
        """
        return own

    def averaged_network(self) -> tuple[nn.Module, list[Tensor]]:
        """Return a copy of the network for sampling, and the tensors of an average of its weights.

        The average starts out equal to the weights. It serves as the parameters of the copy within
        :meth:`filled`.
        """
        network = copy.deepcopy(self.network).eval().requires_grad_(False)
        return network, list(network.parameters())

    def filled(self, network: nn.Module, own: Sequence[Tensor]) -> AbstractContextManager:
        """Return a context in which a network from :meth:`averaged_network` can be used.

        ``own`` is the average whose weights it has there.
        """
        return contextlib.nullcontext()

    def load(self, network_state: Mapping[str, Any]) -> None:
        """Restore the network from what :meth:`state_dict` returned."""
        self.network.load_state_dict(network_state)

    def state_dict(self, own: Sequence[Tensor]) -> dict[str, Any]:
        """Return what a training state stores of the network with ``own`` as its parameters."""
        packed = {name: self.pack(name, t) for name, t in zip(self.names, own, strict=True)}
        return {name: packed.get(name, value) for name, value in self.network.state_dict().items()}

    def whole_tensors(self, own: Sequence[Tensor]) -> Iterator[tuple[str, Tensor | None]]:
        """Yield the name and whole tensor of each entry of the network's state dict.

        ``own`` takes the place of the parameters. The tensors come one at a time, so that a sharded
        network is never whole in memory; ranks other than 0 may get None, as in :meth:`gather`.
        """
        held = dict(zip(self.names, own, strict=True))
        for name, value in self.network.state_dict().items():
            yield name, self.gather(name, held[name]) if name in held else value

    def accumulating(self) -> AbstractContextManager:
        """Return a context for the passes of one step, between which the weights do not change."""
        return fixed_weights()


def norm_of_grads(grads: Sequence[Tensor]) -> Tensor:
    """Return the joint L2 norm of gradients, whole or sharded. Collective if they are sharded."""
    if any(hasattr(grad, "to_local") for grad in grads):
        from torch_utils.sharding import norm_of_sharded

        return norm_of_sharded(grads)
    return torch.nn.utils.get_total_norm(grads, foreach=True)
