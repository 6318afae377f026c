"""What the tensors of a training step take at most, by PyTorch's allocator, on one rank or more.

As a script, ``peak_memory.py PRESET BATCH CHANGES`` prints it for a network that all ranks share.
"""

import ast
import dataclasses
import sys

import torch
from torch.profiler import ProfilerActivity, profile

import families
from configs import get_preset
from models import build_network
from torch_utils import distributed, rng
from training.config import fit_to_device
from training.ema import EMA
from training.loop import hold_parameters
from training.optimizer import GuardedAdam


class NoCodec:
    def draw(self, step):
        return None


def run_of(preset, **training):
    run = get_preset(preset).run.changed("training", **training)
    return fit_to_device(families.of(run).fit(run, None, 10), "cpu")


def measured_peak(run, batch, shard_size=1):
    """Return the most bytes that the second of two steps has beyond weights and gradients."""
    cpu = torch.device("cpu")
    network = build_network(run.model).train().requires_grad_(True)
    objective = families.of(run).objective(run, network, NoCodec())
    parameters = hold_parameters(objective, run, shard_size, cpu)
    ema = EMA(parameters)
    optimizer = GuardedAdam(parameters, beta2=0.999, weight_decay=0.0, clip_grad=None)
    images, cond = objective.example(batch, cpu)

    def step():
        optimizer.zero_grad()
        draws = objective.draw(rng.Step(0, 0, batch, tuple(images.shape[-3:]), cpu))
        with parameters.accumulating():
            objective(images, cond, draws).sum().backward()
        optimizer.step(1e-4)
        ema.update(0.5, optimizer.skipped)

    step()
    optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    now = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak - sum(param.nbytes for param in parameters.own)


if __name__ == "__main__":
    preset, batch, changes = sys.argv[1:]
    torch.set_num_threads(1)
    distributed.init()
    run = run_of(preset, batch=int(batch), shard="full")
    run = dataclasses.replace(
        run, model=dataclasses.replace(run.model, **ast.literal_eval(changes))
    )
    num_ranks = distributed.world_size()
    peaks = distributed.gather_objects(
        measured_peak(run, int(batch) // num_ranks, shard_size=num_ranks)
    )
    distributed.print0(max(peaks))
    distributed.shutdown()
