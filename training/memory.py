"""What a run will need: memory of a rank, disk, and traffic between ranks. Nothing is computed."""

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from models import build_network
from torch_utils import rng
from torch_utils.parameters import Parameters
from training import family
from training.config import RunConfig
from training.ema import EMA
from training.optimizer import GuardedAdam

_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a rank holds at its peak, by kind.

    Attributes:
        activations: What the passes of one step, or of the pictures, need beyond the others.
        copy: Of what the rank writes of a state; always main memory.
        libraries: What the process has before it trains; of a GPU's memory, nothing.
    """

    weights: int
    gradients: int
    moments: int
    averages: int
    activations: int
    copy: int
    libraries: int

    def total(self, *, with_copy: bool = True) -> int:
        """Return the sum; without the copy it is that of a GPU."""
        return sum(vars(self).values()) - (0 if with_copy else self.copy)


class _Live(TorchDispatchMode):
    """Counts the bytes of all tensors that live, and the most that they were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        pytree.tree_map_only(Tensor, self._note, found)
        return found

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)
        return tensor

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _NoCodec:
    def draw(self, step: rng.Step) -> None:
        """Return nothing, as a codec without random numbers does."""


def activation_bytes(config: RunConfig, batch: int) -> int:
    """Return what a step with a pass of ``batch`` rows needs at most, beyond what lasts.

    The step is made with tensors that have a shape and no content.
    """
    model = config.model
    if model.attention == "flex":  # Knows no such tensors; keeps what SDPA keeps.
        config = dataclasses.replace(config, model=dataclasses.replace(model, attention="sdpa"))
    with torch.device("meta"):
        network = build_network(config.model).train().requires_grad_(True)
        network.to(memory_format=torch.channels_last)
    objective = family.of(config).objective(config, network, _NoCodec())
    with FakeTensorMode(allow_non_fake_inputs=True), _Live() as live:
        network.to_empty(device=_CPU)
        parameters = Parameters(network)
        ema = EMA(parameters)
        optimizer = GuardedAdam(
            parameters, beta2=config.training.beta2, weight_decay=0.0, clip_grad=None
        )
        images, cond = objective.example(batch, _CPU)
        shape = tuple(images.shape[-3:])
        lasting = 0
        for _ in range(2):  # The first step makes Adam's moments.
            draws = objective.draw(rng.Step(0, 0, batch, shape, _CPU))
            optimizer.zero_grad()
            lasting, live.peak = live.now, live.now
            objective(images, cond, draws).sum().backward()
            optimizer.step(1e-4)
            ema.update(0.5, optimizer.skipped)
    gradients = sum(param.nbytes for param in parameters.own)
    return live.peak - lasting - gradients
