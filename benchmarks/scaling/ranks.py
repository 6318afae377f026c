"""``python -m benchmarks.scaling.ranks FILE BATCH,...`` under torchrun: times steps and sums."""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import families
from benchmarks.scaling.host import StepTime, SumTime
from configs.presets import get_preset
from dnnlib.files import write_json
from models import ModelConfig, build_network
from torch_utils import distributed, rng
from training.config import RunConfig, fit_to_device
from training.division import group_size
from training.ema import EMA
from training.loop import hold_parameters
from training.optimizer import GuardedAdam
from training.resources.memory import NoCodec

PRESET = "digits"
# Wide enough for sums to take a noticeable share of the step.
WIDTHS = dict(base_dim=96, hidden_dim=288)
SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24)  # Bytes.
_NUM_STEPS, _NUM_SUMS = 15, 15
_CPU = torch.device("cpu")


def model_config() -> ModelConfig:
    """Return the measured model: a wider one of the preset."""
    return dataclasses.replace(get_preset(PRESET).run.model, **WIDTHS)


def time_steps(batch: int, shard: str) -> StepTime:
    """Return the median time of optimizer steps on a batch that all ranks share. Collective.

    The median is that of the slowest rank.
    """
    num = distributed.world_size()
    run = get_preset(PRESET).run.changed("training", batch=batch, shard=shard)
    run = dataclasses.replace(families.of(run).fit(run, None, 10), model=model_config())
    step, turns = _make_step(fit_to_device(run, "cpu"), batch // num), []
    for _ in range(2 + _NUM_STEPS):
        distributed.barrier()
        began = time.perf_counter()
        step()
        turns.append(time.perf_counter() - began)
    return StepTime(num, shard, batch // num, _slowest(turns[2:]))


def _make_step(run: RunConfig, rows: int) -> Callable[[], None]:
    """Return a function that makes an optimizer step, always on the same ``rows`` rows."""
    network = build_network(run.model).train().requires_grad_(True)
    objective = families.of(run).objective(run, network, NoCodec())
    shard_size = group_size(run.training, distributed.world_size())
    parameters = hold_parameters(objective, run, shard_size, _CPU)
    ema, optimizer = EMA(parameters), GuardedAdam(parameters)
    loss_function = objective if shard_size > 1 else distributed.wrap(objective, _CPU)
    images, cond = objective.example(rows, _CPU)
    draws = objective.draw(rng.Step(0, 0, rows, tuple(images.shape[-3:]), _CPU))

    def step() -> None:
        optimizer.zero_grad()
        with parameters.accumulating():
            loss_function(images, cond, draws).sum().backward()
        optimizer.step(1e-4)
        ema.update(0.5, optimizer.skipped)

    return step


def time_sums() -> list[SumTime]:
    """Return the median times, on the slowest rank, of all-reduces of each size. Collective."""
    found, num = [], distributed.world_size()
    for num_bytes in SIZES:
        tensor, turns = torch.zeros(num_bytes // 4), []
        for _ in range(_NUM_SUMS):
            distributed.barrier()
            began = time.perf_counter()
            distributed.all_reduce_sum(tensor)
            turns.append(time.perf_counter() - began)
        found.append(SumTime(num, num_bytes, _slowest(turns[1:])))
    return found


def _slowest(turns: list[float]) -> float:
    return max(distributed.gather_objects(statistics.median(turns)))


def main(file: Path, batches: list[int]) -> None:
    """Time steps on the batches and write them to a file; on several ranks, also sums and FSDP."""
    torch.set_num_threads(1)
    distributed.init()
    is_alone = distributed.world_size() == 1
    shards = ("none",) if is_alone else ("none", "full")
    steps = [time_steps(batch, shard) for shard in shards for batch in batches]
    sums = [] if is_alone else time_sums()
    if distributed.is_main():
        write_json(file, dict(steps=[vars(t) for t in steps], sums=[vars(t) for t in sums]))
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(batch) for batch in sys.argv[2].split(",")])
