"""``--batch-gpu=auto``: the largest batch that a rank holds at once."""

import bisect
import dataclasses
import functools
from collections.abc import Callable

import psutil
import torch

from dnnlib import launcher
from dnnlib.errors import refusal
from dnnlib.memory import available_memory
from dnnlib.text import format_count
from torch_utils import distributed
from training.config import RunConfig
from training.division import accumulation_rounds, check_division, divisors, rows_per_rank
from training.resources.memory import CUDA_CONTEXT, predict_memory

# Of a rank's memory, for what a prediction does not know: workspaces of libraries, detectors, other
# processes that begin later.
_RESERVE = 0.1


def settle_batch(
    config: RunConfig, world_size: int, device: torch.device, report: Callable[[str], None]
) -> RunConfig:
    """Return ``config``, which has ``--batch-gpu=auto``, with that decided for the memory of this device.

    It becomes the largest divisor of a rank's share of the batch that fits on every rank, by
    prediction, with a tenth of the memory in reserve. Collective. Raises ValueError if not even one
    row fits.
    """
    capacity = min(distributed.gather_objects(memory_of_rank(device)))
    search = _Search(config, world_size, device.type, capacity)
    found, needed = distributed.on_main(search.largest)
    report(
        f"--batch-gpu=auto: {found} per pass, for which a rank needs {_bytes(needed)} of "
        f"{_bytes(capacity)}, with {_RESERVE:.0%} in reserve."
    )
    return config.changed("training", batch_gpu=found)


def still_fits(config: RunConfig, world_size: int, device: torch.device) -> bool:
    """Return whether every rank can hold the decided ``--batch-gpu``, without a reserve.

    Collective.
    """
    try:
        check_division(config.training, world_size, continues=True)
    except ValueError:  # The ranks are others than before.
        return False
    batch_gpu, _ = accumulation_rounds(config.training, world_size)
    capacity = min(distributed.gather_objects(memory_of_rank(device)))
    search = _Search(config, world_size, device.type, capacity)
    return distributed.on_main(lambda: search.needed(batch_gpu) <= capacity)


def memory_of_rank(device: torch.device) -> int:
    """Return the bytes that this rank has or can take: of its GPU, or of main memory.

    Main memory is shared by the ranks of a node.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)  # This makes the context.
        return free + torch.cuda.memory_reserved(device) + CUDA_CONTEXT
    shared = available_memory() // launcher.number("LOCAL_WORLD_SIZE", 1)
    return psutil.Process().memory_info().rss + shared


@dataclasses.dataclass(frozen=True)
class _Search:
    """A run whose batch a rank is sought, and the memory of a rank, in bytes."""

    config: RunConfig
    world_size: int
    device_type: str
    capacity: int

    def needed(self, batch_gpu: int) -> int:
        """Return the bytes that a rank needs with so many rows a pass."""
        config = self.config.changed("training", batch_gpu=batch_gpu)
        return predict_memory(config, self.world_size, self.device_type).total

    def largest(self) -> tuple[int, int]:
        """Return the largest batch that fits, and the bytes that a rank needs with it.

        Raises ValueError if there is none.
        """
        sizes = divisors(rows_per_rank(self.config.training, self.world_size))
        allowed = (1 - _RESERVE) * self.capacity
        needed = functools.cache(self.needed)
        # What lasts is the same for all of them, and passes grow with their rows.
        fitting = bisect.bisect_left(sizes, True, key=lambda size: needed(size) > allowed)
        if not fitting:
            raise self._refusal(needed(sizes[0]))
        found = sizes[fitting - 1]
        return found, needed(found)

    def _refusal(self, needed: int) -> ValueError:
        but = f"a pass of 1 takes {_bytes(needed)} a rank, and of {_bytes(self.capacity)} there must be "
        but += f"{_RESERVE:.0%} in reserve"
        remedies = []
        if self.config.training.shard == "none" and self.world_size > 1:
            remedies.append("divide the weights with --shard=full")
        elif self.world_size == 1:
            remedies.append("train on several ranks with --shard=full")
        else:
            remedies.append("train on more ranks")
        if not self.config.model.checkpointing:
            remedies.append("add --checkpointing")
        remedies.append("choose a smaller model")
        remedy = f"{', '.join(remedies[:-1])} or {remedies[-1]}"
        return refusal("--batch-gpu", "auto", but=but, remedy=remedy)


def _bytes(size: int) -> str:
    return f"{format_count(size)}B"
