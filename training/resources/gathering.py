"""Simulation of the buffers that FSDP2 allocates in a step of a sharded network."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_utils.misc import count_parameters


class Gathering:
    """Tensors as large as those that FSDP2 allocates besides a rank's shard of the weights.

    A part of the network is whole while it computes; in the backward pass, the part that follows is
    all-gathered meanwhile. An all-gather fills a buffer, which is copied into the weights. In the
    forward pass that buffer lives until the next part has been received, that of the last part
    until the step ends. The gradients of a part are whole until all of them are computed. They are
    copied into a buffer to be reduced, which lives until the gradients of the next part are
    complete. Weights outside the parts are whole all the time.

    Only one step, after :meth:`begin`, is simulated.

    Args:
        network: The whole network.
        parts: The modules of it that are gathered one at a time.
        num_shards: Number of ranks that share the weights.
        width: Bytes of a gathered weight.
    """

    def __init__(
        self, network: nn.Module, parts: Sequence[nn.Module], num_shards: int, width: int
    ) -> None:
        self._num_shards, self._width = num_shards, width
        self._rest = count_parameters(network) - sum(map(count_parameters, parts))
        self._order: list[nn.Module] = []
        self._goes_back = False
        self._received: dict[nn.Module, Tensor] = {}
        self._whole: dict[nn.Module | None, Tensor] = {}
        self._missing: dict[nn.Module, int] = {}
        self._last: Tensor | None = None
        self._sent: Tensor | None = None
        self._own: list[Tensor] = []
        for part in parts:
            params = [param for param in part.parameters() if param.ndim]
            self._missing[part] = len(params)
            part.register_forward_pre_hook(self._before)
            part.register_forward_hook(self._after)
            for param in params:
                collect = functools.partial(self._collect, part, params)
                param.register_post_accumulate_grad_hook(collect)

    def begin(self) -> None:
        """Gather the weights outside the parts, which stay whole."""
        self._whole[None] = self._empty(self._rest)

    def _empty(self, num: int) -> Tensor:
        return torch.empty(num * self._width, dtype=torch.uint8)

    def _receive(self, part: nn.Module) -> None:
        if part not in self._received and part not in self._whole:
            self._received[part] = self._empty(count_parameters(part))

    def _make_whole(self, part: nn.Module) -> None:
        self._receive(part)
        if part not in self._whole:
            self._whole[part] = self._empty(count_parameters(part))
            del self._received[part]

    def _before(self, part: nn.Module, args: Any) -> None:
        if not self._goes_back:  # Checkpointing recomputes a part in the backward pass, whole.
            self._receive(part)
            self._last = self._received[part]
            self._make_whole(part)

    def _after(self, part: nn.Module, args: Any, output: Any) -> None:
        if self._goes_back:
            return
        del self._whole[part]
        self._order.append(part)
        outputs = [out for out in _tensors(output) if out.requires_grad]
        come_back = functools.partial(self._come_back, part)
        torch.autograd.graph.register_multi_grad_hook(outputs, come_back, mode="any")

    def _come_back(self, part: nn.Module, grad: Tensor) -> None:
        self._goes_back = True
        self._make_whole(part)
        place = self._order.index(part)
        if place:
            self._receive(self._order[place - 1])

    def _collect(self, part: nn.Module, params: Sequence[nn.Parameter], param: Tensor) -> None:
        self._missing[part] -= 1
        if self._missing[part]:
            return
        self._whole.pop(part, None)
        self._sent = None
        num_bytes = sum(param.nbytes for param in params)
        self._sent = torch.empty(num_bytes, dtype=torch.uint8)
        self._own.append(torch.empty(num_bytes // self._num_shards, dtype=torch.uint8))
        for own in params:
            own.grad = None


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [out for out in output if isinstance(out, Tensor)]
