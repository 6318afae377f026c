"""``python -m benchmarks.scaling.traffic FILE`` under torchrun: the time of sums, by size."""

import statistics
import sys
import time
from pathlib import Path

import torch

from dnnlib.files import write_json
from torch_utils import distributed

SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24)  # Bytes.
_NUM_TURNS = 15


def time_sums() -> list[dict[str, float]]:
    """Return the median seconds of sums over all ranks, by size. Collective."""
    rows = []
    for num_bytes in SIZES:
        tensor = torch.zeros(num_bytes // 4)
        turns = []
        for _ in range(_NUM_TURNS):
            distributed.barrier()
            began = time.perf_counter()
            distributed.all_reduce_sum(tensor)
            turns.append(time.perf_counter() - began)
        slowest = max(distributed.gather_objects(statistics.median(turns[1:])))
        rows.append(dict(num=distributed.world_size(), num_bytes=num_bytes, seconds=slowest))
    return rows


if __name__ == "__main__":
    distributed.init()
    found = time_sums()
    if distributed.is_main():
        write_json(Path(sys.argv[1]), found)
    distributed.shutdown()
