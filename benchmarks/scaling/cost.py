"""The cost model: a step on n GPUs, and what states and failures cost. Pure functions."""

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

# Seconds for which training stands still for each GB that a node copies of a state: the worse of
# those measured (docs/benchmarks.md, benchmark.py states).
STALL_SEC_PER_GB = 0.2


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the cost model needs to know about a preset; :mod:`benchmarks.scaling.facts` finds it.

    Attributes:
        flops: Of an evaluation of the network on one image.
        operators: Of the same that are not views.
        parts: Number of parts that are gathered by themselves where the network is sharded.
        averages: Number of averages of the weights.
        batch: Rows of an optimizer step.
        batch_gpu: Rows of a pass that an 80 GB GPU holds, of its eighth of the batch.
        memory: Bytes that each GPU of a node holds with those, by ``shard``.
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
    """How a step is divided: rows that each GPU has, rows of a pass, GPUs that share the weights.

    ``shard`` is ``none``, ``full`` or ``hybrid``, with groups of one node.
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
        """Return the number of GPUs that hold the weights together."""
        sizes = dict(none=1, full=self.num_gpus, hybrid=min(GPUS_PER_NODE, self.num_gpus))
        return sizes[self.shard]


@dataclasses.dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step, by cause.

    Attributes:
        rows: What the arithmetic of the rows takes.
        launches: What passes beyond it because the host starts operators one after another.
        update: Reading and writing weights, moments and averages.
        traffic: What of the communication is not hidden behind the passes.
        stragglers: Waiting for the slowest.
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
    """Return what an optimizer step takes. The backward pass costs twice the forward pass."""
    images = plan.rows * facts.images_per_row
    rows = 3 * facts.flops * images / (gpu.flops * utilisation)
    floor = 3 * facts.operators * OPERATOR_SEC * plan.num_passes
    compute = max(rows, floor)
    # Adam reads weight, gradient and two moments and writes three of them; an average is read,
    # with the weight, and written.
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
    """Return the seconds of DDP's sums beyond the backward pass, whose last bucket comes after."""
    buckets = max(math.ceil(facts.weight_bytes / BUCKET_BYTES), 1)
    bucket = all_reduce(facts.weight_bytes / buckets, gpu, plan.num_gpus)
    backward = 2 / 3 * compute / plan.num_passes
    return bucket + max((buckets - 1) * bucket - backward * (1 - 1 / buckets), 0.0)


def _exposed_gathers(facts: Facts, gpu: Gpu, plan: Plan, compute: float) -> float:
    """Return the seconds of FSDP's traffic beyond the passes.

    Each pass gathers every part in bf16, forward and again backward, while the part before it
    computes, and scatters its gradients in float32. Groups then sum what each holds.
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
    """Return the seconds of a sum over GPUs: a ring's bandwidth, a tree's latency (NCCL)."""
    if num == 1:
        return 0.0
    inner, nodes = min(num, GPUS_PER_NODE), math.ceil(num / GPUS_PER_NODE)
    latency = (inner - 1) * NVLINK_STEP_SEC + math.log2(nodes) * NETWORK_STEP_SEC
    return CALL_SEC + 2 * latency + 2 * (num - 1) / num * num_bytes / _ring_rate(gpu, num)


def gather_rows(num_bytes: float, gpu: Gpu, num: int) -> float:
    """Return the seconds of an all-gather or a reduce-scatter of so many bytes, by a ring."""
    if num == 1:
        return 0.0
    nodes = math.ceil(num / GPUS_PER_NODE)
    # A ring of one node stays in it; of several, it enters each once.
    over_network = nodes if nodes > 1 else 0
    latency = max(num - 1 - over_network, 0) * NVLINK_STEP_SEC + over_network * NETWORK_STEP_SEC
    return CALL_SEC + latency + (num - 1) / num * num_bytes / _ring_rate(gpu, num)


def all_reduce_between(num_bytes: float, gpu: Gpu, nodes: int) -> float:
    """Return the seconds of a sum over one GPU of each node, while its neighbours do the same."""
    if nodes == 1:
        return 0.0
    latency = CALL_SEC + 2 * math.log2(nodes) * NETWORK_STEP_SEC
    return latency + 2 * (nodes - 1) / nodes * num_bytes / (LINK_SHARE * gpu.network_rate)


def _ring_rate(gpu: Gpu, num: int) -> float:
    """Return the bytes a second that a GPU passes on; each adapter of a node serves a ring."""
    if num <= GPUS_PER_NODE:
        return LINK_SHARE * gpu.nvlink_rate
    return LINK_SHARE * min(gpu.nvlink_rate, GPUS_PER_NODE * gpu.network_rate)


def expected_maximum(num: int) -> float:
    """Return the expected largest of ``num`` standard normal numbers (Blom 1958), to about 1%."""
    return 0.0 if num == 1 else NormalDist().inv_cdf((num - 0.375) / (num + 0.25))


@dataclasses.dataclass(frozen=True)
class Reliability:
    """What states and failures cost.

    Attributes:
        failures_per_hour: Of any of the GPUs.
        stall: Seconds for which training stands still for a state.
        interval: Seconds between two states.
        lost: Share of the time that states, repeated steps and restarts take.
    """

    failures_per_hour: float
    stall: float
    interval: float
    lost: float


def reliability(facts: Facts, num_gpus: int, interval: float | None = None) -> Reliability:
    """Return what states cost, at an interval between them in seconds, or at the best one.

    sqrt(2 x stall x time between failures) (Young 1974, doi 10.1145/361147.361115), but no less
    than a state takes to be written. A failure repeats half an interval and what the last state
    took to be whole.
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
    """Return the images a second of all GPUs, with what states and failures cost."""
    images = plan.num_gpus * plan.rows * facts.images_per_row
    lost = reliability(facts, plan.num_gpus).lost
    return images / step(facts, gpu, plan, utilisation).total * (1 - lost)


def efficiency(
    facts: Facts, gpu: Gpu, plan: Plan, alone: Plan, utilisation: float = UTILISATION
) -> float:
    """Return the throughput of a GPU in images/s, relative to one that trains ``alone``."""
    own, one = (images_per_second(facts, gpu, p, utilisation) for p in (plan, alone))
    return own / plan.num_gpus / one


def with_fixed_batch(facts: Facts, num_gpus: int, shard: str = "none") -> Plan | None:
    """Return the plan of the preset's own batch; None if the GPUs cannot share it evenly."""
    if facts.batch % num_gpus:
        return None
    rows = facts.batch // num_gpus
    return Plan(num_gpus, rows, min(rows, facts.batch_gpu), shard)


def with_growing_batch(facts: Facts, num_gpus: int, shard: str = "none") -> Plan:
    """Return the plan in which each GPU has an eighth of the preset's batch."""
    return Plan(num_gpus, facts.batch // 8, facts.batch_gpu, shard)
