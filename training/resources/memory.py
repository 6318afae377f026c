"""Predictions of the memory, disk and network that a run needs, without allocating tensors."""

import contextlib
import dataclasses
import functools
import math
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dnnlib.text import format_count
from models import ModelConfig, build_network
from torch_utils import rng
from torch_utils.parameters import Parameters
from training import family
from training.config import RunConfig
from training.distillation.course import course_of
from training.distillation.stages import stages_of
from training.division import accumulation_rounds, group_size
from training.ema import EMA
from training.optimizer import GuardedAdam
from training.report import num_parameters
from training.resources.gathering import Gathering

_CPU = torch.device("cpu")
# Freed memory on a CPU that the C library keeps in pieces too small to be used again, relative to
# the size of the tensors. Measured: docs/reliability.md.
_FRAGMENTS = 0.3
# Bytes of the libraries that a training process loads after the prediction.
_LATER_LIBRARIES = 35 << 20
CUDA_CONTEXT = 500 << 20  # Bytes of GPU memory that a process takes before it allocates any.
_MIXED = {"bf16": 2, "fp16": 2}  # Bytes of a gathered weight by precision; otherwise 4.


@dataclasses.dataclass(frozen=True)
class Memory:
    """Peak memory of a rank in bytes, by kind.

    Attributes:
        weights, gradients, moments, averages: The rank's share of each; a teacher counts as an
            average.
        passes: Temporary tensors of the forward pass, the backward pass and the update, or those of
            sampling pictures, whichever are larger.
        gathered: What these need in addition if the network is sharded and gathered for a while.
        copy: A copy of the rank's share of a training state, from which it is written. It is always
            in main memory, so that it does not count on a GPU.
        fragments: Freed memory that cannot be used again.
        libraries: Everything else in the process; the CUDA context on a GPU.
    """

    weights: int
    gradients: int
    moments: int
    averages: int
    passes: int
    gathered: int
    copy: int
    fragments: int
    libraries: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = [f"{kind} {_bytes(size)}" for kind, size in vars(self).items() if size]
        return f"{_bytes(self.total)} a rank: {', '.join(parts)}"


def predict_memory(config: RunConfig, world_size: int, device_type: str) -> Memory:
    """Return the peak memory of each rank of a run, without detectors and autoencoders.

    On a CPU it is the resident memory of the process, on a GPU the memory of the GPU.
    """
    training, on_cpu = config.training, device_type == "cpu"
    size, shards = weight_bytes(config), group_size(training, world_size)
    batch_gpu, _ = accumulation_rounds(training, world_size)
    num_averages = num_copies(config)
    lasting = own = size // shards
    lasting *= 4 + num_averages
    pictures = picture_bytes(config)
    passes, gathered = max(pass_bytes(config, batch_gpu), pictures), 0
    if shards > 1:
        # Pictures are sampled from a weight average, which is gathered whole.
        gathered = max(pass_bytes(config, batch_gpu, shards), pictures + size) - passes
    fragments, copy, libraries = 0, 0, CUDA_CONTEXT
    if on_cpu:
        fragments = round(_FRAGMENTS * (lasting + gathered + passes))
        copy = size * (3 + num_averages) // world_size
        libraries = psutil.Process().memory_info().rss
        libraries += _LATER_LIBRARIES + family.of(config).library_bytes
    return Memory(
        weights=own,
        gradients=own,
        moments=2 * own,
        averages=num_averages * own,
        passes=passes,
        gathered=gathered,
        copy=copy,
        fragments=fragments,
        libraries=libraries,
    )


def num_copies(config: RunConfig) -> int:
    """Return how many copies of the weights a run holds besides them: averages and a teacher."""
    return 1 + len(config.training.ema_stds) + config.distillation.is_on


def weight_bytes(config: RunConfig) -> int:
    """Return the size of a network's parameters in float32."""
    return 4 * num_parameters(config)


def pass_bytes(config: RunConfig, batch: int, num_shards: int = 1) -> int:
    """Return the peak bytes of a step with passes of ``batch`` rows, beyond what lasts.

    ``num_shards`` ranks share the weights; buffers of FSDP2 are included. The step runs on fake
    tensors, which have a shape but no content. The result is cached for runs that differ only in
    ``--iters``, in the batch and its division into passes, and in sharding.
    """
    shared = dict(batch=batch, batch_gpu=None, shard="none", shard_size=None, iters=None)
    return _pass_bytes(config.changed("training", **shared), batch, num_shards)


@functools.lru_cache(maxsize=64)
def _pass_bytes(config: RunConfig, batch: int, num_shards: int) -> int:
    network = _meta_network(config.model).train().requires_grad_(True)
    objective = family.of(config).objective(config, network, NoCodec())
    with _counted() as live:
        network.to_empty(device=_CPU)
        parameters = Parameters(network)
        ema = EMA(parameters)
        # The student stands in for its teacher, whose passes take as much memory.
        student = objective
        objective = course_of(config, student, parameters, lambda other: student).objective
        settings = dict(beta2=config.training.beta2, weight_decay=0.0)
        optimizer = GuardedAdam(parameters, clip_grad=config.training.clip_grad, **settings)
        images, cond = objective.example(batch, _CPU)
        for param in parameters.own:
            param.grad = torch.zeros_like(param)
        optimizer.step(1e-4)  # The first step allocates Adam's moments.
        optimizer.zero_grad()
        passes = parameters.accumulating()
        lasting = live.peak = live.now
        if num_shards > 1:
            parts, passes = config.model.sharded_parts(network.backbone), contextlib.nullcontext()
            width = _MIXED.get(config.training.precision, 4)
            gathering = Gathering(network, list(parts), num_shards, width)
            gathering.begin()
        draws = objective.draw(rng.Step(0, 0, batch, tuple(images.shape[-3:]), _CPU))
        with passes:
            objective(images, cond, draws).sum().backward()
        optimizer.step(1e-4)
        ema.update(0.5, optimizer.skipped)
    return live.peak - lasting - weight_bytes(config) // num_shards


