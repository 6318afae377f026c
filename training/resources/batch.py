"""``--batch-gpu=auto``: the largest batch that a rank holds at once."""

import bisect
from collections.abc import Callable

import psutil
import torch

from dnnlib import launcher
from dnnlib.errors import refusal
from dnnlib.memory import available_memory
from dnnlib.text import format_count
from torch_utils import distributed
from training.config import RunConfig
from training.division import accumulation_rounds, check_division, possible_passes
from training.resources.memory import CUDA_CONTEXT, predict_memory

# Of a rank's memory, for what a prediction does not know: workspaces of libraries, detectors, other
# processes that begin later.
_RESERVE = 0.1


def settle_batch(
    config: RunConfig, world_size: int, device: torch.device, report: Callable[[str], None]
) -> RunConfig:
    """Return ``config`` with its ``--batch-gpu=auto`` decided for the memory of this device.

    It becomes the largest part of a rank's share of the batch that fits on every rank, by
    prediction, with a tenth of the memory in reserve. Collective. Raises ValueError if not even the
    smallest fits.
    """
    capacity = min(distributed.gather_objects(memory_of_rank(device)))
    found, needed = distributed.on_main(
        lambda: largest_batch(config, world_size, device.type, capacity)
    )
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
    sizes = batch_gpu, world_size, device.type
    return distributed.on_main(lambda: _needed(config, *sizes) <= capacity)


def memory_of_rank(device: torch.device) -> int:
    """Return the bytes that this rank has or can take: of its GPU, or of main memory.

    Main memory is shared by the ranks of a node.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)  # This makes the context.
        return free + torch.cuda.memory_reserved(device) + CUDA_CONTEXT
    shared = available_memory() // launcher.number("LOCAL_WORLD_SIZE", 1)
    return psutil.Process().memory_info().rss + shared


def largest_batch(
    config: RunConfig, world_size: int, device_type: str, capacity: int
) -> tuple[int, int]:
    """Return the largest batch per pass that fits in ``capacity``, and the bytes it needs.

    Raises ValueError if there is none.
    """
    sizes, needed = possible_passes(config.training, world_size), {}

    def exceeds(size: int) -> bool:
        needed[size] = _needed(config, size, world_size, device_type)
        return needed[size] > (1 - _RESERVE) * capacity

    # What lasts is the same for all, and passes grow with their rows. Often the whole share fits.
    fitting = len(sizes)
    if exceeds(sizes[-1]):
        fitting = bisect.bisect_left(sizes[:-1], True, key=exceeds)
    if not fitting:
        raise _refusal(config, world_size, needed[sizes[0]], capacity)
    return sizes[fitting - 1], needed[sizes[fitting - 1]]


def _needed(config: RunConfig, batch_gpu: int, world_size: int, device_type: str) -> int:
    config = config.changed("training", batch_gpu=batch_gpu)
    return predict_memory(config, world_size, device_type).total


def _refusal(config: RunConfig, world_size: int, needed: int, capacity: int) -> ValueError:
    but = f"the smallest pass takes {_bytes(needed)} a rank, which has {_bytes(capacity)}, "
    but += f"{_RESERVE:.0%} of it in reserve"
    remedies = []
    if config.training.shard == "none":
        where = "on several ranks " if world_size == 1 else ""
        remedies.append(f"divide the weights {where}with --shard=full")
    else:
        remedies.append("train on more ranks")
    if not config.model.checkpointing:
        remedies.append("add --checkpointing")
    remedies.append("choose a smaller model")
    remedy = f"{', '.join(remedies[:-1])} or {remedies[-1]}"
    return refusal("--batch-gpu", "auto", but=but, remedy=remedy)


def _bytes(size: int) -> str:
    return f"{format_count(size)}B"
