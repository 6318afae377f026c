"""How a batch, and a model, are divided among ranks."""

from dnnlib import launcher
from dnnlib.errors import refusal
from training.config import TrainingConfig


def accumulation_rounds(training: TrainingConfig, world_size: int) -> tuple[int, int]:
    """Return ``(batch_gpu, rounds)`` with batch = batch_gpu x rounds x world_size.

    Raises ValueError if there is no such division.
    """
    if training.batch % world_size:
        got = f"{training.batch}, which {world_size} ranks cannot share evenly"
        raise refusal("--batch", got, remedy=f"use a multiple of {world_size}")
    per_rank = training.batch // world_size
    batch_gpu = training.batch_gpu or per_rank
    if per_rank % batch_gpu:
        divisors = [n for n in range(1, per_rank + 1) if per_rank % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - batch_gpu))
        but = f"--batch {training.batch} over {world_size} rank(s) leaves {per_rank} images a rank"
        other = f"a --batch that is a multiple of {batch_gpu * world_size}"
        remedy = f"use a divisor of {per_rank}, such as {nearest}, or {other}"
        raise refusal("--batch-gpu", batch_gpu, but=but, remedy=remedy)
    return batch_gpu, per_rank // batch_gpu


def group_size(training: TrainingConfig, world_size: int) -> int:
    """Return the number of ranks that hold one copy of the weights together; 1 without sharding.

    Raises ValueError if groups of --shard-size do not divide the ranks.
    """
    if training.shard == "none":
        return 1
    if training.shard == "full":
        return world_size
    size = training.shard_size or min(launcher.number("LOCAL_WORLD_SIZE", 1), world_size)
    if world_size % size:
        divisors = [str(n) for n in range(1, world_size + 1) if world_size % n == 0]
        got = f"{size}, which does not divide {world_size} rank(s)"
        raise refusal("--shard-size", got, remedy=f"use one of {', '.join(divisors)}")
    return size
