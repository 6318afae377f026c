"""The cost model: the time of a step on n GPUs, and the cost of states and failures."""

import dataclasses
import math
from statistics import NormalDist

from benchmarks.scaling.hardware import (
    BUCKET_BYTES,
    CALL_SEC,
    GPUS_PER_NODE,
    HOURS_BETWEEN_FAILURES,
    LINK_SHARE,
    NETWORK_STEP_SEC,
    NVLINK_STEP_SEC,
    OPERATOR_SEC,
    RESTART_SEC,
    STEP_SPREAD,
    UTILISATION,
    WRITE_RATE,
    Gpu,
)

# Seconds for which training pauses for each GB of a state that a node copies: the worst case
# measured (docs/benchmarks.md, benchmark.py states).
STALL_SEC_PER_GB = 0.2


@dataclasses.dataclass(frozen=True)
class Facts:
    """The properties of a preset that the cost model uses; see :mod:`benchmarks.scaling.facts`.

    Attributes:
        flops: FLOPs of one evaluation of the network on one image.
        operators: Operators of such an evaluation, without views.
        parts: Number of parts that are gathered separately if the network is sharded.
        averages: Number of averages of the weights.
        batch: Rows of an optimizer step.
        batch_gpu: Rows per pass that fit on an 80 GB GPU whose share is an eighth of the batch.
        memory: Bytes per GPU with ``batch_gpu`` rows per pass, on a node of eight, by ``shard``.
        state_bytes: Size of a training state.
    """

    preset: str
    parameters: int
    flops: int
    operators: int
    parts: int
    averages: int
    batch: int
    images_per_row: int
    batch_gpu: int
    memory: dict[str, int]
    state_bytes: int

    @property
    def weight_bytes(self) -> int:
        return 4 * self.parameters


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a step is divided: the number of GPUs, the rows of each GPU and pass, and the sharding.

    ``shard`` is ``none``, ``full`` or ``hybrid``; hybrid groups are single nodes.
    """

    num_gpus: int
    rows: float
    rows_per_pass: float
    shard: str = "none"

    @property
    def num_passes(self) -> int:
        return max(math.ceil(self.rows / self.rows_per_pass), 1)

    @property
    def group(self) -> int:
        """The number of GPUs that share one copy of the weights."""
        sizes = dict(none=1, full=self.num_gpus, hybrid=min(GPUS_PER_NODE, self.num_gpus))
        return sizes[self.shard]


@dataclasses.dataclass(frozen=True)
class Step:
    """The seconds of an optimizer step, by cause.

    Attributes:
        rows: The arithmetic of the rows.
        launches: Additional time because the host launches operators one after another.
        update: Reading and writing weights, moments and averages.
        traffic: Communication that is not hidden behind the passes.
        stragglers: Waiting for the slowest GPU.
    """

    rows: float
    launches: float
    update: float
    traffic: float
    stragglers: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def step(facts: Facts, gpu: Gpu, plan: Plan, utilisation: float = UTILISATION) -> Step:
    """Return the time of an optimizer step, with a backward pass of twice the forward pass."""
    images = plan.rows * facts.images_per_row
    rows = 3 * facts.flops * images / (gpu.flops * utilisation)
    floor = 3 * facts.operators * OPERATOR_SEC * plan.num_passes
    compute = max(rows, floor)
    # Adam reads weight, gradient and two moments, and writes all but the gradient. Each average
    # reads itself and the weight, and writes itself.
    moved = facts.weight_bytes / plan.group * (7 + 3 * facts.averages)
    if plan.shard == "none":
        traffic = _exposed_all_reduce(facts, gpu, plan, compute)
    else:
        traffic = _exposed_gathers(facts, gpu, plan, compute)
    return Step(
        rows=rows,
        launches=compute - rows,
        update=moved / gpu.memory_rate,
        traffic=traffic,
        stragglers=STEP_SPREAD * expected_maximum(plan.num_gpus) * compute,
    )


def _exposed_all_reduce(facts: Facts, gpu: Gpu, plan: Plan, compute: float) -> float:
    """Return the seconds of DDP's gradient sums that the backward pass does not hide.

    The sum of the last bucket starts only when the backward pass ends.
    """
    buckets = max(math.ceil(facts.weight_bytes / BUCKET_BYTES), 1)
    bucket = all_reduce(facts.weight_bytes / buckets, gpu, plan.num_gpus)
    backward = 2 / 3 * compute / plan.num_passes
    return bucket + max((buckets - 1) * bucket - backward * (1 - 1 / buckets), 0.0)


def _exposed_gathers(facts: Facts, gpu: Gpu, plan: Plan, compute: float) -> float:
    """Return the seconds of FSDP's traffic that the passes do not hide.

    Each pass gathers every part in bf16, once forward and once backward, while the previous part
    computes, and reduce-scatters its gradients in float32. Groups then sum their shards.
    """
    parts, group = facts.parts, plan.group
    if group == 1:
        return 0.0
    gather = gather_rows(facts.weight_bytes / 2 / parts, gpu, group)
    scatter = gather_rows(facts.weight_bytes / parts, gpu, group)
    hidden = compute / plan.num_passes * (parts - 1) / parts
    forward = gather + max((parts - 1) * gather - hidden / 3, 0.0)
    busy = (parts - 1) * (gather + scatter) + gather
    backward = scatter + max(busy - hidden * 2 / 3, 0.0)
    groups = plan.num_gpus // group
    between = all_reduce_between(facts.weight_bytes / group, gpu, groups)
    spare = max(hidden * 2 / 3 - busy, 0.0)
    return plan.num_passes * (forward + backward) + max(between - spare, between / parts)


def all_reduce(num_bytes: float, gpu: Gpu, num: int) -> float:
    """Return the seconds of NCCL's all-reduce, with a ring's bandwidth and a tree's latency."""
    if num == 1:
        return 0.0
    inner, nodes = min(num, GPUS_PER_NODE), math.ceil(num / GPUS_PER_NODE)
    latency = (inner - 1) * NVLINK_STEP_SEC + math.log2(nodes) * NETWORK_STEP_SEC
    return CALL_SEC + 2 * latency + 2 * (num - 1) / num * num_bytes / _ring_rate(gpu, num)


