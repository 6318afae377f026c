"""Networks whose parameters are sharded over several ranks (FSDP2, ZeRO-3: arXiv 1910.02054).

Parameters, gradients, the optimizer's moments and all weight averages are split by rows among the
ranks of a group. A part of the network, such as a block, is gathered while it computes.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from torch_utils import distributed
from torch_utils.misc import keep_freed_memory
from torch_utils.parameters import Parameters
from torch_utils.states import Part


def shard(
    objective: nn.Module,
    parts: Sequence[nn.Module],
    device: torch.device,
    size: int,
    compute_dtype: torch.dtype | None,
) -> "ShardedParameters":
    """Shard the parameters of ``objective`` over groups of ``size`` ranks each. Collective.

    Each of ``parts``, modules of its network, is gathered separately in ``compute_dtype`` while it
    computes; all other parameters are gathered in float32 while the objective computes. Gradients
    are averaged over all ranks in float32. Adds a method ``objective.gathered()``, which returns a
    context in which those other parameters are whole.
    """
    keep_freed_memory(False)  # Sharding trades time for memory.
    mesh, network = _make_mesh(device, size), objective.network
    empty = _empty_copy(network).to(device)
    # Attributes of parameters, such as tags for weight decay, are lost when FSDP replaces them.
    notes = {name: dict(vars(param)) for name, param in network.named_parameters()}
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    scalars = {param for param in objective.parameters() if not param.ndim}  # Without rows.
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=scalars)
    fully_shard(objective, mesh=mesh, ignored_params=scalars)
    for param in scalars:
        param.data = param.data.to(device)

    @contextlib.contextmanager
    def gathered() -> Iterator[None]:
        objective.unshard()
        try:
            yield
        finally:
            objective.reshard()

    objective.gathered = gathered
    return ShardedParameters(network, empty, mesh, notes)


class ShardedParameters(Parameters):
    """Parameters of which this process holds some rows; see :class:`Parameters`.

    Args:
        empty: Copy of the network whose parameters have no elements, for weight averages.
        mesh: Mesh of ranks, whose last dimension holds one copy of the parameters.
        notes: Attributes to set on the parameters in ``own``, by parameter name.
    """

    def __init__(
        self,
        network: nn.Module,
        empty: nn.Module,
        mesh: DeviceMesh,
        notes: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.network, self._empty, self._mesh = network, empty, mesh
        held = dict(network.named_parameters())
        self.names = tuple(held)
        self._sharded = {name: param for name, param in held.items() if isinstance(param, DTensor)}
        # Plain tensors, which optimizers expect, sharing memory with the network's DTensors.
        self.own = tuple(
            nn.Parameter(p.to_local().detach()) if isinstance(p, DTensor) else p
            for p in held.values()
        )
        for name, own in zip(self.names, self.own, strict=True):
            for key, value in notes[name].items():
                setattr(own, key, value)

    @property
    def _group(self) -> dist.ProcessGroup:
        """The ranks that together hold one copy of the parameters."""
        return self._mesh.get_group(self._mesh.ndim - 1)

    def zero_grad(self) -> None:
        super().zero_grad()
        for param in self._sharded.values():
            param.grad = None

    def take_grads(self) -> list[Tensor]:
        for name, own in zip(self.names, self.own, strict=True):
            if name in self._sharded:
                grad = self._sharded[name].grad
                own.grad = None if grad is None else grad.to_local()
        return super().take_grads()

    def norm(self, tensors: Sequence[Tensor], norms: Tensor) -> Tensor:
        return total_norm(tensors, self._group)

    def averaged_network(self) -> tuple[nn.Module, list[Tensor]]:
        own = [param.detach().clone() for param in self.own]
        return self._empty.eval().requires_grad_(False), own

    @contextlib.contextmanager
    def filled(self, network: nn.Module, own: Sequence[Tensor]) -> Iterator[None]:
        params = dict(network.named_parameters())
        try:
            for name, tensor in zip(self.names, own, strict=True):
                params[name].data = self._whole(name, tensor)
            yield
        finally:
            for param in params.values():
                param.data = param.data.new_empty(0)

    def load(self, network_state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, own in zip(self.names, self.own, strict=True):
                self.unpack(name, network_state[name], own)

    def pack(self, name: str, own: Tensor) -> Part:
        if name not in self._sharded:
            return own
        whole = self._sharded[name]
        return Part(own, tuple(whole.shape), self._first_row(name), self._holds_first_copy)

    def unpack(self, name: str, stored: Any, own: Tensor) -> None:
        if isinstance(stored, distributed.Remote):
            stored = stored.whole()
        if name in self._sharded:
            first = self._first_row(name)
            stored = stored[first : first + len(own)]
        own.copy_(stored)

    def gather(self, name: str, own: Tensor) -> Tensor | None:
        whole = self._whole(name, own)
        return whole.cpu() if distributed.is_main() else None

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        # Casts are not kept: they would be as large as the gathered parts of the network.
        yield
        for name, own in zip(self.names, self.own, strict=True):
            if name not in self._sharded and own.grad is not None:
                dist.all_reduce(own.grad)
                own.grad.div_(dist.get_world_size())

    @property
    def _holds_first_copy(self) -> bool:
        return self._mesh.ndim == 1 or self._mesh.get_local_rank(0) == 0

    def _first_row(self, name: str) -> int:
        rows = self._sharded[name].shape[0]
        place, size = dist.get_rank(self._group), dist.get_world_size(self._group)
        return min(place * -(-rows // size), rows)

    def _whole(self, name: str, own: Tensor) -> Tensor:
        if name not in self._sharded:
            return own.detach().clone()
        like = self._sharded[name]
        layout = dict(shape=like.shape, stride=like.stride(), run_check=False)
        return DTensor.from_local(own, self._mesh, like.placements, **layout).full_tensor()


def total_norm(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
    """Return the joint L2 norm [], float32, of tensors split by rows over a group. Collective.

    Scalars are replicated on all ranks and count once.
    """
    # In float64, as the square of a large norm overflows float32.
    rows = torch.nn.utils.get_total_norm([t for t in tensors if t.ndim], foreach=True)
    total = rows.to(torch.float64).square()
    dist.all_reduce(total, group=group)
    for scalar in (t for t in tensors if not t.ndim):
        total = total + scalar.to(torch.float64).square()
    return total.sqrt().to(torch.float32)


def norm_of_sharded(grads: Sequence[Tensor]) -> Tensor:
    """Return the joint L2 norm [], float32, of a sharded network's gradients. Collective."""
    mesh = next(grad.device_mesh for grad in grads if isinstance(grad, DTensor))
    own = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    return total_norm(own, mesh.get_group(mesh.ndim - 1))


def _make_mesh(device: torch.device, size: int) -> DeviceMesh:
    world_size = distributed.world_size()
    if size == world_size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    names = ("replica", "shard")
    return init_device_mesh(device.type, (world_size // size, size), mesh_dim_names=names)


def _empty_copy(network: nn.Module) -> nn.Module:
    """Return a copy of a network, with its own buffers, whose parameters have no elements."""
    memo: dict[int, Any] = {}
    for param in network.parameters():
        memo[id(param)] = nn.Parameter(param.detach().new_empty(0), requires_grad=False)
    return copy.deepcopy(network, memo)