def picture_bytes(config: RunConfig) -> int:
    """Return the peak bytes of sampling pictures without guidance, beyond the weights."""
    return _picture_bytes(config.model, min(config.logging.sample_batch, 64))


@functools.lru_cache(maxsize=4)
def _picture_bytes(model: ModelConfig, batch: int) -> int:
    network = _meta_network(model).eval().requires_grad_(False)
    with _counted() as live, torch.no_grad():
        network.to_empty(device=_CPU)
        lasting = live.peak = live.now
        cond = {
            name: model.image_sizes[0]
            if name == "size"
            else value.expand(batch, *value.shape[1:]).clone()
            for name, value in model.example_cond().items()
        }
        x, c_noise = torch.zeros(batch, *model.input_shape), torch.zeros(batch)
        network(x, c_noise, network.context(cond, num=batch))
    return live.peak - lasting


def step_traffic(config: RunConfig, world_size: int) -> int:
    """Return the bytes that each rank sends in an optimizer step, with ring algorithms."""
    training = config.training
    size, shards = weight_bytes(config), group_size(training, world_size)
    _, rounds = accumulation_rounds(training, world_size)
    groups, width = world_size // shards, _MIXED.get(training.precision, 4)
    within, between = (shards - 1) / shards, 2 * (groups - 1) / groups
    # Weights are all-gathered for the forward and for the backward pass, in the precision of the
    # passes; gradients are reduce-scattered in float32.
    gathered = size * within * (2 * width / 4 + 1) * rounds
    return round(gathered + size / shards * between)


@dataclasses.dataclass(frozen=True)
class Disk:
    """Disk space of a run: bytes of a snapshot with its EMA profiles and of a state, and counts."""

    snapshot: int
    state: int
    num_snapshots: int
    num_states: int

    @property
    def total(self) -> int:
        return self.num_snapshots * self.snapshot + self.num_states * self.state

    def __str__(self) -> str:
        files = f"{self.num_snapshots:,} snapshots of {_bytes(self.snapshot)}"
        files += f" and {self.num_states:,} states of {_bytes(self.state)}"
        return f"{_bytes(self.total)}: {files}"


def predict_disk(config: RunConfig) -> Disk:
    """Return the disk space that a run takes at its end, without pictures and records."""
    logging, num_stds = config.logging, len(config.training.ema_stds)
    size, num_snapshots = weight_bytes(config), count_snapshots(config)
    num_states = count_ticks(config) // logging.dump + 1 if logging.dump else num_snapshots
    return Disk(
        snapshot=size + num_stds * size // 2,
        state=size * (3 + num_copies(config)),
        num_snapshots=num_snapshots,
        num_states=min(num_states, logging.keep_states),
    )


def count_ticks(config: RunConfig) -> int:
    """Return the number of ticks of a run, of which the first is one step."""
    rest = max(config.total_nimg - config.step_nimg, 0)
    return 1 + math.ceil(rest / max(config.tick_nimg, config.step_nimg))


def count_snapshots(config: RunConfig) -> int:
    """Return the number of snapshots of a run, including those at the ends of its stages."""
    logging, num_ticks = config.logging, count_ticks(config)
    if logging.save_interval is None:
        num_snapshots = len({*range(0, num_ticks, logging.snap), num_ticks - 1})
    else:
        num_snapshots = math.ceil(config.total_nimg / (logging.save_interval * config.step_nimg))
    return num_snapshots + len(stages_of(config)) - 1


def forecast(config: RunConfig, world_size: int, device: torch.device) -> dict[str, str]:
    """Return the rows of ``--dry-run`` about memory, disk and, with several ranks, traffic."""
    rows = {
        "memory": str(predict_memory(config, world_size, device.type)),
        "disk": str(predict_disk(config)),
    }
    if world_size > 1:
        rows["traffic"] = f"{_bytes(step_traffic(config, world_size))} a step from each rank"
    return rows


class _Live(TorchDispatchMode):
    """Counts the bytes of all live tensor storages (``now``) and their maximum (``peak``)."""

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


@contextlib.contextmanager
def _counted() -> Iterator[_Live]:
    """Make tensors without content in this context, and count their sizes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # About data pointers, which are not used.
        with FakeTensorMode(allow_non_fake_inputs=True), _Live() as live:
            yield live


class NoCodec:
    def draw(self, step: rng.Step) -> None:
        """Return None, like a codec that draws no random numbers."""


def _meta_network(model: ModelConfig) -> nn.Module:
    if model.attention == "flex":  # It does not accept fake tensors; SDPA keeps the same tensors.
        model = dataclasses.replace(model, attention="sdpa")
    with torch.device("meta"):
        return build_network(model).to(memory_format=torch.channels_last)


def _bytes(size: int) -> str:
    return f"{format_count(size)}B"
