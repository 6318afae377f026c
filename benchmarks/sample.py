"""benchmark.py sample: the cost of sampling with and without guidance, and of other code."""

import dataclasses
import functools
from collections.abc import Callable

import click
import torch

import families
from benchmarks.kinds import describe_run
from benchmarks.measure import (
    TIME_COLUMNS,
    Spent,
    interleave,
    median_ratio,
    median_wall,
    spent_by,
    table,
    time_cells,
    walls,
)
from benchmarks.options import SampleOptions, listed, measured_preset, measured_run
from benchmarks.plain import build_plain_network
from data.images.codec import PixelCodec
from diffusion.guidance import GuidanceConfig
from models import ModelConfig, build_network
from torch_utils import cpu_matmul, distributed
from torch_utils.misc import count_parameters
from training.config import RunConfig

_CFG_SCALE = 1.5


def measure(config: ModelConfig, options: SampleOptions) -> None:
    """Print the table of ``benchmark.py sample``."""
    others = () if options.against is None else _others(options.against)
    device, batch = distributed.init(), options.batch
    cpu_matmul.agree(options.cpu_matmul, None, device)
    run = measured_run(options.preset, config)
    run = families.of(run).example_run(run, measured_preset(options.preset).num_classes)
    if options.steps is not None:
        run = run.changed("sampling", steps=options.steps)
    run = run.changed("training", precision=options.precision)
    if "diffusers" in others:
        from benchmarks.diffusers_sides import check_diffusers

        check_diffusers(run)
    click.echo(describe_run(run, device))
    plain, guided, doubled = f"batch {batch}", f"batch {batch}, guided", f"batch {2 * batch}"
    network = build_network(run.model)
    turns = {
        plain: _turn_of(run, network, device, (batch, 1.0)),
        guided: _turn_of(run, network, device, (batch, _CFG_SCALE)),
        doubled: _turn_of(run, network, device, (2 * batch, 1.0)),
    }
    sizes = dict.fromkeys(turns, count_parameters(network))
    for name, (turn, num_params) in _turns_of_others(others, run, device, batch).items():
        turns[name], sizes[name] = turn, num_params
    times = interleave(turns, options.rounds, warm_up=True)
    rows = [["", *TIME_COLUMNS, "images/s", "speed, guided = 1", "parameters, M"]]
    for name, spent in times.items():
        num = 2 * batch if name == doubled else batch
        speed = median_ratio(walls(times[guided]), walls(spent)) * num / batch
        cells = [f"{num / median_wall(spent):.2f}", f"{speed:.2f}", f"{sizes[name] / 1e6:.2f}"]
        rows.append([name, *time_cells(spent), *cells])
    sampling = run.sampling
    click.echo(f"{sampling.sampler}, {sampling.steps} steps, {options.precision}\n{table(rows)}")
    ratio = median_ratio(walls(times[guided]), walls(times[doubled]))
    click.echo(f"Guidance costs {ratio:.3f} times one doubled batch.")


def _others(text: str) -> tuple[str, ...]:
    return listed("--against", text, ("plain", "diffusers"))


def _turn_of(
    config: RunConfig, network: torch.nn.Module, device: torch.device, request: tuple[int, float]
) -> Callable[[], Spent]:
    """Return a function that times sampling; ``request`` is (number of images, cfg_scale)."""
    torch.manual_seed(config.training.seed)
    num, cfg_scale = request
    network = network.eval().requires_grad_(False).to(device)
    run = dataclasses.replace(config, guidance=GuidanceConfig(cfg_scale=cfg_scale))
    family = families.of(config)
    generator = family.unprompted(family.generator(run, network, PixelCodec(), device))
    return lambda: spent_by(lambda: generator.generate(range(num)), device)


def _turns_of_others(
    others: tuple[str, ...], config: RunConfig, device: torch.device, batch: int
) -> dict[str, tuple[Callable[[], Spent], int]]:
    """Return the timing function and parameter count of each other implementation, by name."""
    turns = {}
    if "plain" in others:
        network = build_plain_network(config.model)
        name = f"batch {batch}, guided, plain network"
        turn = _turn_of(config, network, device, (batch, _CFG_SCALE))
        turns[name] = turn, count_parameters(network)
    if "diffusers" in others:
        from benchmarks.diffusers_sides import make_sampler

        guided = dataclasses.replace(config, guidance=GuidanceConfig(cfg_scale=_CFG_SCALE))
        name, sample, num_params = make_sampler(guided, device)
        turn = functools.partial(spent_by, lambda: sample(batch), device)
        turns[f"batch {batch}, guided, {name}"] = turn, num_params
    return turns
