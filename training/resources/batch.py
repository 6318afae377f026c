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

# Share of a rank's memory that is left for what a prediction does not include: workspaces of
# libraries, detectors, processes that start later.
_RESERVE = 0.1


def settle_batch(
    config: RunConfig, world_size: int, device: torch.device, report: Callable[[str], None]
) -> RunConfig:
    """Return ``config`` with ``--batch-gpu=auto`` replaced by the largest number that fits.

    It is the largest number of rows per pass that is predicted to fit on every rank with a tenth of
    the memory in reserve; ``report`` gets a message that names it. Collective. Raises ValueError if
    not even the smallest fits.
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
    """Return whether the decided ``--batch-gpu`` fits on every rank, without a reserve. Collective.

    It does not fit if today's number of ranks cannot share the batch.
    """
    try:
        check_division(config.training, world_size, continues=True)
    except ValueError:  # The number of ranks has changed.
        return False
    batch_gpu, _ = accumulation_rounds(config.training, world_size)
    capacity = min(distributed.gather_objects(memory_of_rank(device)))
    sizes = batch_gpu, world_size, device.type
    return distributed.on_main(lambda: _needed(config, *sizes) <= capacity)


def memory_of_rank(device: torch.device) -> int:
    """Return the bytes that this rank holds or can still allocate, on its GPU or in main memory.

    The ranks of a node share its available main memory equally.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)  # This call creates the CUDA context.
        return free + torch.cuda.memory_reserved(device) + CUDA_CONTEXT
    shared = available_memory() // launcher.number("LOCAL_WORLD_SIZE", 1)
    return psutil.Process().memory_info().rss + shared


def largest_batch(
    config: RunConfig, world_size: int, device_type: str, capacity: int
) -> tuple[int, int]:
    """Return the largest number of rows per pass that fits, and the bytes that a rank then needs.

    ``capacity`` is the memory of a rank in bytes, of which a tenth is kept in reserve. Raises
    ValueError if not even the smallest number fits.
    """
    sizes, needed = possible_passes(config.training, world_size), {}

    def exceeds(size: int) -> bool:
        needed[size] = _needed(config, size, world_size, device_type)
        return needed[size] > (1 - _RESERVE) * capacity

    # Memory grows with the rows of a pass, so a binary search finds the limit. The largest is tried
    # first, because often the whole share of a rank fits.
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
