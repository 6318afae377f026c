"""How a batch and a model are divided among ranks."""

from typing import Any

import torch

from data.samplers import rank_passes
from diffusion.denoiser import AUTOCAST_DTYPES
from dnnlib import launcher
from dnnlib.errors import refusal
from torch_utils.parameters import Parameters
from training.config import RunConfig, TrainingConfig


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, in ascending order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def rows_per_rank(training: TrainingConfig, world_size: int) -> int:
    """Return the largest number of rows of a batch that a rank has."""
    return -(-training.batch // world_size)


def possible_passes(training: TrainingConfig, world_size: int) -> list[int]:
    """Return the values that --batch-gpu can have, in ascending order.

    Equal shares of the batch are divided evenly into passes. Unequal ones can have any number of
    passes, but none of a single row, because some ranks would then need one pass more.
    """
    per_rank = rows_per_rank(training, world_size)
    if training.batch % world_size == 0:
        return divisors(per_rank)
    sizes = {-(-per_rank // rounds) for rounds in range(1, per_rank + 1)}
    return sorted(sizes - {1}) or [per_rank]


def accumulation_rounds(training: TrainingConfig, world_size: int) -> tuple[int, int]:
    """Return the largest number of rows in a pass of a rank, and its number of passes in a step.

    ``batch_gpu`` must be decided, not ``auto``.
    """
    assert training.batch_gpu != "auto"
    per_rank = rows_per_rank(training, world_size)
    rounds = -(-per_rank // (training.batch_gpu or per_rank))
    return -(-per_rank // rounds), rounds


def pass_sizes(training: TrainingConfig, world_size: int) -> list[int]:
    """Return the different numbers of rows that passes of any rank have, the largest first."""
    about = training.batch, accumulation_rounds(training, world_size)[0]
    ranks = (rank_passes(*about, rank, world_size) for rank in range(world_size))
    return sorted({len(rows) for passes in ranks for rows in passes}, reverse=True)


def check_division(training: TrainingConfig, world_size: int, *, continues: bool) -> None:
    """Raise ValueError if ranks and passes cannot share a batch.

    A new run requires equal parts. A run that ``continues`` takes the ranks that there are, some of
    which may then have one row more than others.
    """
    batch, batch_gpu = training.batch, training.batch_gpu
    if batch < world_size:
        remedy = f"use at least {world_size}, or fewer ranks"
        raise refusal(
            "--batch",
            f"{batch}, too small for each of {world_size} ranks to have a part",
            remedy=remedy,
        )
    if continues and batch_gpu == 1 and batch % world_size:
        but = f"--batch {batch} over {world_size} ranks gives some ranks one row more"
        remedy = "use 2, or a number of ranks that divides the batch"
        raise refusal("--batch-gpu", 1, but=but, remedy=remedy)
    if continues:
        world_size = 1  # Passes have to divide the batch, however many ranks there are today.
    if batch % world_size:
        got = f"{batch}, which {world_size} ranks cannot share evenly"
        raise refusal("--batch", got, remedy=f"use a multiple of {world_size}")
    per_rank = batch // world_size
    if batch_gpu not in (None, "auto") and per_rank % batch_gpu:
        nearest = min(divisors(per_rank), key=lambda n: abs(n - batch_gpu))
        but = f"--batch {batch} over {world_size} rank(s) leaves {per_rank} images per rank"
        other = f"a --batch that is a multiple of {batch_gpu * world_size}"
        remedy = f"use a divisor of {per_rank}, such as {nearest}, or {other}"
        raise refusal("--batch-gpu", batch_gpu, but=but, remedy=remedy)


def group_size(training: TrainingConfig, world_size: int) -> int:
    """Return the number of ranks that together hold one copy of the weights; 1 without sharding.

    Raises ValueError if groups of --shard-size do not divide the ranks.
    """
    if training.shard == "none":
        return 1
    if training.shard == "full":
        return world_size
    size = training.shard_size or min(launcher.number("LOCAL_WORLD_SIZE", 1), world_size)
    if world_size % size:
        got = f"{size}, which does not divide {world_size} rank(s)"
        sizes = ", ".join(map(str, divisors(world_size)))
        raise refusal("--shard-size", got, remedy=f"use one of {sizes}")
    return size


def hold_parameters(
    objective: Any, config: RunConfig, shard_size: int, device: torch.device
) -> Parameters:
    """Move the network of ``objective`` to the device, whole or sharded; return its parameters.

    Collective.
    """
    network = objective.network
    if shard_size == 1:
        objective.to(device)
        network.to(memory_format=torch.channels_last)
        return Parameters(network)
    from torch_utils.sharding import shard

    parts = list(config.model.sharded_parts(network.backbone))
    dtype = AUTOCAST_DTYPES[config.training.precision]
    return shard(objective, parts, device, shard_size, dtype)
