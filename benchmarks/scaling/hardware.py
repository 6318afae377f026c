"""Published figures of GPUs and their networks, and assumptions; nothing here was measured."""

import dataclasses

GPUS_PER_NODE = 8
# Shares that training reaches of a link's bandwidth and of the peak of matrix products. Assumed;
# Llama 3 reports 38 to 43% of the peak (arXiv 2407.21783, Table 4).
LINK_SHARE = 0.8
UTILISATION = 0.4
# Seconds that the host spends on each operator of a compiled network. Assumed.
OPERATOR_SEC = 4e-6
# Standard deviation of a GPU's time for the same step, relative to the mean. Assumed.
STEP_SPREAD = 0.01
# Latencies in seconds of a call, a step over NVLink and a step over the network. NCCL assumes them
# for rings (protocol Simple) when it chooses an algorithm; here trees have the same.
# Source: NVIDIA/nccl, src/graph/tuning.cc, commit b647562, baseLat and hwLat.
CALL_SEC, NVLINK_STEP_SEC, NETWORK_STEP_SEC = 8.4e-6, 3.4e-6, 14e-6
# Bytes of gradients that DistributedDataParallel sums at a time.
BUCKET_BYTES = 25 << 20
# 419 unexpected interruptions of 16,384 H100 in 54 days: Llama 3, arXiv 2407.21783.
HOURS_BETWEEN_FAILURES = 16_384 * 54 * 24 / 419
WRITE_RATE = 1e9  # Bytes/s at which a node writes a state. Assumed.
RESTART_SEC = 180.0  # From a failure to the first step after it. Assumed.


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU in a node of eight.

    Attributes:
        flops: Peak FLOP/s of dense matrix products in bf16.
        memory: Bytes of memory.
        memory_rate: Bytes/s between the GPU and its memory.
        nvlink_rate: Bytes/s that it sends to other GPUs of the node.
        network_rate: Bytes/s that its network adapter sends.
        source: Where the figures are published.
    """

    name: str
    flops: float
    memory: float
    memory_rate: float
    nvlink_rate: float
    network_rate: float
    source: str


GPUS = {
    "a100": Gpu(
        name="A100 80 GB SXM",
        flops=312e12,
        memory=80e9,
        memory_rate=2.039e12,
        nvlink_rate=300e9,
        network_rate=25e9,
        source="data sheets of NVIDIA A100 80GB and DGX A100 (HDR InfiniBand, 200 Gb/s a GPU)",
    ),
    "h100": Gpu(
        name="H100 SXM",
        flops=989e12,
        memory=80e9,
        memory_rate=3.35e12,
        nvlink_rate=450e9,
        network_rate=50e9,
        source="data sheets of NVIDIA H100 and DGX H100 (NDR InfiniBand, 400 Gb/s a GPU)",
    ),
}