def gather_rows(num_bytes: float, gpu: Gpu, num: int) -> float:
    """Return the seconds of a ring all-gather or reduce-scatter of ``num_bytes`` over GPUs."""
    if num == 1:
        return 0.0
    nodes = math.ceil(num / GPUS_PER_NODE)
    # A ring over several nodes enters each of them once.
    over_network = nodes if nodes > 1 else 0
    latency = max(num - 1 - over_network, 0) * NVLINK_STEP_SEC + over_network * NETWORK_STEP_SEC
    return CALL_SEC + latency + (num - 1) / num * num_bytes / _ring_rate(gpu, num)


def all_reduce_between(num_bytes: float, gpu: Gpu, nodes: int) -> float:
    """Return the seconds of an all-reduce over one GPU of each node.

    The other GPUs of a node do the same at that time, each over its own network adapter.
    """
    if nodes == 1:
        return 0.0
    latency = CALL_SEC + 2 * math.log2(nodes) * NETWORK_STEP_SEC
    return latency + 2 * (nodes - 1) / nodes * num_bytes / (LINK_SHARE * gpu.network_rate)


def _ring_rate(gpu: Gpu, num: int) -> float:
    """Return the bytes/s of a ring; over several nodes, all adapters of a node work in parallel."""
    if num <= GPUS_PER_NODE:
        return LINK_SHARE * gpu.nvlink_rate
    return LINK_SHARE * min(gpu.nvlink_rate, GPUS_PER_NODE * gpu.network_rate)


def expected_maximum(num: int) -> float:
    """Return the expected maximum of ``num`` standard normal variables (Blom 1958), to about 1%."""
    return 0.0 if num == 1 else NormalDist().inv_cdf((num - 0.375) / (num + 0.25))


@dataclasses.dataclass(frozen=True)
class Reliability:
    """The cost of states and failures.

    Attributes:
        failures_per_hour: Failures of all GPUs together.
        stall: Seconds for which training pauses for a state.
        interval: Seconds between two states.
        lost: Share of time lost to states, repeated steps and restarts.
    """

    failures_per_hour: float
    stall: float
    interval: float
    lost: float


def reliability(facts: Facts, num_gpus: int, interval: float | None = None) -> Reliability:
    """Return the cost of states and failures at ``interval`` seconds between states.

    By default the interval is the best one, sqrt(2 x stall x time between failures) (Young 1974,
    doi 10.1145/361147.361115), but at least the time that a state takes to be written. A failure
    costs a restart, and repeats half an interval and the time that the last state took to write.
    """
    nodes = math.ceil(num_gpus / GPUS_PER_NODE)
    between = HOURS_BETWEEN_FAILURES * 3600 / num_gpus
    stall = STALL_SEC_PER_GB * facts.state_bytes / 1e9 / nodes
    writing = facts.state_bytes / nodes / WRITE_RATE
    if interval is None:
        interval = max(math.sqrt(2 * stall * between), writing)
    lost = stall / interval + (interval / 2 + writing + RESTART_SEC) / between
    return Reliability(3600 / between, stall, interval, lost)


def images_per_second(
    facts: Facts, gpu: Gpu, plan: Plan, utilisation: float = UTILISATION
) -> float:
    """Return the images/s of all GPUs, after the cost of states and failures."""
    images = plan.num_gpus * plan.rows * facts.images_per_row
    lost = reliability(facts, plan.num_gpus).lost
    return images / step(facts, gpu, plan, utilisation).total * (1 - lost)


def efficiency(
    facts: Facts, gpu: Gpu, plan: Plan, alone: Plan, utilisation: float = UTILISATION
) -> float:
    """Return the images/s per GPU, relative to one GPU that trains with the plan ``alone``."""
    own, one = (images_per_second(facts, gpu, p, utilisation) for p in (plan, alone))
    return own / plan.num_gpus / one


def with_fixed_batch(facts: Facts, num_gpus: int, shard: str = "none") -> Plan | None:
    """Return the plan that divides the preset's batch among the GPUs; None if it is uneven."""
    if facts.batch % num_gpus:
        return None
    rows = facts.batch // num_gpus
    return Plan(num_gpus, rows, min(rows, facts.batch_gpu), shard)


def with_growing_batch(facts: Facts, num_gpus: int, shard: str = "none") -> Plan:
    """Return the plan in which each GPU has an eighth of the preset's batch."""
    return Plan(num_gpus, facts.batch // 8, facts.batch_gpu, shard)
